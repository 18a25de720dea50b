"""Part 3 of `bench gpu`: 32 images of 16 MiB through a rank of the engine and its model on the GPU."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import transport
from bench import sampler
from bench.floor import TIMEOUT, pair
from bench.part import Json, Report, WrongAnswerError
from engine.config import EngineConfig
from engine.images import ROW
from engine.launch import LocalRanks
from engine.model import Batch, VisionEncoder
from engine.protocol import FRONT, Joined, Ready, Reply, Request, Stop, transport_config

IMAGES, IN_A_MESSAGE = 32, 4
SIDE = 60  # patches; 60 x 60 x 1176 float32 are 16.1 MiB
GRID = (1, SIDE, SIDE)
HOLD = 20
STARTUP = 100.0


def _images(count: int) -> list[torch.Tensor]:
    """Noise, float32 [patches, ROW] each: the same noise moved a little further from image to image."""
    noise = torch.randn(SIDE * SIDE, ROW, generator=torch.Generator().manual_seed(0))
    return [noise.roll(number, 0) for number in range(count)]


def _batch(images: Sequence[torch.Tensor]) -> Batch:
    return Batch(list(images), torch.tensor([GRID] * len(images), dtype=torch.int64))


def _model(device: str) -> VisionEncoder:
    model = VisionEncoder()
    model.load(device=torch.device(device), seed=0)
    return model


def tensorferry(folder: Path, *, prompts: int) -> Report:
    """The front end's side: sends the images with eight copy threads, and takes the embeddings."""
    config = EngineConfig(device="cuda", shm_ring_gb=2.0, copy_threads=8, startup_timeout=STARTUP)
    images = _images(IMAGES)
    ranks = LocalRanks(config)
    settings = transport_config(config)
    with contextlib.ExitStack() as stack:
        stack.callback(ranks.stop)
        front = stack.enter_context(transport.listen(ranks.address, name=FRONT, config=settings))
        ranks.start()
        front.receive(Joined, timeout=STARTUP)
        ready = front.receive(Ready, timeout=STARTUP)
        if ready.body.error:
            raise RuntimeError(ready.body.error)
        rank = ready.sender
        found = _prompt(front, rank, images)
        expected = _model("cpu").forward(_batch(images[:2])).embeddings
        if not torch.allclose(found[:2], expected, atol=2e-2):
            raise WrongAnswerError("the embeddings are not those of the model")
        marks, seconds = _measured(folder, lambda: _prompt(front, rank, images), prompts)
        front.send(Stop(), to=rank)
    return Report(values={**marks, "seconds": seconds}, expected=IMAGES, verified=len(found))


def _prompt(front: transport.Endpoint, rank: str, images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Embeddings [images, dim], in order."""
    found: dict[int, torch.Tensor] = {}
    for first in range(0, len(images), IN_A_MESSAGE):
        some = images[first : first + IN_A_MESSAGE]
        front.send(Request(first, list(some), [GRID] * len(some), time.monotonic_ns()), to=rank)
        while (reply := front.try_receive(Reply)) is not None:
            _take(reply.body, found)
    while len(found) < len(images):
        _take(front.receive(Reply, timeout=TIMEOUT).body, found)
    return torch.stack([found[place] for place in range(len(images))])


def _take(reply: Reply, found: dict[int, torch.Tensor]) -> None:
    if reply.errors:
        raise RuntimeError(f"request {reply.id}: {reply.errors}")
    found |= {reply.id + place: embedding.clone() for place, embedding in reply.embeddings.items()}


def _measured(folder: Path, prompt: object, prompts: int) -> tuple[dict[str, Json], list[float]]:
    """When memory was idle, and the seconds of each prompt."""
    assert callable(prompt)
    before = time.monotonic()
    sampler.wait_for_samples(folder, HOLD, timeout=TIMEOUT)
    after = time.monotonic()
    seconds = []
    for _ in range(prompts):
        start = time.perf_counter()
        prompt()
        seconds.append(time.perf_counter() - start)
    return {"idle_from": before, "idle_to": after}, seconds


def pickle_near(folder: Path, *, prompts: int) -> Report:
    """As before any of this: each message pickled into one frame; the other end calls `.to("cuda")`."""
    images = _images(IMAGES)
    with pair(f"ipc://{folder}/pickle", bind=True) as socket:
        socket.rcvtimeo = int(STARTUP * 1000)

        def prompt() -> torch.Tensor:
            waiting, found = 0, []
            for first in range(0, IMAGES, IN_A_MESSAGE):
                some = [image.clone() for image in images[first : first + IN_A_MESSAGE]]
                socket.send(pickle.dumps(some, protocol=pickle.HIGHEST_PROTOCOL), copy=False)
                waiting += 1
            for _ in range(waiting):
                found.append(pickle.loads(socket.recv()))  # noqa: PERF401  # one answer at a time
            return torch.cat(found)

        found = prompt()
        marks, seconds = _measured(folder, prompt, prompts)
        socket.send(pickle.dumps(None))
    return Report(values={**marks, "seconds": seconds}, expected=IMAGES, verified=len(found))


def pickle_far(folder: Path, *, prompts: int) -> Report:  # both ends have the same arguments
    """The worker of `pickle_near`: the same model, one message after the other."""
    model = _model("cuda")
    with pair(f"ipc://{folder}/pickle", bind=False) as socket:
        while (images := pickle.loads(socket.recv(copy=False).buffer)) is not None:
            on_device = [image.to("cuda") for image in images]
            socket.send(pickle.dumps(model.forward(_batch(on_device)).embeddings.cpu()))
    return Report()


def model_alone(_folder: Path, *, prompts: int) -> Report:
    """The model by itself on images that lie on the GPU: what keeps it busy for one prompt, seconds."""
    model = _model("cuda")
    images = [image.to("cuda") for image in _images(IN_A_MESSAGE)]
    seconds = []
    for number in range(prompts + 2):
        start = time.perf_counter()
        for _ in range(IMAGES // IN_A_MESSAGE):
            model.forward(_batch(images)).embeddings.cpu()
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    return Report(values={"seconds": seconds}, expected=1, verified=1)
