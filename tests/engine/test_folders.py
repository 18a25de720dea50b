"""Private folders: the living keep theirs whatever sweeps, the dead lose theirs, all else is not touched."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from engine import folders
from engine.errors import StartError
from engine.folders import PrivateFolder
from tests.engine.processes import python, ran

# Makes a folder, fills it as a front end does, says where it is, and waits to be killed.
MAKER = """
import os, signal, subprocess, sys
from engine.folders import PrivateFolder
folder = PrivateFolder()
for name in ("front.sock", "config.toml", "rank0.0.meeting"):
    (folder.path / name).touch()
child = 0
if sys.argv[1:] == ["forks"]:
    if os.fork():
        signal.pause()
    child = os.getpid()
elif sys.argv[1:] == ["starts"]:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], close_fds=False).pid
print(folder.path, child, flush=True)
signal.pause()
"""

# Sweeps until it is killed; makes a file when it has done so often.
SWEEPER = """
import sys
from pathlib import Path
from engine import folders
while True:
    for _ in range(100):
        folders.sweep()
    Path(sys.argv[1]).touch()
"""


@pytest.fixture
def place(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's folders lie, in its own process and in those that it starts."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    return short_path


@contextmanager
def maker(*does: str) -> Iterator[tuple[subprocess.Popen[str], Path, int]]:
    """A process that has made a folder; its child is killed at the end."""
    with python("-c", MAKER, *does) as process:
        assert process.stdout is not None
        path, child = process.stdout.readline().split()
        try:
            yield process, Path(path), int(child)
        finally:
            if int(child):
                os.kill(int(child), signal.SIGKILL)


def test_a_place_whose_path_is_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "/" + "x" * 100
    monkeypatch.setattr(folders, "_parents", lambda: [place])
    with pytest.raises(StartError, match=rf"\({place}: too long for the path of a socket\); set TMPDIR"):
        PrivateFolder()


def sweep(*options: str) -> str:
    """What the command says."""
    done = ran(["-m", "engine", "sweep", *options], dict(os.environ))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_folder_is_of_its_user_alone_and_goes_with_its_maker(place: Path) -> None:
    folder = PrivateFolder()
    assert folder.path.parent == place
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    (folder.path / "config.toml").write_text("seed = 1")
    folder.close()
    folder.close()
    assert list(place.iterdir()) == []


def test_the_folder_of_a_killed_maker_goes_at_the_next_start_or_sweep(place: Path) -> None:
    for what in ("start", "sweep"):
        with maker() as (process, path, _):
            process.kill()
        assert len(list(path.iterdir())) == 3
        if what == "start":
            with closing(PrivateFolder()) as folder:
                assert list(place.iterdir()) == [folder.path]
        else:
            assert f"would remove {path}\n" in sweep("--dry-run")
            assert path.exists()
            assert f'"{path}"' in sweep("--json")
        assert list(place.iterdir()) == []


def test_a_living_maker_keeps_its_folder_also_while_it_is_stopped(place: Path) -> None:
    with maker() as (process, path, _), closing(PrivateFolder()) as ours:
        process.send_signal(signal.SIGSTOP)
        assert folders.sweep() == []
        assert len(list(path.iterdir())) == 3
        assert ours.path.exists()


@pytest.mark.parametrize("does", ["forks", "starts"])
def test_a_child_does_not_keep_the_lock_of_a_dead_maker(place: Path, does: str) -> None:
    with maker(does) as (process, path, child):
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        assert folders.sweep() == [str(path)]
    assert list(place.iterdir()) == []


def test_a_forked_child_leaves_its_parents_folder_alone(place: Path) -> None:
    with closing(PrivateFolder()) as folder:
        child = os.fork()
        if not child:
            folder.close()
            os._exit(len(folders.sweep()))
        assert os.waitpid(child, 0)[1] == 0
        assert list(place.iterdir()) == [folder.path]


def test_what_only_looks_like_such_a_folder_is_not_touched(place: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    os.chmod(tmp_path, 0o700)
    (place / "tensorferry.linklink").symlink_to(tmp_path)
    (place / "tensorferry.ordinary").touch()
    (place / f"tensorferry-{os.getuid()}").mkdir(0o700)
    (place / "tensorferry.toolong12").mkdir(0o700)
    (place / "tensorferry.open_all").mkdir()
    (place / "tensorferry.open_all").chmod(0o755)
    (place / "tensorferry.deepdeep").mkdir(0o700)
    (place / "tensorferry.deepdeep" / "folder").mkdir()
    before = sorted(place.rglob("*"))
    assert folders.sweep() == []
    assert sorted(place.rglob("*")) == before
    assert (tmp_path / "precious").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user")
def test_the_folder_of_another_user_is_not_touched(place: Path) -> None:
    theirs = place / "tensorferry.theirs00"
    theirs.mkdir(0o700)
    os.chown(theirs, 65534, 65534)
    assert folders.sweep() == []
    assert theirs.exists()


def test_a_folder_that_is_just_being_made_survives_sweeps(place: Path, tmp_path: Path) -> None:
    often, made = tmp_path / "often", 0
    with python("-c", SWEEPER, str(often)) as sweeper:
        while made < 100 or not often.exists():
            assert sweeper.poll() is None
            with closing(PrivateFolder()) as folder:
                (folder.path / "front.sock").touch()
                os.sched_yield()
                assert (folder.path / "front.sock").exists()
            made += 1
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("before", ["open", "flock"])
def test_a_sweep_between_making_and_locking_costs_another_try(
    place: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    module = {"open": os, "flock": fcntl}[before]
    step = getattr(module, before)
    met: list[Path] = []

    def met_by_a_sweep(*given: object) -> object:
        if not met and (made := list(place.iterdir())):
            met.extend(made)
            sweep()
        return step(*given)

    monkeypatch.setattr(module, before, met_by_a_sweep)
    with closing(PrivateFolder()) as folder:
        assert len(met) == 1
        assert list(place.iterdir()) == [folder.path] != met
