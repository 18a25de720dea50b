"""How many tensors went which way: in memory, in a file for `tensorferry doctor --vllm`, for Prometheus."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from engine.vllm import guard, points
from engine.vllm.settings import NEW, SAVED, folder, identity, sweep_counters

_log = logging.getLogger("vllm.tensorferry")

FRONT, WORKERS = "front end to engine", "engine to workers"
_WRITE_EVERY = 1.0
_numbers = itertools.count(1)  # of the files of this process: it may have several front ends

Way = tuple[str, str]  # hop, and how: "ring", "copied out" of it, or why it went vLLM's own way


class Counts:
    """Tensors and bytes by way, of this process and of those that told it theirs. Safe for threads."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.tensors: Counter[Way] = Counter()
        self.nbytes: Counter[Way] = Counter()
        self._others: dict[str, list[tuple[str, str, int, int]]] = {}
        self._lock = threading.Lock()
        self._filing = threading.Lock()
        self._removed = False
        self._process = identity()
        self._file = folder() / f"{os.getpid()}-{next(_numbers)}{SAVED}"
        self._written = self._said = self._error = ""
        self._next = 0.0
        self._published: Counter[Way] = Counter()

    def add(self, hop: str, how: str, nbytes: int) -> None:
        """One tensor went that way."""
        with self._lock:
            self.tensors[hop, how] += 1
            self.nbytes[hop, how] += nbytes

    def rows(self) -> list[tuple[str, str, int, int]]:
        """Hop, way, tensors, bytes of this process."""
        with self._lock:
            return [(*way, count, self.nbytes[way]) for way, count in sorted(self.tensors.items())]

    def heard(self, who: str, rows: list[Any]) -> None:
        """Another process, which has no way to Prometheus, tells its own."""
        told = [(str(hop), str(how), int(n), int(size)) for hop, how, n, size in rows]
        with self._lock:
            self._others[who] = told

    def total(self) -> list[tuple[str, str, int, int]]:
        """As `rows`, with what was heard."""
        tensors: Counter[Way] = Counter()
        nbytes: Counter[Way] = Counter()
        with self._lock:
            heard = [row for rows in self._others.values() for row in rows]
        for hop, how, count, size in [*self.rows(), *heard]:
            tensors[hop, how] += count
            nbytes[hop, how] += size
        return [(*way, count, nbytes[way]) for way, count in sorted(tensors.items())]

    def line(self) -> str:
        """One line for a log; "" when nothing was counted."""
        return ", ".join(f"{hop}: {how} {n} ({size / 1e6:.1f} MB)" for hop, how, n, size in self.total())

    def news(self) -> str:
        """As `line`, but "" where nothing was counted since the last time."""
        before, self._said = self._said, self.line()
        return "" if self._said == before else self._said

    def save(self, *, now: bool = False, **more: object) -> None:
        """Publish, and write the file if something changed, at most once a second. A file that can't be
        written is said once, and tried again.
        """
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _WRITE_EVERY
        with guard.Harmless("the counters for Prometheus", tensors=False):
            self._publish()
        state = {"tensors": self.rows(), "hooked": points.hooked, "failed": dict(guard.failures)}
        text = json.dumps({"role": self.role, **self._process, **state, **more})
        with self._filing:  # by the mailbox's thread, which may end after the close that removes the file
            if not self._removed and (text != self._written or not self._file.exists()):
                self._write(text)

    def _write(self, text: str) -> None:
        try:
            folder()  # who cleans /tmp may have taken it
            new = self._file.with_suffix(NEW)
            new.write_text(text)
            new.replace(self._file)  # whole or not at all: somebody may be reading it
        except OSError as error:
            if str(error) != self._error:
                self._error = str(error)
                _log.warning("tensorferry: counters are not saved for tensorferry doctor: %s", error)
        else:
            self._written, self._error = text, ""

    def remove(self) -> None:
        """The process ends, or has no need of them any more."""
        with self._filing, contextlib.suppress(OSError):
            self._removed = True
            self._file.unlink(missing_ok=True)
            self._file.with_suffix(NEW).unlink(missing_ok=True)

    def _publish(self) -> None:
        """To Prometheus, whose counters can only grow: by the difference since the last time."""
        if self.role != "front" or (metrics := _metrics()) is None:
            return
        for hop, how, count, size in self.total():
            for metric, key, value in ((metrics[0], "tensors", count), (metrics[1], "bytes", size)):
                grown = value - self._published[f"{key} {hop}", how]
                if grown > 0:
                    metric.labels(hop=hop, way=how).inc(grown)
                    self._published[f"{key} {hop}", how] = value


_prometheus: tuple[Any, Any] | None = None
_registering = threading.Lock()  # several front ends of one process, each in its own thread


def _metrics() -> tuple[Any, Any] | None:
    """The counters of this process, made once. vLLM removes metrics with its own name in theirs."""
    global _prometheus
    try:
        from prometheus_client import Counter as Metric
    except ImportError:
        return None
    with _registering:
        if _prometheus is None:
            by, labels = "of tensors between processes, by hop and way", ["hop", "way"]
            _prometheus = (
                Metric("tensorferry_tensors", f"Number {by}", labels),
                Metric("tensorferry_tensor_bytes", f"Bytes {by}", labels),
            )
    return _prometheus


def saved() -> Iterator[Mapping[str, Any]]:
    """What living processes saved; the files of the dead are removed."""
    sweep_counters()
    for file in sorted(folder().glob(f"[0-9]*{SAVED}")):
        with contextlib.suppress(OSError, ValueError):  # just going
            yield json.loads(file.read_text())
