"""One death each: of a reader, of a writer, of who hands on, of all at once; and those who only sleep."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shm
import transport
from tests.crash.harness import (
    CAST,
    SCRIPT,
    WAIT,
    Kill,
    Report,
    Stage,
    Steps,
    config,
    digest,
    finish,
    folder,
    others_sleep,
    pattern,
    perform,
    play_peer,
    running,
    segments_of,
    start,
    unlocked,
    until,
)
from tests.crash.plays import play
from tests.forks import raw_fork
from transport import Full, PeerGone, ProtocolError, Timeout
from transport.message import Goodbye

_PR_SET_CHILD_SUBREAPER = 36

DEATHS = {
    "a reader in the middle of open": ("worker", Kill("ring.opening", 6)),
    "a reader with handles in flight": ("worker", Kill("receive.arrived", 9)),
    "a reader with leases open": ("worker", Kill("receive.opened", 9)),
    "a writer in reserve": ("front", Kill("ring.reserve", 12)),
    "a writer between commit and send": ("front", Kill("send.put", 12)),
    "a writer after send": ("front", Kill("send.posted", 12)),
    "a writer in the middle of reclaim": ("front", Kill("ring.closing", 2)),
    "who hands on before it is opened": ("worker", Kill("send.posted", 4)),
    "whom it was handed on to": ("next", Kill("ring.opening", 2)),
}


@pytest.mark.parametrize("death", DEATHS)
def test_killed(death: str) -> None:
    """The living end their links with the dead and go on, whoever comes back joins under its name."""
    role, kill = DEATHS[death]
    outcome = play(role, kill)
    assert outcome.killed
    assert outcome.restarted
    assert outcome.wrong == []
    assert set(outcome.noticed(role)) == {*CAST} - {role}
    for name in CAST:
        assert len(outcome.reports[name]) == 1
    answered = outcome.reports["front"][0]["answered"]
    assert answered >= sum(len(job.by) for job in SCRIPT)
    assert outcome.leaked() == []


def listen_late(stage: Stage) -> None:
    """A front that starts when a peer has been trying for a while."""
    time.sleep(0.7)
    with transport.listen(stage.address("front"), config=config()) as front:
        front.wait_for_peers({"peer"}, timeout=WAIT)
        front.send("welcome", to="peer")


def test_whoever_starts_first_finds_the_other_later() -> None:
    """One call of `connect` goes on trying, though there is not even a socket at first."""
    with folder() as path, running(listen_late, stage := Stage(path)):
        address = stage.address("front")
        with transport.connect(address, name="peer", config=config(), timeout=WAIT) as peer:
            assert peer.receive(timeout=WAIT).body == "welcome"


# ------------------------------------------------------------------------------------ half a copy


def tear(stage: Stage) -> None:
    """A writer whose second message ends it half-way through the copy: the second half is not there."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path = stage.path / "torn"
    path.write_bytes(bytes(256 << 10))
    with path.open("r+b") as file:
        torn = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    os.truncate(path, 128 << 10)
    with transport.listen(stage.address("front"), config=config()) as front:
        front.wait_for_peers({"reader"}, timeout=WAIT)
        front.send({"bytes": pattern(1, 100_000)}, to="reader")
        front.receive(timeout=WAIT)
        front.send({"bytes": torn}, to="reader")


def test_a_writer_dead_half_way_through_the_copy() -> None:
    """What is half there is never handed out, and what was open stays."""
    with folder() as path, running(tear, stage := Stage(path)) as writer:
        with transport.connect(stage.address("front"), name="reader", config=config()) as reader:
            held = reader.receive(timeout=WAIT).body["bytes"]
            segments = segments_of({writer.pid or 0})
            reader.send({"go": "on"})
            with pytest.raises(PeerGone, match="front"):
                reader.receive(timeout=WAIT)
            assert digest(held) == digest(pattern(1, 100_000))
        writer.join(WAIT)
        assert writer.exitcode == -signal.SIGBUS
        assert shm.describe(segments[0]).live == 2  # the half one, too
        until(lambda: shm.sweep() == segments, "the dead writer's ring is swept")
        assert digest(held) == digest(pattern(1, 100_000))


# ------------------------------------------------------------------------------------ all at once


def have_a_ring(path: str) -> None:
    """A process that has a ring, and nobody to send to."""
    with (
        transport.listen(f"ipc://{path}", config=config()) as endpoint,
        endpoint.loan((100_000,), np.dtype(np.uint8)),
    ):
        signal.pause()


