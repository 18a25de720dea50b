"""Backend names → classes: our own, and those of others through the entry-point group `tensorferry.backends`.

A third party's entry point names a class or module with `Outbound` and `Inbound` attributes. It is loaded
when a configuration names it, never because a peer does.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple, cast

from transport.backends.base import Inbound, Outbound
from transport.config import TransportConfig

GROUP = "tensorferry.backends"

_OWN = {
    "auto": ("transport.backends.auto", "AutoOutbound", None),
    "inline": ("transport.backends.inline", "InlineOutbound", "InlineInbound"),
    "frames": ("transport.backends.frames", "FramesOutbound", "FramesInbound"),
    "shm": ("transport.backends.shm", "ShmOutbound", "ShmInbound"),
    "tcp": ("transport.backends.tcp", "TcpOutbound", "TcpInbound"),
}
_ALWAYS_READ = ("inline", "frames", "shm", "tcp")


class Backend(NamedTuple):
    """The two classes of a backend; `auto` has no receiving side."""

    outbound: type[Outbound]
    inbound: type[Inbound] | None


def names() -> list[str]:
    """The backends that a configuration may name here."""
    return [*_OWN, *sorted(entry.name for entry in _foreign() if entry.name not in _OWN)]


def load(name: str) -> Backend:
    """The classes of a backend. `ValueError` when there is none of that name, or it is not one."""
    if name in _OWN:
        module_name, outbound_name, inbound_name = _OWN[name]
        module = import_module(module_name)
        return Backend(
            getattr(module, outbound_name), getattr(module, inbound_name) if inbound_name else None
        )
    entry = next((entry for entry in _foreign() if entry.name == name), None)
    if entry is None:
        raise ValueError(f"there is no backend {name!r}; there are {', '.join(names())}")
    found = entry.load()
    outbound, inbound = getattr(found, "Outbound", None), getattr(found, "Inbound", None)
    if not (isinstance(outbound, type) and issubclass(outbound, Outbound)):
        raise ValueError(f"backend {name!r}: {entry.value} has no Outbound that derives from transport's")
    if not (isinstance(inbound, type) and issubclass(inbound, Inbound)):
        raise ValueError(f"backend {name!r}: {entry.value} has no Inbound that derives from transport's")
    return Backend(outbound, inbound)


def inbounds(config: TransportConfig) -> dict[str, Inbound]:
    """What an endpoint with this configuration reads: always our own, and the backend it names."""
    wanted = dict.fromkeys((*_ALWAYS_READ, config.backend))
    found = {
        name: backend.inbound(config)
        for name, backend in ((name, load(name)) for name in wanted)
        if backend.inbound is not None
    }
    # What stands for memory on a GPU are records of the ring.
    on_gpu = import_module("transport.backends.cuda").CudaInbound(config, found["shm"])
    return {**found, on_gpu.name: on_gpu}


def _foreign() -> list[EntryPoint]:
    return cast("list[EntryPoint]", list(entry_points(group=GROUP)))
