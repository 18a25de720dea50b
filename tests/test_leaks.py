"""The check on what tests leave behind sees each kind of thing, and nothing that isn't the test's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import leaks

ROOT = Path(__file__).parent.parent

# What the first of two tests does, and how the check names it.
LEAVES: dict[str, tuple[str, str]] = {
    "a_segment": (
        "Path('/dev/shm/tensorferry.leaked').write_bytes(b'x')",
        "segment /dev/shm/tensorferry.leaked",
    ),
    "a_mapping": (
        "path = Path('/dev/shm/tensorferry.mapped')\n"
        "    path.write_bytes(b'x')\n"
        "    with path.open('rb') as file: kept.append(mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ))\n"
        "    path.unlink()",
        "mapping of tensorferry.mapped in this process",
    ),
    "a_descriptor": ("kept.append(open('/dev/zero'))", "-> /dev/zero"),
    "a_socket": ("kept.append(socket.socket())", "-> socket:["),
    "a_child": ("kept.append(subprocess.Popen(['sleep', '60']))", "(sleep, state S)"),
    "a_zombie": (
        "kept.append(child := subprocess.Popen(['true']))\n"
        "    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)",
        "(true, zombie, nobody waited for it)",
    ),
    "an_orphan": (
        "subprocess.run(['sh', '-c', 'sleep 60 >/dev/null 2>&1 &'], check=True)",
        "(sleep, state S)",
    ),
    "nothing": ("subprocess.run(['true'], check=True)", ""),
    "garbage": (
        "path = Path('/dev/shm/tensorferry.garbage')\n"
        "    path.write_bytes(b'x')\n"
        "    with path.open('rb') as file: loop = [mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ)]\n"
        "    loop.append(loop)\n"
        "    path.unlink()",
        "",
    ),
}


# Without this capability there is no /dev/shm of one's own.
SHARED = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]


def run_inner(folder: Path, body: str, *arguments: str, prefix: Sequence[str] = ()) -> str:
    """The output of pytest over one file of its own, under our conftest."""
    file = folder / "test_inner.py"
    imports = "import mmap, os, socket, subprocess\nfrom pathlib import Path\nimport pytest\nkept = []\n"
    file.write_text(imports + body)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.conftest",
        "--no-header",
    ]
    settings = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(file), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*prefix, *command, *settings],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.fixture(params=["own", "shared"])
def prefix(request: pytest.FixtureRequest) -> Sequence[str]:
    """How to start pytest so that its workers have each their own /dev/shm, or share one."""
    if os.geteuid() != 0:
        pytest.skip("needs root, without which /dev/shm is always shared")
    if request.param == "own":
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv (util-linux)")
    return SHARED


@pytest.mark.parametrize("case", LEAVES)
def test_sees(case: str, tmp_path: Path) -> None:
    body, expected = LEAVES[case]
    # What is meant to stay doesn't go away by waiting, so that there is no use in waiting long for it.
    settle = "from tests import leaks\nleaks.SETTLE_SECONDS = 0.2\n" if expected else ""
    output = run_inner(tmp_path, f"{settle}def test_first():\n    {body}\ndef test_second(): pass\n")
    if expected:
        assert "ERROR at teardown of test_first" in output
        assert "left behind:" in output
        assert expected in output
        assert "2 passed, 1 error" in output, "the next test must not be judged for it"
    else:
        assert "2 passed in" in output


def test_a_failed_test_is_not_judged_for_what_its_traceback_holds(tmp_path: Path) -> None:
    body = "def test_first():\n    file = open('/dev/zero')\n    assert file is None\n"
    output = run_inner(tmp_path, body, "-W", "ignore::ResourceWarning")
    assert "1 failed in" in output
    assert "left behind" not in output


def test_workers_are_not_charged_for_each_other(tmp_path: Path, prefix: Sequence[str]) -> None:
    """Each of two workers makes and removes segments all the time while the other is looked at."""
    body = (
        "@pytest.mark.parametrize('n', range(40))\n"
        "def test_one(n):\n"
        "    path = Path(f'/dev/shm/tensorferry.{os.getpid()}')\n"
        "    with path.open('wb+') as file:\n"
        "        file.truncate(4096)\n"
        "        with mmap.mmap(file.fileno(), 4096):\n"
        "            subprocess.run(['sleep', '0.01'], check=True)\n"
        "            path.unlink()\n"
    )
    assert "40 passed in" in run_inner(tmp_path, body, "-n", "2", prefix=prefix)


def test_a_segment_that_nobody_maps_is_seen_beside_other_workers(
    tmp_path: Path, prefix: Sequence[str]
) -> None:
    body = "def test_first():\n    Path('/dev/shm/tensorferry.orphan').write_bytes(b'x')\n"
    settle = "from tests import leaks\nleaks.SETTLE_SECONDS = 0.2\n"
    output = run_inner(tmp_path, settle + body, "-n", "2", prefix=prefix)
    (leaks.SHARED_MEMORY / "tensorferry.orphan").unlink(missing_ok=True)
    assert ("left behind by some test" if prefix else "ERROR at teardown of test_first") in output
    assert "segment /dev/shm/tensorferry.orphan" in output


def test_settings_of_the_developer_do_not_reach_a_test() -> None:
    assert not [name for name in os.environ if name.startswith("TENSORFERRY_")]


def test_an_address_fits_a_unix_socket(address: str) -> None:
    assert len(os.fsencode(address.removeprefix("ipc://"))) <= 107