class Waiting(Steps):
    """A trace that waits to be killed once there is a record in the ring."""

    def __call__(self, event: str, now: int, fields: Mapping[str, object]) -> None:
        super().__call__(event, now, fields)
        if event == "ring.commit":
            signal.pause()


def wait_with_a_ring(stage: Stage, report: Report) -> None:
    """A worker that never answers out of its ring: the play goes on until its end."""
    report.steps = Waiting()
    play_peer("worker", stage, report)


def perform_in_group(name: str, stage: Stage, group: int) -> None:
    """A role of the play in the process group of the front, as in a container."""
    os.setpgid(0, group)
    perform(name, wait_with_a_ring if name == "worker" else CAST[name], stage)


def test_a_whole_process_group_killed_like_a_container() -> None:
    """The next start under the same addresses finds the place free, and removes what was left."""
    with folder() as path:
        stage = Stage(path)
        front = start(perform_in_group, "front", stage, 0)
        group = front.pid or 0
        until(lambda: os.getpgid(group) == group, "the front has a group of its own")
        cast = [front, *(start(perform_in_group, role, stage, group) for role in ("worker", "next"))]
        pids = {process.pid or 0 for process in cast}
        try:
            until(lambda: len(segments_of(pids)) == 2, "front and worker have made their rings")
            os.killpg(group, signal.SIGKILL)
            for process in cast:
                process.join(WAIT)
                assert process.exitcode == -signal.SIGKILL
        finally:
            for process in cast:
                finish(process)
        assert len(segments_of(pids)) == 2
        unlocked(pids)
        again = [start(perform, name, role, stage) for name, role in CAST.items()]
        try:
            until(lambda: stage.done, "the next start works")
        finally:
            stage.end()
            for process in again:
                process.join(WAIT)
                finish(process)
        assert segments_of(pids) == []
        assert [text for role in CAST for report in stage.reports(role) for text in report["wrong"]] == []


@pytest.mark.parametrize("backend", ["inline", "frames", "auto"])
def test_a_start_that_makes_no_ring_removes_those_of_the_dead(backend: str) -> None:
    with folder() as path, running(have_a_ring, str(path / "other.sock")) as owner:
        until(lambda: segments_of({owner.pid or 0}), "it has made its ring")
        owner.kill()
        owner.join(WAIT)
        assert segments_of({owner.pid or 0})
        unlocked({owner.pid or 0})
        with transport.listen(Stage(path).address("front"), config=config(backend=backend)):
            assert not segments_of({owner.pid or 0})


# ------------------------------------------------------------------------------------ failed sends


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage collector: what goes at once must not wait for it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("others", [(), ("nobody",)], ids=["to one", "to several"])
@pytest.mark.parametrize("backend", ["shm", "auto"])
def test_a_failed_send_gives_its_loan_back_at_once(backend: str, others: tuple[str, ...]) -> None:
    """Neither the error of a dead peer nor that of a full ring keeps what was to be sent."""
    settings = config(backend=backend, detour_bytes=1 << 16, detour_after=0.0)
    with folder() as path, transport.listen(Stage(path).address("front"), config=settings) as front:
        with running(answer, front.addresses[0], "peer") as peer:
            front.wait_for_peers({"peer"}, timeout=WAIT)
            assert ask(front, "peer", 1)
            assert peer.pid
            os.kill(peer.pid, signal.SIGSTOP)
            try:
                while fits(front):
                    continue
                full = front.statistics()["backend"]
                with pytest.raises((Full, PeerGone)):
                    send_loan(front, ["peer", *others])
                assert live(front.statistics()["backend"]) == live(full)
            finally:
                os.kill(peer.pid, signal.SIGCONT)
            peer.kill()
            until(lambda: "peer" in front.statistics()["left"], "the dead is named")
        until(lambda: not live(front.statistics()["backend"]), "the space of the dead comes back")
        with pytest.raises(PeerGone):
            send_loan(front, ["peer", *others])
        assert live(front.statistics()["backend"]) == 0


def send_loan(front: transport.Endpoint, to: list[str]) -> None:
    with front.loan((70_000,), np.uint8, timeout=0) as out:
        front.try_send({"id": 0, "bytes": out}, to=to)


def fits(front: transport.Endpoint) -> bool:
    try:
        send_loan(front, ["peer"])
    except Full:
        return False
    return True


def live(backend: dict[str, Any]) -> int:
    """How many records the ring holds."""
    return int(backend.get("shm", backend)["ring"].live)


# ------------------------------------------------------------------------------------ slow is not dead


