"""What a gigabyte on its way keeps waiting and takes: round trips of small messages, memory of both sides."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import torch

import transport
from bench import sampler
from bench.hosts import MIB, TIMEOUT, far_end, near_end
from bench.part import Report, WrongAnswerError

PINGS = 400
_AT_ONCE, _AT_ONCE_TO_THE_SLOW = 128 * MIB, 64 * MIB


def control_near(folder: Path, *, column: str, layout: str, nbytes: int) -> Report:
    """Round trips of a small message, idle and while `nbytes` bytes are under way; microseconds."""
    with near_end(folder, column, layout) as (endpoint, _):
        endpoint.send({"data": torch.zeros(MIB, dtype=torch.uint8)})
        idle = [_ping(endpoint, n) for n in range(PINGS)]
        block = torch.zeros(min(_AT_ONCE, nbytes), dtype=torch.uint8)
        sending = threading.Thread(target=_send_all, args=(endpoint, block, nbytes // block.nbytes))
        sending.start()
        loaded: list[float] = []
        for n in itertools.count(PINGS):
            loaded.append(_ping(endpoint, n))
            if not sending.is_alive() and endpoint.peers[0].unacknowledged <= 1:
                break
        sending.join()
        endpoint.send({"stop": True})
    return Report(values={"idle": idle, "loaded": loaded}, expected=PINGS + len(loaded))


def _send_all(endpoint: transport.Endpoint, block: torch.Tensor, count: int) -> None:
    for _ in range(count):
        endpoint.send({"data": block})


def _ping(endpoint: transport.Endpoint, n: int) -> float:
    start = time.perf_counter()
    endpoint.send({"ping": n})
    if endpoint.receive().body != n:
        raise WrongAnswerError(f"ping {n} was answered as another")
    return (time.perf_counter() - start) * 1e6


def control_far(folder: Path, *, column: str, layout: str, nbytes: int) -> Report:  # as near
    """Answers pings, drops tensors."""
    verified = 0
    with far_end(folder, column, layout) as (endpoint, _):
        while True:
            body = endpoint.receive().body
            if "stop" in body:
                break
            if "ping" in body:
                endpoint.send(body["ping"])
                verified += 1
            del body
    return Report(verified=verified)


def memory_near(folder: Path, *, column: str, layout: str, nbytes: int) -> Report:
    """Sends `nbytes` bytes as fast as they go."""
    with near_end(folder, column, layout) as (endpoint, _):
        block = torch.zeros(_AT_ONCE_TO_THE_SLOW, dtype=torch.uint8)
        endpoint.send({"data": block[:MIB]})
        endpoint.receive()
        before = time.monotonic()
        sampler.wait_for_samples(folder, 20, timeout=TIMEOUT)
        after = time.monotonic()
        _send_all(endpoint, block, nbytes // block.nbytes)
        endpoint.receive()
    return Report(values={"idle_from": before, "idle_to": after}, expected=1)


def memory_far(folder: Path, *, column: str, layout: str, nbytes: int) -> Report:
    """Takes them one by one, without hurry."""
    with far_end(folder, column, layout) as (endpoint, _):
        endpoint.receive()
        endpoint.send("ready")
        for _ in range(nbytes // _AT_ONCE_TO_THE_SLOW):
            endpoint.receive()
            time.sleep(0.02)
        endpoint.send("done")
    return Report(verified=1)
