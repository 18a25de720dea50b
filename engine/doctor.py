"""`tensorferry doctor`: whether this machine has what a ring needs, and what to change where it has not."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import click
from rich import box
from rich.table import Table
from rich.text import Text

import shm
from engine.config import EngineConfig
from engine.console import console
from engine.options import options
from engine.segments import all_segments

_FEW_FILES, _ENOUGH_FILES = 128, 1024
_STYLES = {"ok": "green", "note": "yellow", "problem": "red"}
_UNLIMITED = 1 << 60
_WITHOUT_RING = ("frames", "inline")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One look: what was looked at, what was found, and what to change where it is not `ok`."""

    what: str
    status: Literal["ok", "note", "problem"]
    found: str
    advice: str = ""


@click.command()
@options(EngineConfig)
@click.option("--config", "config_file", type=Path, metavar="FILE", help="Options as TOML; flags go first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--vllm", is_flag=True, help="Look also at vLLM: the plugin, what it hooks, what goes which way."
)
def doctor(config_file: Path | None, as_json: bool, vllm: bool, **flags: Any) -> int:
    """Look whether this machine suits a run with these options; exit code 1 when something is a problem."""
    config = EngineConfig.load(flags, environ=os.environ, file=config_file)
    looks = (*_LOOKS, _vllm) if vllm else _LOOKS
    findings = [finding for look in looks for finding in look(config)]
    problems = sum(finding.status == "problem" for finding in findings)
    if as_json:
        lines = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"problems": problems, "findings": lines}, indent=2))
    else:
        console().print(_table(findings))
        click.echo(f"problems: {problems}")
    return 1 if problems else 0


def _table(findings: list[Finding]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.found)
        if finding.advice:
            text.append("\n→ " + finding.advice, style="bold")
        status = Text(finding.status, style=_STYLES[finding.status])
        table.add_row(status, finding.what, text)
    return table


# ---------------------------------------------------------------------- memory


def _shared_memory(config: EngineConfig) -> Iterator[Finding]:
    what = str(shm.DIRECTORY)
    try:
        space = shm.space()
    except shm.NoSpace as error:
        yield Finding(what, "problem", str(error), shm.REMEDY)
        return
    ring, total, free = config.ring_bytes, space.total, space.free
    size = "no limit of its own" if total > _UNLIMITED else f"{shm.human(total)}, {shm.human(free)} free"
    text = f"{size}; a ring has {shm.human(ring)} (--shm-ring-gb)"
    if config.tensor_transport in _WITHOUT_RING:
        yield Finding(what, "ok", f"{size}; --tensor-transport {config.tensor_transport} makes no ring")
    elif ring > total:
        yield Finding(what, "problem", f"{text}, which can never fit", shm.REMEDY)
    elif ring > free:
        yield Finding(
            what, "note", f"{text}, for which there is no room now", "See who has it: tensorferry ps"
        )
    else:
        yield Finding(what, "ok", text)


def _cgroup(config: EngineConfig) -> Iterator[Finding]:
    what, ring = "memory", config.ring_bytes
    try:
        space = shm.space()
    except shm.NoSpace:
        return  # said already
    limit = (
        "no limit by a cgroup"
        if space.cgroup is None
        else f"the cgroup allows {shm.human(space.cgroup)} more"
    )
    text = f"{limit}, the machine has {shm.human(space.machine)} available"
    if config.tensor_transport in _WITHOUT_RING:
        ring = 0
    least = min(space.machine, space.machine if space.cgroup is None else space.cgroup)
    if ring > least:
        advice = "Raise the memory limit (pages of a ring count in it), or make the ring smaller."
        yield Finding(what, "problem", f"{text}; a full ring takes {shm.human(ring)}", advice)
    else:
        yield Finding(what, "ok", text)


def _locked_memory(config: EngineConfig) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= config.ring_bytes:
        yield Finding("locked memory", "ok", _limit(soft, shm.human))
        return
    advice = "It matters only to what locks the pages of a ring, such as a GPU or RDMA: ulimit -l unlimited"
    text = f"{_limit(soft, shm.human)} of at most {_limit(hard, shm.human)}, less than a ring"
    yield Finding("locked memory", "note", text, advice)


def _huge_pages(_config: EngineConfig) -> Iterator[Finding]:
    what, mount = "huge pages", _mount_option("huge")
    rule = _chosen(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))
    text = f"{shm.DIRECTORY} is mounted with huge={mount or 'never'}, the kernel's shmem_enabled is {rule}"
    if rule == "force" or (rule != "deny" and mount not in ("", "never")):
        yield Finding(what, "ok", text)
        return
    deny = "echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled; " if rule == "deny" else ""
    advice = f"Rings work; with huge pages their first touch costs less: {deny}"
    yield Finding(what, "note", text, f"{advice}mount -o remount,huge=within_size {shm.DIRECTORY}")


# ---------------------------------------------------------------------- limits and locks


def _open_files(_config: EngineConfig) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = _limit(soft, str)
    if soft == resource.RLIM_INFINITY or soft >= _ENOUGH_FILES:
        yield Finding("open files", "ok", text)
        return
    status: Literal["note", "problem"] = "note" if soft >= _FEW_FILES else "problem"
    advice = f"Every peer takes some descriptors: ulimit -n {_ENOUGH_FILES} (at most {_limit(hard, str)})"
    yield Finding("open files", status, text, advice)


