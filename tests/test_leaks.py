"""The check on what tests leave behind sees each kind of thing, and nothing that isn't the test's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import leaks

ROOT = Path(__file__).parent.parent

SLEEPS = "while not any((p.name, p.state) == ('sleep', 'S') for p in leaks._tree()): pass"

# What a test does, and how the check names it.
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
    "a_child": (f"kept.append(subprocess.Popen(['sleep', '60']))\n    {SLEEPS}", "(sleep, state S)"),
    "a_zombie": (
        "kept.append(child := subprocess.Popen(['true']))\n"
        "    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)",
        "(true, zombie, nobody waited for it)",
    ),
    "an_orphan": (
        f"subprocess.run(['sh', '-c', 'sleep 60 >/dev/null 2>&1 &'], check=True)\n    {SLEEPS}",
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


def test_sees_each_kind_of_thing_and_judges_no_other_test_for_it(tmp_path: Path) -> None:
    body = "from tests import leaks\n"
    for case, (leaves, expected) in LEAVES.items():
        # What is meant to stay doesn't go away by waiting, so that there is no use in waiting long for it.
        settle = 0.2 if expected else leaks.SETTLE_SECONDS
        body += f"def test_{case}():\n    leaks.SETTLE_SECONDS = {settle}\n    {leaves}\n"
        body += f"def test_after_{case}(): pass\n"
    output = run_inner(tmp_path, body)
    _, *errors = re.split(r"_ ERROR at teardown of test_(\w+) _", output.partition("short test summary")[0])
    seen = dict(zip(errors[::2], errors[1::2], strict=True))
    assert list(seen) == [case for case, (_, expected) in LEAVES.items() if expected]
    for case, text in seen.items():
        assert "left behind:" in text
        assert LEAVES[case][1] in text
    assert f"{2 * len(LEAVES)} passed, {len(seen)} errors" in output


def test_a_failed_test_is_not_judged_for_what_its_traceback_holds(tmp_path: Path) -> None:
    body = "def test_first():\n    file = open('/dev/zero')\n    assert file is None\n"
    output = run_inner(tmp_path, body, "-W", "ignore::ResourceWarning")
    assert "1 failed in" in output
    assert "left behind" not in output


def test_workers_are_not_charged_for_each_other(tmp_path: Path, prefix: Sequence[str]) -> None:
    """Each of two workers makes and removes segments all the time while the other is looked at.

    One leaves a segment that nobody maps: where they share /dev/shm, it is seen at the end.
    """
    body = (
        "from tests import leaks\n"
        "def test_first():\n"
        "    leaks.SETTLE_SECONDS = 0.2\n"
        "    Path('/dev/shm/tensorferry.orphan').write_bytes(b'x')\n"
        "@pytest.mark.parametrize('n', range(40))\n"
        "def test_one(n):\n"
        "    path = Path(f'/dev/shm/tensorferry.{os.getpid()}')\n"
        "    with path.open('wb+') as file:\n"
        "        file.truncate(4096)\n"
        "        with mmap.mmap(file.fileno(), 4096):\n"
        "            subprocess.run(['sleep', '0.01'], check=True)\n"
        "            path.unlink()\n"
    )
    output = run_inner(tmp_path, body, "-n", "2", prefix=prefix)
    (leaks.SHARED_MEMORY / "tensorferry.orphan").unlink(missing_ok=True)
    assert ("41 passed in" if prefix else "41 passed, 1 error in") in output
    assert ("left behind by some test" if prefix else "ERROR at teardown of test_first") in output
    assert "segment /dev/shm/tensorferry.orphan" in output


def test_settings_of_the_developer_do_not_reach_a_test() -> None:
    assert not [name for name in os.environ if name.startswith("TENSORFERRY_")]


def test_an_address_fits_a_unix_socket(address: str) -> None:
    assert len(os.fsencode(address.removeprefix("ipc://"))) <= 107
