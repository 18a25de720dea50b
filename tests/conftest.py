"""What all tests share: every one leaves /dev/shm, descriptors and processes as it found them, or fails."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import hypothesis
import pytest
import zmq

from tests import leaks

_ISOLATED = pytest.StashKey[bool]()
_START = pytest.StashKey[leaks.Snapshot]()
_FAILED = pytest.StashKey[bool]()

# No deadline: how long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("tensorferry", deadline=None, print_blob=True)
hypothesis.settings.load_profile("tensorferry")


def pytest_configure(config: pytest.Config) -> None:
    leaks.mark_environment()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell ignores it for what it starts in the background, and processes of tests would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [name for name in os.environ if name.startswith("TENSORFERRY_")]:
        del os.environ[name]  # a developer's own settings must not decide what a test sees
    config.stash[_ISOLATED] = leaks.own_shared_memory()
    resource_tracker.ensure_running()  # else the first test that spawns a process is charged for it
    config.stash[_START] = leaks.Snapshot.take()


@pytest.fixture(scope="session", autouse=True)
def zmq_ready() -> None:
    """What pyzmq opens once for the process, at the first message that it sends without a copy."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://once")
        other.connect("inproc://once")
        one.send(bytes(1 << 20), copy=False)
        other.recv()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where workers share one /dev/shm, only their end shows what none of them uses and all of them left."""
    config = session.config
    if _with_workers(config) and not config.stash[_ISOLATED]:
        left = leaks.Snapshot.take().since(config.stash[_START]).of_this_tree(alone=True)
        for name in sorted(left.segments):
            print(f"\nleft behind by some test: segment {leaks.SHARED_MEMORY / name}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        torch.zeros(1, device="cuda")  # what CUDA opens once for the process is not the test's doing
    if item.get_closest_marker("netns") and (os.geteuid() != 0 or shutil.which("ip") is None):
        pytest.skip("needs root and iproute2 (ip) for network namespaces")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests under load did in all, a line each: that they passed says little without it."""
    for category in ("passed", "failed"):
        for report in terminalreporter.getreports(category):
            totals = dict(report.user_properties).get("totals") if report.when == "call" else None
            if totals:
                terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {totals}")


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a segment, a mapping of one, a descriptor or a process, naming what is left.

    A test that failed already is not judged, since its traceback keeps alive what it had open; what it left
    is removed all the same. What a fixture of wider scope made is there before and counts as found.
    """
    isolated = request.config.stash[_ISOLATED]
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    before = leaks.Snapshot.take()
    yield
    failed = request.node.stash.get(_FAILED, False)
    seconds = 0 if failed else leaks.SETTLE_SECONDS
    left = leaks.settled(before, isolated=isolated, alone=alone, seconds=seconds)
    if left.lines():
        leaks.tidy(left, isolated=isolated)
    if left.lines() and not failed:
        pytest.fail("left behind:\n  " + "\n  ".join(left.lines()), pytrace=False)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty folder with a short name, because tmp_path is long and a Unix socket's path has 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="tf-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def address(short_path: Path) -> str:
    """An `ipc://` address that nobody else has."""
    return f"ipc://{short_path}/front.sock"


def _with_workers(config: pytest.Config) -> bool:
    return config.pluginmanager.hasplugin("dsession")  # the side of xdist that starts workers
