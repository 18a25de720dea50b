"""What the tests of the ring share: a reader attached in one line, bytes that can be checked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shm import Record, RingReader, RingWriter

ROOT = Path(__file__).parents[2]


def attach(writer: RingWriter, name: str = "reader") -> RingReader:
    """A reader in this process, admitted."""
    offer = writer.offer()
    reader = RingReader(offer, name)
    writer.admit(offer, name)
    return reader


@contextmanager
def ring(
    capacity: int = 1 << 20, *, slots: int = 64, columns: int = 4
) -> Iterator[tuple[RingWriter, RingReader]]:
    """A ring with one admitted reader, both closed at the end."""
    writer = RingWriter(capacity, slots=slots, columns=columns)
    reader = attach(writer)
    try:
        yield writer, reader
    finally:
        reader.close()
        writer.close()


def send(writer: RingWriter, nbytes: int, number: int = 1) -> Record:
    """One record, filled and committed, that this process goes on counting on."""
    (record,) = writer.reserve([nbytes])
    writer.buffer(record)[:] = pattern(number, nbytes)
    writer.commit([record], keep=True)
    return record


def populated() -> None:
    """Wait for the threads that touch pages ahead, each of which keeps a mapping until it is done."""
    for thread in threading.enumerate():
        if thread.name == "tensorferry-populate":
            thread.join()


def pattern(number: int, nbytes: int) -> NDArray[np.uint8]:
    """Bytes that differ from those of any other number, and from place to place."""
    words = np.arange(-(-nbytes // 8), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64(number * 0xD1B54A32D192ED03 % (1 << 64))
    return words.view(np.uint8)[:nbytes]


def tell(connection: Connection, message: object) -> None:
    """Send something as JSON: a Connection's own `send` would pickle."""
    connection.send_bytes(json.dumps(message).encode())


def hear(connection: Connection) -> object:
    """What `tell` sent; `TimeoutError` after a minute."""
    if not connection.poll(60):
        raise TimeoutError("nothing arrived in a minute")
    message: object = json.loads(connection.recv_bytes())
    return message


def run_python(code: str, *arguments: str, shm_size: str = "") -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with a /dev/shm of its own of that size if one is given."""
    command = [sys.executable, "-c", code, *arguments]
    if shm_size:
        if os.geteuid() or not shutil.which("unshare"):
            pytest.skip("a /dev/shm of its own needs root and unshare")
        mount = f'mount -t tmpfs -o size={shm_size} tmpfs /dev/shm && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, "sh", *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