def _locks(_config: EngineConfig) -> Iterator[Finding]:
    try:
        shm.try_lock()
    except shm.ShmError as error:
        advice = "A Linux kernel with F_OFD_SETLK (3.15) and a tmpfs, writable by this user, are needed."
        yield Finding("locks", "problem", str(error), advice)
    else:
        yield Finding("locks", "ok", f"{shm.DIRECTORY} is a tmpfs, and a lock that was taken there is seen")


def _remove_ipc(_config: EngineConfig) -> Iterator[Finding]:
    """logind removes what a user has in /dev/shm when the last session ends, unless told not to."""
    what = "RemoveIPC"
    if not Path("/run/systemd/system").is_dir():
        yield Finding(what, "ok", "no systemd here that could remove segments at logout")
    elif os.getuid() < 1000:
        yield Finding(what, "ok", "systemd leaves segments of system users alone")
    elif (setting := _remove_ipc_setting()) == "no":
        yield Finding(what, "ok", "systemd-logind is told to leave segments alone")
    else:
        text = f"systemd-logind ({setting}) removes this user's segments when the last session ends"
        advice = "loginctl enable-linger, or RemoveIPC=no in /etc/systemd/logind.conf, or run it as a service"
        yield Finding(what, "note", text, advice)


def _remove_ipc_setting() -> str:
    """`no`, or what makes it do so: drop-ins go after the main file, by name (logind.conf(5))."""
    value = "by default"
    folders = [Path(root, "systemd/logind.conf.d") for root in ("/usr/lib", "/run", "/etc")]
    files = sorted((file for folder in folders for file in folder.glob("*.conf")), key=lambda file: file.name)
    for file in (Path("/etc/systemd/logind.conf"), *files):
        for line in _read(file).splitlines():
            key, _, setting = line.partition("=")
            if key.strip() == "RemoveIPC":
                no = setting.strip().lower() in ("no", "false", "0", "off")
                value = "no" if no else f"by {file}"
    return value


# ---------------------------------------------------------------------- versions, CUDA, leftovers


def _versions(_config: EngineConfig) -> Iterator[Finding]:
    import zmq

    names = ("torch", "numpy", "pyzmq", "msgspec", "posix_ipc")
    versions = {name: metadata.version(name) for name in names} | {"libzmq": zmq.zmq_version()}
    parts = [f"python {platform.python_version()}", *(f"{name} {v}" for name, v in versions.items())]
    yield Finding("versions", "ok", ", ".join([*parts, f"kernel {platform.release()}"]))


def _cuda(config: EngineConfig) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("CUDA", "ok", f"{torch.version.cuda}: {', '.join(names)}")
        yield _registration()
    elif config.device == "cuda":
        built = torch.version.cuda or "without CUDA"
        advice = "Install a build of torch with CUDA and the driver, or take --device auto."
        yield Finding("CUDA", "problem", f"--device cuda, but torch (built {built}) finds no device", advice)
    else:
        yield Finding("CUDA", "ok", "no device: models run on the CPU")


def _registration() -> Finding:
    import transport

    what = "CUDA and rings"
    if reason := transport.try_registration():
        advice = "Everything works, but copies from a ring to the GPU take the slow way: see docs/gpu.md"
        return Finding(what, "note", f"shared memory cannot be registered: {reason}", advice)
    return Finding(what, "ok", "shared memory can be registered: the GPU copies out of a ring directly")


def _leftovers(_config: EngineConfig) -> Iterator[Finding]:
    try:
        dead = [info for info in all_segments() if not info.alive]
    except FileNotFoundError:
        return  # said already
    except OSError as error:
        text = f"{shm.DIRECTORY} can't be read: {error.strerror}"
        yield Finding("segments", "problem", text, f"As root: chmod 1777 {shm.DIRECTORY}")
        return
    if dead:
        text = f"{len(dead)} of dead processes hold {shm.human(sum(info.nbytes for info in dead))}"
        yield Finding("segments", "note", text, "tensorferry sweep (the next endpoint to start does it, too)")
    else:
        yield Finding("segments", "ok", "none of dead processes")


def _vllm(_config: EngineConfig) -> Iterator[Finding]:
    from engine.vllm import check

    yield from (Finding(*line) for line in check.lines())


_LOOKS: tuple[Callable[[EngineConfig], Iterator[Finding]], ...] = (
    _shared_memory,
    _cgroup,
    _locks,
    _leftovers,
    _open_files,
    _locked_memory,
    _huge_pages,
    _remove_ipc,
    _cuda,
    _versions,
)


# ---------------------------------------------------------------------- reading settings


def _limit(value: int, show: Callable[[int], str]) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else show(value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _chosen(path: Path) -> str:
    """The word in brackets of a kernel setting such as `always [never] force`."""
    return _read(path).partition("[")[2].partition("]")[0] or "unknown"


def _mount_option(name: str) -> str:
    """The value of an option of what is mounted on /dev/shm; "" when it has none (proc_pid_mountinfo(5))."""
    value = ""
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        words = line.split()
        if words[4] == str(shm.DIRECTORY):  # the last one covers those before it
            given = dict(word.partition("=")[::2] for word in words[-1].split(","))
            value = given.get(name, "")
    return value