def answer(address: str, name: str) -> None:
    """Send back the number and the digest of whatever comes, until the front is gone."""
    with transport.connect(address, name=name, config=config(), timeout=WAIT) as endpoint:
        while True:
            try:
                message = endpoint.receive(timeout=WAIT)
            except PeerGone:
                return
            except Timeout:  # it was stopped for longer than that
                continue
            reply = {"id": message.body["id"], "digest": digest(message.body["bytes"])}
            del message
            endpoint.send(reply, to="front")


@pytest.mark.parametrize(
    "seconds", [pytest.param(2.0, id="seconds"), pytest.param(60.0, id="a minute", marks=pytest.mark.stress)]
)
def test_a_stopped_reader_is_slow_and_not_dead(seconds: float) -> None:
    """Its part of the ring fills up, the others are served meanwhile, and it finds everything afterwards."""
    with folder() as path, listening(path) as front:
        address = front.addresses[0]
        with running(answer, address, "slow") as slow, running(answer, address, "quick"):
            front.wait_for_peers({"slow", "quick"}, timeout=WAIT)
            for name in ("slow", "quick"):
                assert ask(front, name, 0)
            assert slow.pid
            os.kill(slow.pid, signal.SIGSTOP)
            sent, served, full = 0, 0, 0
            reasons: dict[str, str] = {}
            end = time.monotonic() + seconds
            while time.monotonic() < end or served < 20 or not full:
                try:
                    front.try_send({"id": sent + 1, "bytes": pattern(sent + 1, 100_000)}, to="slow")
                    sent += 1
                except Full as error:
                    reasons.update(error.failed)
                    full += 1
                served += ask(front, "quick", 1000 + served)
                time.sleep(0.01)
            assert {peer.name for peer in front.peers} == {"slow", "quick"}
            assert front.statistics()["left"] == {}
            assert set(reasons) == {"slow"}
            assert "has not acknowledged" in reasons["slow"]
            os.kill(slow.pid, signal.SIGCONT)
            for number in range(1, sent + 1):
                assert right(front.receive(timeout=WAIT), "slow", number)
            assert ask(front, "slow", sent + 1)


def listening(path: Path) -> transport.Endpoint:
    return transport.listen(Stage(path).address("front"), config=config())


def ask(front: transport.Endpoint, name: str, number: int) -> bool:
    """Whether that peer has the right bytes of a message."""
    front.send({"id": number, "bytes": pattern(number, 100_000)}, to=name)
    return right(front.receive(timeout=WAIT), name, number)


def right(message: transport.Message, name: str, number: int) -> bool:
    expected = {"id": number, "digest": digest(pattern(number, 100_000))}
    assert (message.sender, message.body) == (name, expected)
    return True


# ------------------------------------------------------------------------------------ links that end


def meanwhile(other: transport.Endpoint, call: Callable[[], object]) -> None:
    """Make a call that needs an answer of another endpoint of this process."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(call)
        until(lambda: other.statistics() and done.done(), "the call returns")
        done.result()


def test_a_peer_that_comes_back_while_it_has_messages_of_its_old_link() -> None:
    """The end of the old link, once the last of them is taken, leaves the ring mapped for the new one."""
    with folder() as path, listening(path) as front, transport.Endpoint("peer", config()) as peer:
        meanwhile(front, lambda: peer.connect(front.addresses[0]))
        meanwhile(peer, lambda: front.send(pattern(1, 50_000), to="peer"))
        front.send(pattern(2, 50_000), to="peer")
        link = front._exchange.roster.named("peer")
        assert link is not None
        link.tell(Goodbye(link.peer.link, "for a test"))
        front._exchange._finish(link, "for a test")
        until(lambda: "front" in peer.statistics()["left"], "the link has ended")
        meanwhile(front, lambda: peer.connect(front.addresses[0]))
        meanwhile(peer, lambda: front.send(pattern(3, 50_000), to="peer"))
        queue = peer._exchange.receiver.queue
        until(lambda: peer.statistics() and len(queue) == 3, "the third message is there")
        for _ in range(2):  # the writer took their records back when the link ended
            with pytest.raises(ProtocolError, match="stale"):
                peer.receive(timeout=WAIT)
        assert np.array_equal(peer.receive(timeout=WAIT).body, pattern(3, 50_000))


# ------------------------------------------------------------------------------------ children


@contextmanager
def adopting() -> Iterator[None]:
    """Children whose parent dies become this process's, which can wait for them then."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def lasting_fork() -> int:
    """A forked child that inherits all and only sleeps; its pid, once it has done what a fork has it do."""
    forked, tell = os.pipe()
    child = os.fork()
    if not child:
        os.write(tell, b"!")
        signal.pause()
    assert os.read(forked, 1) == b"!"
    os.close(forked)
    os.close(tell)
    return child


