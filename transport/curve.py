"""CURVE for control connections over tcp: key files, and who of those who come is known.

Everybody has a key pair. Who connects knows the public key of who listens; who listens knows a folder of
public keys, asks it for every connection that comes (ZAP, ZeroMQ RFC 27), and turns the others away
before a single message of theirs is read. Key files are those of `zmq.auth`.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path

import zmq
import zmq.auth
from zmq.utils import z85

from transport.config import TransportConfig
from transport.errors import TransportError
from transport.waiting import RateLimit

_log = logging.getLogger("tensorferry.transport")
_ZAP = "inproc://zeromq.zap.01"
_OTHERS_MAY = stat.S_IRWXG | stat.S_IRWXO
_LETTERS = 40  # of a key in a file, in Z85
_REQUEST_FRAMES = 7  # version, id, domain, address, identity, mechanism, credentials


def make_keys(folder: Path, name: str, *, public: Path) -> Path:
    """Write a new pair: `name.key_secret` with mode 0600 into `folder`, `name.key` into `public`; the first.

    `FileExistsError` when there is one of that name, `ValueError` for what is no name.
    """
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
        raise ValueError(f"{name!r} is no name for a key: use letters, digits, - _ .")
    secret = folder / f"{name}.key_secret"
    for path in (secret, public / f"{name}.key", folder / f"{name}.key"):
        if path.exists():
            raise FileExistsError(f"{path} exists; a key that may be in use is not replaced")
    before = os.umask(0o077)
    try:
        made, _ = zmq.auth.create_certificates(folder, name)
    finally:
        os.umask(before)
    os.replace(made, public / f"{name}.key")
    return secret


def check(config: TransportConfig, *, listening: bool) -> None:
    """`TransportError` when the key files that this takes are not there, or not for this user alone."""
    _own(config.curve_key)
    if not listening:
        _public(config.curve_server)
    elif not (config.curve_clients and Path(config.curve_clients).is_dir()):
        raise TransportError(
            f"curve_clients ({config.curve_clients or 'not set'}) must be a folder: put the public keys"
            " (*.key) of those who may connect there"
        )


def listen(socket: zmq.Socket[bytes], config: TransportConfig) -> None:
    """Let only who has a known key connect to a socket that is about to be bound."""
    socket.curve_publickey, socket.curve_secretkey = _own(config.curve_key)
    socket.curve_server = True
    socket.zap_domain = b"tensorferry"


def dial(socket: zmq.Socket[bytes], config: TransportConfig) -> None:
    """Speak only with who has the key of the server, and show our own."""
    socket.curve_publickey, socket.curve_secretkey = _own(config.curve_key)
    socket.curve_serverkey = _public(config.curve_server)


class Doorkeeper:
    """Answers for every connection whether its key is known; ends with the context of its socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], clients: str) -> None:
        self._socket = context.socket(zmq.SocketType.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP)
        self._clients = clients
        self._warnings = RateLimit()
        threading.Thread(target=self._run, name="tensorferry-keys", daemon=True).start()

    def _run(self) -> None:
        with self._socket:
            while True:
                try:
                    self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
                except zmq.ContextTerminated:
                    return

    def _answer(self, request: list[bytes]) -> list[bytes]:
        version, number = request[0], request[1]
        known = len(request) == _REQUEST_FRAMES and self._is_known(request[5], request[6])
        status, text = (b"200", b"OK") if known else (b"400", b"this key is not known here")
        return [version, number, status, text, b"", b""]

    def _is_known(self, mechanism: bytes, key: bytes) -> bool:
        known = self._known()
        if mechanism == b"CURVE" and z85.encode(key) in known:
            return True
        if known:
            text = f"a connection was refused: its key is not in {self._clients}"
            self._warnings.tell(_log.warning, text, "unknown key")
        else:
            text = f"nobody can connect: {self._clients} holds no public key (*.key) that can be read"
            self._warnings.tell(_log.error, text, "keys")
        return False

    def _known(self) -> set[bytes]:
        """Asked of the folder each time: a key that is added or taken away needs no restart."""
        known = set()
        for path in Path(self._clients).glob("*.key"):
            try:
                known.add(_load(path)[0])
            except (OSError, ValueError) as error:
                text = f"a file in curve_clients is passed by: {error}"
                self._warnings.tell(_log.warning, text, "bad key", path.name)
        return known


def _load(path: str | Path) -> tuple[bytes, bytes | None]:
    """Public and secret key of a file, None for a secret that it does not hold.

    `OSError` or `ValueError` when there is no public one.
    """
    try:
        public, secret = zmq.auth.load_certificate(path)
    except IndexError:  # a line that names a key and gives none
        public, secret = b"", None
    if len(public) != _LETTERS:
        raise ValueError(f"No public key found in {path}")
    return public, secret


def _own(path: str) -> tuple[bytes, bytes]:
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        public, secret = _load(path)
    except (OSError, ValueError) as error:
        raise TransportError(f"curve_key ({path}): {error}") from error
    if secret is None:
        raise TransportError(f"curve_key ({path}) holds no secret key: name the file NAME.key_secret")
    if mode & _OTHERS_MAY:
        raise TransportError(f"curve_key ({path}) may be read by others (mode {mode:o}): chmod 600 {path}")
    return public, secret


def _public(path: str) -> bytes:
    if not path:
        raise TransportError("curve_server (not set): give the file of the public key of who listens")
    try:
        return _load(path)[0]
    except (OSError, ValueError) as error:
        raise TransportError(f"curve_server (the public key of who listens): {error}") from error
