"""`make bench` and `make bench-peers` go on after what fails, and say so."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.harness import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

SHELLS = [shell for shell in ("/bin/sh", "/bin/bash") if Path(shell).exists()]


def command(*arguments: str) -> list[str]:
    """make with this checkout's Makefile, as if .venv were there and up to date."""
    return ["make", "-f", str(ROOT / "Makefile"), "-o", ".venv/installed", *arguments]


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """That, in `folder`."""
    given = {**os.environ, **environment}
    return subprocess.run(
        command(*arguments), cwd=folder, env=given, capture_output=True, text=True, check=False
    )


def environment(folder: Path) -> Path:
    """A .venv in `folder` that is the one that runs the tests."""
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def package(folder: Path, text: str) -> None:
    """A `bench` of one file: what matters is which are run, not what they measure."""
    (folder / "bench").mkdir()
    (folder / "bench" / "__init__.py").touch()
    (folder / "bench" / "__main__.py").write_text(text)


def test_benchmarks_after_one_that_fails_are_run_and_the_status_tells(tmp_path: Path) -> None:
    folder = environment(tmp_path)
    package(folder, "import sys\nprint('ran', *sys.argv[1:])\nsys.exit(sys.argv[1] == 'bad')\n")
    done = make(folder, "bench", "BENCH=good bad other", "ARGS=--quick")
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran")]
    assert ran == ["ran good --quick", "ran bad --quick", "ran other --quick"]
    assert done.returncode != 0
    assert "make bench: bad failed" in done.stderr
    assert make(folder, "bench", "BENCH=good").returncode == 0


_IS_INTERRUPTED = """
import sys, time
try:
    print("ran", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(1)
"""


@pytest.mark.parametrize("shell", SHELLS)
def test_interrupt_ends_all_benchmarks(tmp_path: Path, shell: str) -> None:
    """Also where the one that is running ends by itself, with a status as if it had failed."""
    folder = environment(tmp_path)
    package(folder, _IS_INTERRUPTED)
    with subprocess.Popen(
        command(f"SHELL={shell}", "bench", "BENCH=one other"),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        while running.stdout.readline() != "ran\n":
            assert running.poll() is None
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        try:
            assert "ran" not in running.stdout.readline()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


@pytest.mark.stress
def test_peer_without_a_wheel_is_a_line_and_the_others_are_installed(tmp_path: Path) -> None:
    folder, wheels = environment(tmp_path), tmp_path / "wheels"
    wheels.mkdir()
    _wheel(wheels, "eclipse_zenoh", "1.10.2")
    shutil.copytree(ROOT / "bench" / "peers", folder / "bench" / "peers")
    shutil.copy(ROOT / "constraints.txt", folder)
    done = make(folder, "bench-peers", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    assert done.returncode == 0, done.stderr
    missing = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("no ")}
    assert missing - {"ray"} == {"iceoryx2", "vllm"}  # a developer's .venv may have Ray
    there = [path.name for path in (folder / ".venv-peers").glob("lib/python*/site-packages/*.dist-info")]
    assert there == ["eclipse_zenoh-1.10.2.dist-info"]
    assert not (folder / ".venv-peers" / "installed").exists(), "the next time tries the others again"


def _wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