def lasting_c_fork() -> int:
    """The same, forked by C code: none of Python's hooks runs."""
    child = raw_fork()
    if not child:
        signal.pause()
    return child


def lasting_program() -> int:
    """Another program, which inherits every descriptor that is not marked otherwise; its pid."""
    # Deliberately not waited for: its parent dies first.
    return subprocess.Popen(["sleep", "600"], close_fds=False).pid


CHILDREN = {"fork": lasting_fork, "fork from C": lasting_c_fork, "a program": lasting_program}


def answer_with_child(address: str, name: str, note: Path, kind: str, backend: str = "shm") -> None:
    """As `answer`, but everything is kept, and from the second message on there is a child."""
    held = []
    settings = config(backend=backend)
    with transport.connect(address, name=name, config=settings, timeout=WAIT) as endpoint:
        while True:
            try:
                message = endpoint.receive(timeout=WAIT)
            except PeerGone:
                return
            held.append(message)
            if len(held) == 2:
                note.write_text(str(CHILDREN[kind]()))
            reply = {"id": message.body["id"], "digest": digest(message.body["bytes"])}
            endpoint.send(reply, to="front")


@pytest.mark.parametrize("kind", CHILDREN)
def test_a_process_whose_child_lives_on(kind: str) -> None:
    """The child may have its connection, but none of its locks: the dead is named, its space comes back."""
    with folder() as path, adopting(), listening(path) as front:
        note = path / "child"
        with running(answer_with_child, front.addresses[0], "peer", note, kind) as peer:
            front.wait_for_peers({"peer"}, timeout=WAIT)
            assert ask(front, "peer", 1)
            assert ask(front, "peer", 2)
            child = int(note.read_text())
            try:
                assert front.statistics()["backend"]["ring"].live == 2
                peer.kill()
                until(lambda: "peer" in front.statistics()["left"], "the dead is named")
                until(lambda: not front.statistics()["backend"]["ring"].live, "its space comes back")
                peer.join(WAIT)  # only then is its child ours to wait for
                os.kill(child, 0)  # it lives
            finally:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


@pytest.mark.parametrize("address", ["ipc", "tcp"])
@pytest.mark.parametrize("kind", CHILDREN)
def test_without_a_lock_a_process_whose_child_lives_on(kind: str, address: str) -> None:
    """No ring, so no lock to ask: the end of the connection tells, or /proc where a child kept that."""
    settings = config(backend="frames")
    with folder() as path, adopting():
        where = Stage(path).address("front") if address == "ipc" else "tcp://127.0.0.1:0"
        with transport.listen(where, config=settings) as front:
            arguments = front.addresses[0], "peer", path / "child", kind, "frames"
            with running(answer_with_child, *arguments) as peer:
                front.wait_for_peers({"peer"}, timeout=WAIT)
                assert ask(front, "peer", 1)
                assert ask(front, "peer", 2)
                assert ask(front, "peer", 3)  # the parent's connection is whole
                child = int((path / "child").read_text())
                try:
                    peer.kill()
                    until(lambda: "peer" in front.statistics()["left"], "the dead is named")
                    peer.join(WAIT)  # only then is its child ours to wait for
                    os.kill(child, 0)  # it lives
                finally:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)


def send_many_with_child(address: str, note: Path, messages: int, backend: str) -> None:
    """Sends at once what its peer takes its time for, has a child that keeps the connection, and waits."""
    settings = config(backend=backend, max_queued_messages=messages)
    with transport.connect(address, name="peer", config=settings, timeout=WAIT) as endpoint:
        child = lasting_c_fork()
        if backend == "shm":  # so that there is a lock to ask, too
            endpoint.receive(timeout=WAIT)
        for number in range(messages):
            endpoint.send({"number": number}, to="front")
        until(others_sleep, "the kernel, which alone keeps it, has all of it")
        note.write_text(str(child))
        signal.pause()


