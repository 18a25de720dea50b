"""Addresses: what one may be, the host that a name means, and where nothing is allowed without keys."""

from __future__ import annotations

import ipaddress
import os
import socket as sockets
import stat
from contextlib import suppress
from pathlib import Path

from transport.config import TransportConfig
from transport.errors import TransportError

_LONGEST_IPC_PATH = 107
_LAST_PORT = 65535


class UnknownHost(TransportError):
    """A host's name is not known here, or not yet."""


def check(address: str, *, listening: bool) -> None:
    """`TransportError` when it is no address, or nothing can be made there."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in ("ipc", "tcp") or not rest:
        raise TransportError(f"{address!r} is no address: use ipc://PATH or tcp://HOST:PORT")
    if scheme == "ipc":
        _check_ipc(rest, listening=listening)
    else:
        _check_tcp(address, listening=listening)


def located(address: str, *, listening: bool) -> str:
    """The same with the address that its host's name has now, IPv4 where it has both.

    `UnknownHost` when the name is not known here. Takes as long as the system's resolver does.
    """
    if not address.startswith("tcp://"):
        return address
    host, port = host_and_port(address)
    if listening and (host == "*" or host in _interfaces()):
        return address
    return tcp(_numeric(host), port)


def check_safety(address: str, config: TransportConfig) -> None:
    """`TransportError` for one that leaves this host, unless there are keys or it was allowed without."""
    if config.insecure or config.curve_key or on_this_host(address):
        return
    raise TransportError(
        f"{address} is not a loopback address, and nothing here is encrypted: take 127.0.0.1, give keys"
        " (curve_key; `tensorferry keys` makes them), or set insecure=True (--insecure) on a network that"
        " you trust"
    )


def on_this_host(address: str) -> bool:
    """Whether who comes over an address surely runs under this kernel; a name is not looked up."""
    if not address.startswith("tcp://"):
        return address.startswith("ipc://")
    try:
        return ipaddress.ip_address(host_and_port(address)[0]).is_loopback
    except ValueError:
        return False


def is_ipv6(address: str) -> bool:
    """Whether it is a tcp address of IPv6."""
    return address.startswith("tcp://") and ":" in host_and_port(address)[0]


def host_and_port(address: str) -> tuple[str, str]:
    """The two of a tcp address; the host without brackets."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), port


def tcp(host: str, port: str | int) -> str:
    """The address of a port of a host, which has brackets there if it is IPv6."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def bindable(address: str) -> str:
    """As zmq wants it: any free port is `*`."""
    is_any = address.startswith("tcp://") and address.endswith(":0")
    return address.removesuffix("0") + "*" if is_any else address


def _check_tcp(address: str, *, listening: bool) -> None:
    host, port = host_and_port(address)
    if not host or not ((port.isascii() and port.isdigit()) or (listening and port == "*")):
        raise TransportError(f"{address!r} is no address: use tcp://HOST:PORT")
    if host == "*" and not listening:
        raise TransportError(f"{address!r} is no address to connect to: say which host")
    least = 0 if listening else 1
    if port != "*" and not least <= int(port) <= _LAST_PORT:
        raise TransportError(f"{address!r} is no address: a port is a number from {least} to {_LAST_PORT}")


def _numeric(host: str) -> str:
    """The address of a host."""
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    try:
        answers = sockets.getaddrinfo(host, None, type=sockets.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter for what can be no name
        why = getattr(error, "strerror", None) or str(error)
        raise UnknownHost(f"the name {host!r} is not known here ({why})") from error
    found = {family: str(name[0]) for family, *_, name in reversed(answers)}  # of each kind the first
    return found.get(sockets.AF_INET) or found[sockets.AF_INET6]


def _interfaces() -> set[str]:
    return {name for _, name in sockets.if_nameindex()}


def _check_ipc(path: str, *, listening: bool) -> None:
    if path.startswith(("@", "*")) or "\0" in path:
        raise TransportError(f"ipc://{path:.200}: use a path in the file system, whose mode guards it")
    if len(os.fsencode(path)) > _LONGEST_IPC_PATH:
        raise TransportError(
            f"ipc://{path}: the path is longer than {_LONGEST_IPC_PATH} bytes; use a shorter one"
        )
    if not listening:
        return
    try:
        _check_place(path)
    except OSError as error:  # a folder on the way may not be entered
        raise TransportError(f"cannot listen at ipc://{path}: {error.strerror}") from error


def _check_place(path: str) -> None:
    folder = Path(path).parent
    if not folder.is_dir():
        raise TransportError(f"cannot listen at ipc://{path}: there is no folder {folder}")
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise TransportError(f"cannot listen at ipc://{path}: a file that is no socket is there")
    # zmq would take the path away from a living listener.
    if _somebody_listens(path):
        raise TransportError(f"cannot listen at ipc://{path}: somebody is listening there already")


def why_nobody(address: str) -> str:
    """Why nobody is reached at an address, for a person."""
    if address.startswith("ipc://"):
        with sockets.socket(sockets.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(address.removeprefix("ipc://"))
            except PermissionError:
                return f"user {os.geteuid()} may not connect there: both ends have to run as one user"
            except OSError:
                pass
    return "nobody listens there"


def _somebody_listens(path: str) -> bool:
    with sockets.socket(sockets.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # a stopped process with a full queue
            return True
        except OSError:
            return False
        return True
