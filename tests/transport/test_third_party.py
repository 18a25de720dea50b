"""A third party's backend: installed as its users would, found by entry point, run through the suite."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "file_backend"

_SHOW = """
from transport import TransportConfig, registry
inbounds = registry.inbounds(TransportConfig())
print(registry.names()[-1], registry.load("file").outbound.__module__, sorted(inbounds))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the example installed beside tensorferry."""
    folder = tmp_path_factory.mktemp("third-party")
    source, target = folder / "source", folder / "target"
    shutil.copytree(EXAMPLE, source)  # building leaves things behind
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, source], check=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (target, ROOT)))}


def test_it_is_found_by_its_entry_point_and_loaded_when_named(installed: dict[str, str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", _SHOW], env=installed, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split(maxsplit=2) == [
        "file",
        "tensorferry_file_backend",
        "['cuda', 'frames', 'inline', 'shm', 'tcp']\n",
    ]


def test_it_passes_the_conformance_suite(installed: dict[str, str], tmp_path: Path, short_path: Path) -> None:
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")  # out of reach of our own conftest.py and settings
    done = run_pytest({**installed, "TMPDIR": str(short_path)}, tmp_path, "tests")
    assert done.returncode == 0, done.stdout[-8000:]
    assert "passed" in done.stdout
    assert not list(short_path.glob("tensorferry-file-*"))


def test_the_example_in_the_documentation_passes_as_well(installed: dict[str, str], tmp_path: Path) -> None:
    text = (ROOT / "docs" / "writing-a-backend.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "zlib:" in block)
    (tmp_path / "zlib_backend.py").write_text(example)
    package = tmp_path / "zlib_example-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: zlib-example\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[tensorferry.backends]\nzlib = zlib_backend\n")
    suite = "from transport.conformance import BackendConformance\n\n\n"
    suite += "class TestZlib(BackendConformance):\n    backend = 'zlib'\n"
    (tmp_path / "test_zlib.py").write_text(suite)
    path = os.pathsep.join([str(tmp_path), installed["PYTHONPATH"]])
    some = "put or hostile or dtype or source"
    done = run_pytest({**installed, "PYTHONPATH": path}, tmp_path, "test_zlib.py", "-k", some)
    assert done.returncode == 0, done.stdout[-8000:]


def run_pytest(
    environment: dict[str, str], folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
