"""A backend for tensorferry that passes tensors as files in a private folder, mapped by their readers."""

from __future__ import annotations

import mmap
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Sequence

import msgspec
import numpy as np

from transport.backends import base
from transport.backends.base import Bytes, Load, Parcel, Peer, Poll, Proof, Refusal
from transport.backends.budget import Budget
from transport.config import TransportConfig
from transport.errors import Full, PeerGone, ProtocolError
from transport.tensors import Source

_NAME = re.compile(r"[0-9a-f]{32}", re.ASCII)
_CHALLENGE_BYTES = 16


class _Offer(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    folder: str
    challenge: str  # the name of a file whose content is the proof


_offers = msgspec.msgpack.Decoder(_Offer)
_handles = msgspec.msgpack.Decoder(str)
_encode = msgspec.msgpack.encode


# ------------------------------------------------------------------------------------ sending


class FileParcel(Parcel):
    """The files of one message, removed when the last reader has let go."""

    def __init__(self, outbound: Outbound, names: list[str], nbytes: int, readers: Sequence[Peer]) -> None:
        self._outbound = outbound
        self._names = names
        self._nbytes = nbytes
        self._left = len(readers)

    def load(self, reader: Peer) -> Load:
        return Load([("file", _encode(name)) for name in self._names])

    def release(self, reader: Peer) -> None:
        self._outbound.budget.give(reader, self._nbytes)
        with self._outbound.lock:  # acknowledgements may come to several threads
            self._left -= 1
        if not self._left:
            self._outbound.remove(self._names)


class Outbound(base.Outbound):
    """Writes each tensor into a file of its own."""

    name = "file"

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self.budget = Budget(config.detour_bytes)  # bounds what one peer has not taken yet
        self.lock = threading.Lock()
        self._folder = ""  # made when needed
        self._challenges: dict[Peer, tuple[str, bytes]] = {}
        self._admitted: set[Peer] = set()
        self._refused: dict[Peer, str] = {}
        self._files = self._nbytes = 0

    # A proof, since a peer may have another file system, another user id, or be on another host.

    def wants_offer(self, peer: Peer, sizes: Sequence[int]) -> bool:
        return any(sizes) and peer not in self._admitted and peer not in self._refused

    def offer(self, peer: Peer) -> bytes:
        secret = secrets.token_bytes(_CHALLENGE_BYTES)
        name = self._write(np.frombuffer(secret, np.uint8))
        self._challenges[peer] = name, secret
        return _encode(_Offer(self.folder(), name))

    def admit(self, peer: Peer, answer: Proof | Refusal) -> str:
        name, secret = self._challenges.pop(peer, ("", b""))
        self.remove([name])
        if not secret:
            return "nothing was offered"
        reason = answer.reason if isinstance(answer, Refusal) else ""
        if isinstance(answer, Proof) and not secrets.compare_digest(answer.data, secret):
            reason = "the proof is wrong"
        if reason:
            self._refused[peer] = reason
        else:
            self._admitted.add(peer)
        return reason

    def explain(self, peer: Peer) -> str:
        if peer in self._admitted:
            return "file: the peer proved that it reads the folder"
        return f"not file: {self._refused.get(peer, 'the peer has not answered the offer')}"

    def drop(self, peer: Peer) -> None:
        self.remove([self._challenges.pop(peer, ("", b""))[0]])
        self._admitted.discard(peer)
        self._refused.pop(peer, None)

    # Tensors.

    def folder(self) -> str:
        with self.lock:
            if not self._folder:
                self._folder = tempfile.mkdtemp(prefix="tensorferry-file-")  # mode 0700
            return self._folder

    def limit(self, peer: Peer) -> int:
        return max(1, self.config.detour_bytes // 2)

    def put(
        self, sources: Sequence[Source], readers: Sequence[Peer], *, timeout: float, poll: Poll
    ) -> Parcel:
        nbytes = sum(source.nbytes for source in sources)
        unproved = {peer.name: self.explain(peer) for peer in readers if peer not in self._admitted}
        if nbytes and unproved:
            raise Full("; ".join(f"{name}: {why}" for name, why in unproved.items()), failed=unproved)
        names: list[str] = []
        with self.budget.taken_for(readers, nbytes, timeout=timeout, poll=poll):
            try:
                for source in sources:
                    buffer = np.empty(source.nbytes, np.uint8)
                    source.fill(buffer, threads=self.config.threads)
                    names.append(self._write(buffer) if source.nbytes else "")
            except BaseException:
                self.remove(names)
                raise
        self._files += len(names)
        self._nbytes += nbytes
        return FileParcel(self, names, nbytes, readers)

    def _write(self, data: Bytes) -> str:
        name = secrets.token_hex(16)
        path = os.path.join(self.folder(), name)
        try:
            with open(path, "xb") as file:
                file.write(data.data)
        except OSError as error:
            self.remove([name])
            raise Full(f"{data.nbytes} bytes could not be written to a file: {error.strerror}") from error
        return name

    def remove(self, names: Sequence[str]) -> None:
        """Remove files; "" stands for none. Who has one mapped keeps it."""
        for name in filter(None, names):
            try:
                os.unlink(os.path.join(self._folder, name))
            except FileNotFoundError:  # the folder went with `close`
                pass

    def statistics(self) -> dict[str, object]:
        return {"files": self._files, "nbytes": self._nbytes}

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


# ------------------------------------------------------------------------------------ receiving


class Inbound(base.Inbound):
    """Maps files out of the folders of peers. Their names and contents are hostile until checked."""

    name = "file"

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self._folders: dict[Peer, int] = {}  # descriptors
        self._opened = 0

    def accept(self, peer: Peer, offer: bytes, own_name: str) -> Proof | Refusal:
        self.drop(peer)
        try:
            offered = _offers.decode(offer)
            folder = _open_folder(offered.folder)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
            return Refusal("the offer is not one")
        except OSError as error:
            return Refusal(f"the folder cannot be opened: {error.strerror}")
        self._folders[peer] = folder
        try:
            return Proof(_mapped(folder, offered.challenge, _CHALLENGE_BYTES).tobytes())
        except (ProtocolError, PeerGone) as error:
            self.drop(peer)
            return Refusal(str(error))

    def settle(self, peer: Peer, reason: str) -> None:
        if reason:
            self.drop(peer)

    def open(self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]) -> Bytes:
        try:
            name = _handles.decode(handle)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError("a file handle is no name") from error
        if not nbytes and not name:
            return np.empty(0, np.uint8)
        folder = self._folders.get(peer)
        if folder is None:
            raise PeerGone(f"the folder of {peer.name} is not open here (any more)")
        view = _mapped(folder, name, nbytes)
        self._opened += 1
        return view

    def drop(self, peer: Peer) -> None:
        folder = self._folders.pop(peer, None)
        if folder is not None:
            os.close(folder)

    def statistics(self) -> dict[str, object]:
        return {"folders": len(self._folders), "opened": self._opened}

    def close(self) -> None:
        for peer in list(self._folders):
            self.drop(peer)


def _open_folder(path: str) -> int:
    """A descriptor of a folder that is ours and nobody else's. `OSError`, `ValueError`."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(folder)
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o700:
        os.close(folder)
        raise ValueError("not a private folder of this user")
    return folder


def _mapped(folder: int, name: str, nbytes: int) -> Bytes:
    """A file of the folder, read-only, uint8 [nbytes]; it stays while the array lives, removed or not."""
    if not _NAME.fullmatch(name):  # else `..` would lead anywhere
        raise ProtocolError("a file handle is no name of ours")
    try:
        # O_NONBLOCK: a fifo in place of the file must not keep us waiting.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError as error:
        raise PeerGone("the file is gone: its sender closed or died") from error
    except OSError as error:
        raise ProtocolError(f"the file cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size != nbytes or not nbytes:
            raise ProtocolError(f"the file does not have {nbytes} bytes")
        return np.frombuffer(mmap.mmap(file, nbytes, prot=mmap.PROT_READ), np.uint8)
    finally:
        os.close(file)
