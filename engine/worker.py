"""One worker of a rank: takes photographs out of the front end's ring, runs the model, sends embeddings back.

`python -m engine.worker --rank rank0 --address ipc://… --config FILE`, started by `engine.launch`. Of the
workers that share a model (`tensor_parallel_size`) each gets every request, and the first answers. One whose
front end is on another host waits for it (`--patience`) and ends with who started it: its standard input.

One thread receives, so that a request is open (on a GPU: copied there) while the model works on the one
before; the main thread runs the model. How much may wait here is the front end's decision.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import transport
from engine.catalog import choose_model
from engine.config import EngineConfig
from engine.errors import HEAD_LOST, NO_HEAD
from engine.model import Batch, Model, ModelError, Outputs, load_part
from engine.options import ConfigError
from engine.parallel import Parallel, ParallelError, join
from engine.protocol import FRONT, Joined, Ready, Reply, Request, Stop, outward, transport_config
from engine.staging import Staged, Stager, choose_device, staged

_log = logging.getLogger("tensorferry.worker")

# Nothing has to come in this time; it bounds one wait, after which the next begins.
_WAIT = 10.0
_SEND_TIMEOUT = 30.0
# How long the model may still compute for nobody.
_ORPHAN_GRACE = 10.0
_REFUSED_NAP = 2.0
_MOMENT = 0.1


class _Opened(NamedTuple):
    """A request whose tensors are open here or on their way to the device, and since when."""

    request: Request
    opened_ns: int
    staged: Staged | None


class Worker:
    """A loaded model and the link to the front end. outward: of a text what the front end is told."""

    def __init__(
        self,
        endpoint: transport.Endpoint,
        model: Model,
        device: torch.device,
        parallel: Parallel,
        outward: Callable[[str], str],
    ) -> None:
        self._endpoint = endpoint
        self._model = model
        self._device = device
        self._parallel = parallel
        self._outward = outward
        # On the CPU the model reads the views into the ring themselves.
        self._stager = Stager(device) if device.type == "cuda" else None
        self._opened: queue.SimpleQueue[_Opened | None] = queue.SimpleQueue()
        self._stop: Stop | None = None
        self._warnings = transport.RateLimit()

    def run(self) -> Stop | None:
        """Answer requests until the front end says stop, and what it says; None when it is gone.

        Raises:
            ParallelError: the other workers of this rank can't be reckoned with any more.
        """
        threading.Thread(target=self._receive, name="tensorferry-receive", daemon=True).start()
        try:
            self._work()
        except transport.PeerGone as error:
            _log.info("leaving: %s", error)
            while self._opened.get() is not None:  # it may have said stop before it left
                pass
        return self._stop

    def _work(self) -> None:
        self._endpoint.send(Ready(device=str(self._device)), to=FRONT, timeout=_SEND_TIMEOUT)
        while (opened := self._opened.get()) is not None:
            reply = self._answer(opened)
            # Before the next wait, which may be long: the views keep the ring's memory.
            del opened
            if self._parallel.rank == 0:
                self._endpoint.send(reply, to=FRONT, timeout=_SEND_TIMEOUT)

    def _receive(self) -> None:
        try:
            self._take_requests()
        except transport.TransportError as error:
            _log.info("leaving: %s", error)
        finally:
            self._opened.put(None)
        # A forward pass that never ends must not keep an orphan alive.
        time.sleep(_ORPHAN_GRACE)
        os._exit(_exit_code(self._stop))

    def _take_requests(self) -> None:
        while True:
            try:
                message = self._endpoint.receive(Request | Stop, timeout=_WAIT, stage=self._stager)
            except transport.Timeout:
                continue
            except transport.ProtocolError as error:  # one message is lost, the link is good
                self._warnings.tell(_log.error, f"a request could not be read: {error}", "unreadable")
                continue
            if isinstance(message.body, Stop):
                self._stop = message.body
                return
            self._opened.put(_Opened(message.body, time.monotonic_ns(), staged(message)))
            del message

    def _answer(self, opened: _Opened) -> Reply:
        request = opened.request
        places = list(range(len(request.pixel_values)))
        if opened.staged is not None:
            opened.staged.wait()
        reply = Reply(request.id, {}, {}, hop_ns=opened.opened_ns - request.sent_ns)
        try:
            self._encode(request, places, reply)
        except ParallelError:
            raise
        except Exception as error:  # noqa: BLE001  # a model may raise anything; the loop goes on
            self._one_by_one(request, error, reply)
        return reply

    def _one_by_one(self, request: Request, error: Exception, reply: Reply) -> None:
        """The batch failed: find out which photographs are to blame, and answer for the others."""
        if len(request.pixel_values) == 1:
            reply.errors[0] = self._outward(_named(error))
            return
        for place in range(len(request.pixel_values)):
            try:
                self._encode(request, [place], reply)
            except ParallelError:
                raise
            except Exception as alone:  # noqa: BLE001  # as above
                reply.errors[place] = self._outward(_named(alone))

    def _encode(self, request: Request, places: Sequence[int], reply: Reply) -> None:
        """Add the outputs, where all workers came to some: what fails for one has failed for all."""
        try:
            outputs = self._forward(request, places)
        except ParallelError:
            raise
        except Exception:
            self._parallel.agree(request.id, failed=True)
            raise
        if failed := self._parallel.agree(request.id, failed=False):
            raise ModelError(f"{', '.join(failed)} could not do its part")
        reply.embeddings.update(zip(places, outputs.embeddings, strict=True))
        reply.texts.update(zip(places, outputs.texts, strict=False))  # none, where none was asked for

    def _forward(self, request: Request, places: Sequence[int]) -> Outputs:
        batch = Batch(
            pixel_values=[request.pixel_values[place] for place in places],
            grid_thw=torch.tensor([request.grids[place] for place in places], dtype=torch.int64).view(-1, 3),
            more=[request.more[place] for place in places] if request.more else [],
        )
        outputs = self._model.forward(batch)
        embeddings = outputs.embeddings.detach()
        if embeddings.ndim != 2 or len(embeddings) != len(places):
            raise ModelError(
                f"the model returned embeddings {list(embeddings.shape)} for {len(places)} images; "
                f"they must be [{len(places)}, dim]"
            )
        if embeddings[:1].nbytes < self._endpoint.config.inline_below:
            embeddings = embeddings.cpu()  # all at once; large ones go from the device into the ring
        return Outputs(embeddings, outputs.texts)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _outward(place: Place, config: EngineConfig, text: str) -> str:
    """What the front end is told of an error; the whole stays here, where it differs."""
    told = outward(text, config, place.rendezvous)
    if told != text:
        _log.error("%s", text)
    return told


class Place(NamedTuple):
    """Which worker of which rank this is, the file over which they meet, and which of the GPUs it takes."""

    rank: str
    worker: int
    rendezvous: Path
    gpu: int


def serve(place: Place, address: str, config: EngineConfig, *, patience: float = 0.0) -> int:
    """Run one worker; the process's exit code. patience: how many seconds it waits for the front end."""
    if "OMP_NUM_THREADS" not in os.environ:
        # Workers on one host share its cores; each taking all of them makes every one slow.
        workers = max(1, len(config.local_ranks)) * config.tensor_parallel_size
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    name = config.worker_names(place.rank)[place.worker]
    try:
        endpoint = _connected(name, address, config, patience)
    except transport.TransportError as error:
        print(error, file=sys.stderr)
        return NO_HEAD
    with endpoint:
        try:
            endpoint.send(Joined.here(config), to=FRONT, timeout=_SEND_TIMEOUT)
            device = choose_device(config.device, place.gpu)
            if device.type == "cuda":
                torch.cuda.set_device(device)  # for what takes the current one, such as NCCL
            model = choose_model(config)
            parallel = _join(place, device, config)
            load_part(model, device=device, seed=config.seed, parallel=parallel)
            stop = Worker(endpoint, model, device, parallel, partial(_outward, place, config)).run()
        except transport.TransportError as error:
            print(error, file=sys.stderr)
            return HEAD_LOST
        except Exception as error:  # noqa: BLE001  # whatever it was, the front end must hear of it
            expected = isinstance(error, ModelError | ParallelError | ValueError)
            text = _outward(place, config, str(error) if expected else _named(error))
            endpoint.send(Ready(error=text), to=FRONT)
            return 1
        parallel.leave()
    if stop is not None and stop.reason:
        print(f"the head does not want this worker: {stop.reason}", file=sys.stderr)
    return _exit_code(stop)


