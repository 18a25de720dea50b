"""`TransportConfig`: every limit and time-out of the transport, one field each, checked when made."""

from __future__ import annotations

import logging
import math
import numbers
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Trace = Callable[[str, int, Mapping[str, object]], None]

_log = logging.getLogger("tensorferry.transport")


def log_trace(event: str, ns: int, fields: Mapping[str, object]) -> None:
    """A `trace` that writes each step to the logger `tensorferry.transport`, at DEBUG.

    ns: the monotonic clock, which all processes of a host share.
    """
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s at %d ns: %s", event, ns, " ".join(f"{name}={fields[name]}" for name in fields))


def _option(default: Any, text: str, **limits: Any) -> Any:
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """How one endpoint sends. Sizes are bytes, times seconds. `ValueError` names a field that is wrong."""

    backend: str = _option("auto", "how tensors travel: auto, shm, tcp, frames, inline, or your own")
    ring_bytes: int = _option(
        1 << 30, "size of the shared-memory ring; pages are taken as it fills", least=1 << 16
    )
    ring_step_bytes: int = _option(
        16 << 20, "pages of the ring are taken in steps of so much, one step ahead", least=4096
    )
    shm_spare_bytes: int = _option(
        0, "the ring grows only while so much of /dev/shm stays free for others", least=0
    )
    inline_below: int = _option(
        65536, "auto: tensors smaller than this travel in the control message", least=0
    )
    inline_bytes: int = _option(1 << 20, "auto: at most this much of one message travels so", least=0)
    peer_share: float = _option(
        0.5, "part of the ring that one peer may hold or be sent", above=0.0, most=1.0
    )
    max_message_bytes: int = _option(8 << 30, "a larger message is refused on both sides", least=1)
    max_control_bytes: int = _option(16 << 20, "largest control message, inline tensors included", least=4096)
    max_peers: int = _option(
        256, "links at a time, and ended ones whose messages wait to be received; more are refused", least=1
    )
    max_queued_messages: int = _option(1024, "unacknowledged messages for one peer", least=1)
    max_queued_bytes: int = _option(
        256 << 20,
        "unacknowledged bytes of such messages: bodies, handles, inline tensors, frames",
        least=4096,
    )
    max_tensors: int = _option(16384, "tensors in one message, and records in the ring", least=1)
    max_readers: int = _option(64, "processes that may map the ring at a time", least=1, most=64)
    detour_bytes: int = _option(64 << 20, "unacknowledged bytes for one peer outside the ring", least=1 << 16)
    tcp_window: int = _option(
        256 << 20,
        "tcp: bytes for one peer that it has not acknowledged, and from one that are not taken here",
        least=1 << 16,
    )
    tcp_port: int = _option(0, "tcp: port for the bytes beside the messages; 0: any", least=0, most=65535)
    tcp_timeout: float = _option(20.0, "tcp: a host that acknowledges nothing for so long is gone", above=0.0)
    detour_after: float = _option(0.2, "auto: wait for a full ring this long, then take a detour", least=0.0)
    timeout: float = _option(30.0, "how long send and receive wait when not told", above=0.0)
    handshake_timeout: float = _option(10.0, "how long connect waits for the other side", above=0.0)
    admission_timeout: float = _option(
        2.0, "how long a first send waits for the peer to map the ring", above=0.0
    )
    linger: float = _option(1.0, "how long close waits until what was sent can be received", least=0.0)
    warn_after: float = _option(5.0, "say in the log who keeps a send waiting for so long", above=0.0)
    copy_threads: int = _option(
        0, "threads that copy one tensor of 1 MiB and more, but for tcp; 0: by cores", least=0, most=64
    )
    cut_through: bool = _option(
        True, "be told of a tensor of 4 MiB and more before it is written, and wait for its end"
    )
    device_pool_bytes: int = _option(
        256 << 20,
        "memory on a GPU for tensors to peers on the same GPU; taken when first used",
        least=1 << 16,
    )
    curve_key: str = _option("", "tcp: file of this side's key pair; links are encrypted then")
    curve_server: str = _option("", "tcp: file of the public key of who listens, to connect to it")
    curve_clients: str = _option("", "tcp: folder of the public keys (*.key) of who may connect")
    insecure: bool = _option(False, "allow tcp addresses off loopback without encryption")
    trace: Trace | None = field(
        default=None, metadata={"help": "called as trace(event, monotonic nanoseconds, fields) at each step"}
    )

    def __post_init__(self) -> None:
        for name, option in self.__dataclass_fields__.items():
            _check_kind(name, getattr(self, name), str(option.type))
            _check(name, getattr(self, name), option.metadata)
        for name in ("curve_clients", "curve_server"):
            if getattr(self, name) and not self.curve_key:
                raise ValueError(
                    f"{name} without curve_key encrypts nothing: give this side's own key pair, too"
                )

    def emit(self, event: str, **fields: object) -> None:
        """Call `trace`, if there is one, with what just happened or is just about to."""
        if self.trace is not None:
            self.trace(event, time.monotonic_ns(), fields)

    @property
    def threads(self) -> int:
        """How many threads copy a large tensor: what was asked for, or half the cores, 8 at most."""
        return self.copy_threads or max(1, min(8, len(os.sched_getaffinity(0)) // 2))


def _check_kind(name: str, value: object, kind: str) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    what, good = {
        "bool": ("True or False", isinstance(value, bool)),
        "int": ("a whole number", is_number and isinstance(value, numbers.Integral)),
        "float": ("a finite number", is_number and math.isfinite(value)),  # type: ignore[arg-type]
        "str": ("text", isinstance(value, str)),
        "Trace | None": ("a callable or None", value is None or callable(value)),
    }[kind]
    if not good:
        raise ValueError(f"{name} must be {what}, not {value!r}")


def _check(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    least, most, above = limits.get("least"), limits.get("most"), limits.get("above")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be above {above}, not {value!r}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, not {value!r}")
