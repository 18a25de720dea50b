"""Whether vLLM will find the plugin and is what it knows, and what it does in the processes that run."""

from __future__ import annotations

import os
from collections.abc import ItemsView, Iterator, Mapping
from importlib import metadata
from typing import Any, Literal, NamedTuple

from engine.vllm import points
from engine.vllm.counts import saved

_GROUP, _NAME = "vllm.general_plugins", "tensorferry"
_OWN_WAY = "vLLM ("  # how a way is called that is vLLM's, with the reason behind it
_REMEDIES = {
    "not linked": "The first after the start, who is on another host, or who says why in its log.",
    "Full": (
        "Make /dev/shm larger where the log says that the ring stays smaller; else make ring_bytes larger, or"
        " copy_above smaller."
    ),
    "larger than the ring": "Make ring_bytes larger.",
}


class Line(NamedTuple):
    """One look: as `engine.doctor.Finding`, which this becomes."""

    what: str
    status: Literal["ok", "note", "problem"]
    found: str
    advice: str = ""


def lines() -> Iterator[Line]:
    """What there is to say. Imports vLLM, which takes seconds."""
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        yield Line("vLLM", "problem", "not installed here", "Install tensorferry into vLLM's environment.")
        return
    if untested := points.untested(version):
        yield Line("vLLM", "note", untested, "Compare its answers with and without, or take a version known.")
    else:
        yield Line("vLLM", "ok", f"{version}; known are {points.TESTED[0]} up to {points.TESTED[1]}")
    yield _plugin()
    for hop in points.POINTS:
        if absent := list(points.absent(hop)):
            yield Line(hop, "problem", f"not there: {', '.join(absent)}", "vLLM runs without this part.")
        else:
            yield Line(hop, "ok", "all that is hooked is there")
    yield from _running()


def _plugin() -> Line:
    allowed = os.environ.get("VLLM_PLUGINS")
    if not metadata.entry_points(group=_GROUP, name=_NAME):
        return Line(
            "plugin",
            "problem",
            f"no {_NAME} in {_GROUP}",
            "Install tensorferry (again) into vLLM's environment.",
        )
    if allowed is not None and _NAME not in allowed.split(","):
        return Line("plugin", "problem", f"VLLM_PLUGINS={allowed} leaves it out", f"Add {_NAME} to it.")
    return Line("plugin", "ok", f"{_NAME} in {_GROUP}")


def _running() -> Iterator[Line]:
    processes = list(saved())
    if not processes:
        advice = """vllm serve … --additional-config '{"tensorferry": true}'"""
        yield Line("running", "note", "no vLLM of this user goes through rings now", advice)
    for process in processes:
        peers = [f"{name} ({how})" for name, how in process.get("peers", {}).items()]
        ways = [f"{hop}: {how} {count} ({size / 1e6:.1f} MB)" for hop, how, count, size in process["tensors"]]
        hooks = [name for name, error in _items(process, "hooked") if not error]
        text = (
            f"linked with {', '.join(peers) or 'nobody'}; {'; '.join(ways) or 'no tensors yet'};"
            f" hooked: {', '.join(hooks) or 'nothing'}"
        )
        status, advice = _judged(process)
        yield Line(f"{process['role']} {process['pid']}", status, text, advice)


def _judged(process: Mapping[str, Any]) -> tuple[Literal["ok", "note", "problem"], str]:
    """How a process that runs stands, and what to do where it is not as it should be."""
    peers, ways = process.get("peers", {}), {how for _, how, _, _ in process["tensors"]}
    reasons = sorted(how.removeprefix(_OWN_WAY).removesuffix(")") for how in ways if how.startswith(_OWN_WAY))
    advice = [f"{name} is not hooked: {error}." for name, error in _items(process, "hooked") if error]
    advice += [f"{part} failed {count} times: see its log." for part, count in _items(process, "failed")]
    if advice:
        return "problem", " ".join(advice)
    if not peers and ways:
        return (
            "problem",
            "Tensors go vLLM's way: the logs of the others say why they did not link or left.",
        )
    if not peers:
        return "note", "So it is while models are loaded; later the logs of the others say why."
    if process["role"] == "front":
        unproved = sorted(name for name, how in peers.items() if not how.startswith("shm:"))
        advice = [f"{name} does not map the ring: {_cost(name)}." for name in unproved]
    advice += [f"{reason}: {_REMEDIES.get(reason, 'see its log.')}" for reason in reasons]
    return "note" if advice else "ok", " ".join(advice)


def _cost(name: str) -> str:
    """What follows where a peer of that name does not map a front end's ring."""
    return "what is handed on to it is copied" if name.startswith("worker") else "its tensors go vLLM's way"


def _items(process: Mapping[str, Any], name: str) -> ItemsView[str, Any]:
    """What a process saved by that name; nothing where it is one of an older version."""
    return dict(process.get(name, {})).items()
