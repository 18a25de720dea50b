"""Two hosts on one machine: network namespaces joined by a cable (veth), with their own /dev/shm, or not.

Every host is a process that holds its namespaces and ends when this one does, however that happens; the
last process of a host takes its network, its memory and its end of the cable along. No name is left over.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_SECONDS = 30.0
_NETWORK = "10.77.0"  # of the namespaces alone: every pair of hosts has these addresses
# Holds the namespaces until its standard input ends, which is when the test's process is gone.
_HOLD = "mount -t tmpfs -o mode=1777 tmpfs /dev/shm && ip link set lo up && echo ready && exec cat"


@dataclass(frozen=True)
class Host:
    """One host. address: where the other one reaches it. pid: who holds its namespaces.

    interface: the name of its end of the cable, for `ip` and `tc`; "" where there is none.
    """

    name: str
    address: str
    pid: int
    interface: str = ""

    def command(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """What starts `argv` on this host, in the root of the repository. The pid stays that of `argv`."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--ipc", "--uts", f"--wd={ROOT}"]
        return [*enter, "--", *(os.fspath(argument) for argument in argv)]

    @contextmanager
    def run(
        self, argv: Sequence[str | os.PathLike[str]], *, environ: Mapping[str, str] | None = None, **more: Any
    ) -> Iterator[subprocess.Popen[str]]:
        """A process on this host with pipes for its output, killed at the end; `more` goes to `Popen`."""
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = None if environ is None else os.environ | environ
        with subprocess.Popen(self.command(argv), env=env, **(options | more)) as process:
            try:
                yield process
            finally:
                process.kill()  # nothing, where it has ended and was waited for

    def done(self, argv: Sequence[str | os.PathLike[str]]) -> str:
        """The output of a short command that must succeed: `ip`, `tc`, `ls /dev/shm`."""
        return _done(*self.command(argv))

    def cable(self, state: str) -> None:
        """Pull the cable out (`down`) and put it in again (`up`)."""
        self.done(["ip", "link", "set", self.interface, state])


@contextmanager
def two_hosts(
    *, one_network: bool = False, names: tuple[str, str] = ("head", "far")
) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and share no memory.

    one_network: they share the network as well, like containers of one host; then both have the address
    127.0.0.1. names: their host names, which may be equal.
    """
    with ExitStack() as stack:
        first = stack.enter_context(_holder(names[0]))
        second = stack.enter_context(_holder(names[1], network_of=first if one_network else None))
        if one_network:
            yield Host(names[0], "127.0.0.1", first), Host(names[1], "127.0.0.1", second)
            return
        _join(first, second)
        yield (
            Host(names[0], f"{_NETWORK}.1", first, "cable"),
            Host(names[1], f"{_NETWORK}.2", second, "cable"),
        )


@contextmanager
def _holder(name: str, *, network_of: int | None = None) -> Iterator[int]:
    unshare = ["unshare", "--mount", "--ipc", "--uts"]
    if network_of is None:
        command = [*unshare, "--net"]
    else:
        command = ["nsenter", f"--target={network_of}", "--net", "--", *unshare]
    script = ["sh", "-c", f'hostname "$1" && {_HOLD}', "sh", name]
    with subprocess.Popen([*command, *script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            if process.stdout.readline() != b"ready\n":
                raise OSError(f"the namespaces of host {name!r} could not be made")
            yield process.pid
        finally:
            process.stdin.close()


def _join(first: int, second: int) -> None:
    """Make the cable inside the first host, so that no name of it ever shows in the machine's own network."""
    _ip(first, f"link add cable type veth peer name cable netns {second}")
    for number, pid in enumerate((first, second), 1):
        _ip(pid, f"address add {_NETWORK}.{number}/24 dev cable")
        _ip(pid, "link set cable up")


def _ip(pid: int, words: str) -> None:
    _done("nsenter", f"--target={pid}", "--net", "--", "ip", *words.split())


def _done(*argv: str) -> str:
    finished = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_SECONDS)
    if finished.returncode:
        raise OSError(f"{' '.join(argv)}: {finished.stderr.strip()}")
    return finished.stdout