@pytest.mark.parametrize("backend", ["inline", "shm"])
def test_what_had_come_of_the_dead_is_received_though_a_child_keeps_the_connection(backend: str) -> None:
    """zmq reads on only as it is emptied: a peer is given up when nothing more comes."""
    messages = 250  # twice as many as zmq reads ahead, and no more than the kernel takes
    settings = config(backend=backend, max_queued_messages=messages)
    with (
        folder() as path,
        adopting(),
        transport.listen(Stage(path).address("front"), config=settings) as front,
    ):
        note = path / "child"
        with running(send_many_with_child, front.addresses[0], note, messages, backend) as peer:
            front.wait_for_peers({"peer"}, timeout=WAIT)
            if backend == "shm":
                front.send({"bytes": pattern(1, 100_000)}, to="peer")
            until(lambda: note.exists() and note.read_text(), "all is sent")
            child = int(note.read_text())
            try:
                peer.kill()
                peer.join(WAIT)
                came: list[int] = []
                while len(came) < messages:
                    came.append(front.receive(timeout=WAIT).body["number"])
                    if not len(came) % 50:
                        time.sleep(0.4)  # for others, this endpoint is busy
                assert came == list(range(messages))
                until(lambda: "died" in front.statistics()["left"].get("peer", ""), "the dead is named")
            finally:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def send_many(address: str, note: Path, messages: int) -> None:
    """Sends numbers, says that it is done, and waits for its end."""
    settings = config(backend="inline", max_queued_messages=messages)
    with transport.connect(address, name="peer", config=settings, timeout=WAIT) as endpoint:
        for number in range(messages):
            endpoint.send({"number": number}, to="front")
        until(others_sleep, "the kernel, which alone keeps it, has all of it")
        note.touch()
        signal.pause()


def test_what_had_come_of_the_dead_is_received_though_its_successor_greets() -> None:
    """The front is busy while one dies and the next of its name greets: what the first sent comes first."""
    messages = 100  # zmq reads no more of a connection that ended
    settings = config(backend="inline", max_queued_messages=messages)
    with folder() as path, transport.listen(Stage(path).address("front"), config=settings) as front:
        notes = path / "first", path / "second"
        with running(send_many, front.addresses[0], notes[0], messages) as first:
            front.wait_for_peers({"peer"}, timeout=WAIT)
            until(notes[0].exists, "all is sent")
            first.kill()
            first.join(WAIT)
        with running(send_many, front.addresses[0], notes[1], messages) as second:
            time.sleep(1.0)  # it has greeted, as far as can be told without looking
            came = [front.receive(timeout=WAIT).body["number"] for _ in range(2 * messages)]
            assert came == 2 * list(range(messages))
            assert [peer.pid for peer in front.peers] == [second.pid]


def listen_with_child(address: str, listens: Path, note: Path) -> None:
    """A listener that says where it listens, has a child and then waits to be killed."""
    with transport.listen(address, config=config()) as endpoint:
        listens.write_text(endpoint.addresses[0])
        endpoint.wait_for_peers({"peer"}, timeout=WAIT)
        note.write_text(str(lasting_fork()))
        endpoint.receive(timeout=WAIT)


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_the_address_of_a_listener_whose_child_lives_on(scheme: str) -> None:
    """Its successor listens there at once: the child has closed the socket."""
    with folder() as path, adopting():
        listens, note = path / "listens", path / "child"
        where = Stage(path).address("front") if scheme == "ipc" else "tcp://127.0.0.1:0"
        with running(listen_with_child, where, listens, note) as listener:
            until(lambda: listens.exists() and listens.read_text(), "it listens")
            address = listens.read_text()
            with transport.connect(address, name="peer", config=config(), timeout=WAIT) as peer:
                until(lambda: note.exists() and note.read_text(), "there is a child")
                child = int(note.read_text())
                try:
                    listener.kill()
                    with pytest.raises(PeerGone):
                        peer.receive(timeout=WAIT)
                    listener.join(WAIT)  # the kernel closes one socket after the other
                    with transport.listen(address, config=config()) as successor:
                        assert successor.addresses == [address]
                    os.kill(child, 0)  # it lives
                finally:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)


def test_a_forked_child_killed_takes_nothing_along() -> None:
    """Its parent goes on with its link, its leases and its locks."""
    with folder() as path, listening(path) as front:
        note = path / "child"
        with running(answer_with_child, front.addresses[0], "peer", note, "fork"):
            front.wait_for_peers({"peer"}, timeout=WAIT)
            assert ask(front, "peer", 1)
            assert ask(front, "peer", 2)
            os.kill(int(note.read_text()), signal.SIGKILL)
            assert ask(front, "peer", 3)
            with pytest.raises(Timeout):
                front.receive(timeout=0.7)  # as long as it takes to look at locks and connections
            assert [peer.name for peer in front.peers] == ["peer"]
            assert front.statistics()["backend"]["ring"].live == 3
            assert ask(front, "peer", 4)