def _exit_code(stop: Stop | None) -> int:
    if stop is None:
        return HEAD_LOST
    return 1 if stop.reason else 0


def _connected(name: str, address: str, config: EngineConfig, patience: float) -> transport.Endpoint:
    """The link to the front end, once it is there and lets this worker in; `TransportError` else."""
    settings = transport_config(config, replies=True)
    deadline = time.monotonic() + patience
    warnings = transport.RateLimit()
    while True:
        left = max(_MOMENT, deadline - time.monotonic()) if patience else None
        try:
            return transport.connect(address, name=name, config=settings, timeout=left)
        except transport.PeerGone as error:
            # That a dead worker of this name is dead may take its head a while to find out.
            if time.monotonic() > deadline:
                raise
            hint = "if two hosts have this rank, compare --data-parallel-start-rank"
            warnings.tell(_log.warning, f"{error}; trying again; {hint}", "refused")
            time.sleep(_REFUSED_NAP)


def _end_with_who_started_us() -> None:
    """What started us ended: it would start another worker of our name, or there is nobody to end us."""
    os.read(0, 1)  # not through sys.stdin, whose lock the end of the interpreter would wait for
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_GRACE)
    os._exit(HEAD_LOST)


def _join(place: Place, device: torch.device, config: EngineConfig) -> Parallel:
    if config.tensor_parallel_size == 1:
        return Parallel()
    return join(
        place.worker,
        config.worker_names(place.rank),
        place.rendezvous,
        device=device,
        patience=config.startup_timeout,
        timeout=config.request_timeout,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of one worker."""
    faulthandler.enable()  # writing into a view of the ring is SIGSEGV; this shows where
    # So that `with` gives everything back; it is raised between two steps of the main thread.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = argparse.ArgumentParser(prog="python -m engine.worker", description=__doc__)
    parser.add_argument("--rank", required=True)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--rendezvous", type=Path, default=Path())
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--address", required=True)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--patience", type=float, default=0.0)
    given = parser.parse_args(arguments)
    try:
        config = EngineConfig.load({}, environ={}, file=given.config)
        logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
        place = Place(given.rank, given.worker, given.rendezvous, given.gpu)
        if given.patience:
            threading.Thread(
                target=_end_with_who_started_us, name="tensorferry-lifeline", daemon=True
            ).start()
        return serve(place, given.address, config, patience=given.patience)
    except (ConfigError, transport.TransportError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        # All is given back; what Python does at exit should not be disturbed by an exception.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
