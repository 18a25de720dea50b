"""What bulk connections could be made of: a plain socket, several beside each other, zmq with recv_into."""

from __future__ import annotations

import contextlib
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import zmq

from bench import cable, payload
from bench.harness import Result, Row, numbers
from bench.part import Report, WrongAnswerError
from bench.report import FAILED, Benchmark, Grid, figure

MIB = 1 << 20
TIMEOUT = 60.0
WAYS = ("plain", "2 connections", "4 connections", "zmq recv_into")
SIZES = {16 * MIB: 8, 64 * MIB: 4, 256 * MIB: 2}  # size → timed messages in a round
PIECE = MIB
_WARM = 2

METHOD = f"""\
Near sends so many bytes out of one array, far takes them into a pre-faulted one, checks their stamp and
answers with a byte. In each process pair a plain socket (sendall, recv_into) and the column's way take turns
in random order. Several connections: pieces of {PIECE // MIB} MiB dealt to them in turn, a thread for each on
both sides. zmq: PAIR over tcp, messages of {PIECE // MIB} MiB, sent with copy=False, taken with recv_into.
{_WARM} untimed messages of each size go first. Nothing is checked, granted or put into a ring: what each way
costs by itself. GB/s, and times the plain socket's time of the same pair; median [lowest..highest round]."""

Move = Callable[[memoryview], object]


def _turns(plan: Sequence[Sequence[int]]) -> list[tuple[int, str, bool]]:
    """(size, kind, timed), in an order that both ends know."""
    turns = []
    for nbytes, messages in plan:
        draw = random.Random(nbytes)
        turns += [(nbytes, kind, False) for kind in ("plain", "way")] * _WARM
        for _ in range(messages):
            turns += [(nbytes, kind, True) for kind in draw.sample(("plain", "way"), 2)]
    return turns


def _largest(plan: Sequence[Sequence[int]]) -> int:
    return max(nbytes for nbytes, _ in plan)


def near(folder: Path, *, column: str, plan: Sequence[Sequence[int]]) -> Report:
    """The sending end: seconds of every turn, by kind and size."""
    words = payload.pages(_largest(plan))
    payload.fill(words, 1)
    times: dict[str, list[float]] = {}
    turns = _turns(plan)
    with _servers(folder, column) as sockets, _zmq(folder, column, bind=True) as pair:
        ways: dict[str, Move] = {"plain": sockets[0].sendall, "way": _sender(column, sockets, pair)}
        for number, (nbytes, kind, timed) in enumerate(turns):
            part = words[: nbytes // 8]
            payload.stamp(part, number)
            start = time.perf_counter()
            ways[kind](part.data.cast("B"))
            if sockets[0].recv(1) != b"x":
                raise WrongAnswerError("the far end is gone")
            if timed:
                times.setdefault(f"{kind} {nbytes}", []).append(time.perf_counter() - start)
    return Report(values=dict(times), expected=len(turns))


def far(folder: Path, *, column: str, plan: Sequence[Sequence[int]]) -> Report:
    """The receiving end: takes, checks and answers every turn."""
    words = payload.pages(_largest(plan))
    turns = _turns(plan)
    with _clients(folder, column) as sockets, _zmq(folder, column, bind=False) as pair:
        ways: dict[str, Move] = {"plain": _taker(sockets[0]), "way": _receiver(column, sockets, pair)}
        for number, (nbytes, kind, _) in enumerate(turns):
            part = words[: nbytes // 8]
            ways[kind](part.data.cast("B"))
            payload.check_stamp(part, number)
            sockets[0].sendall(b"x")
    return Report(verified=len(turns))


def _pieces(data: memoryview) -> list[memoryview]:
    return [data[start : start + PIECE] for start in range(0, data.nbytes, PIECE)]


def _sender(column: str, sockets: Sequence[socket.socket], pair: zmq.Socket[bytes]) -> Move:
    if column.startswith("zmq"):
        return lambda data: [pair.send(piece, copy=False) for piece in _pieces(data)]
    return _shared(sockets, [one.sendall for one in sockets])


def _receiver(column: str, sockets: Sequence[socket.socket], pair: zmq.Socket[bytes]) -> Move:
    if column.startswith("zmq"):
        return lambda data: [pair.recv_into(piece) for piece in _pieces(data)]
    return _shared(sockets, [_taker(one) for one in sockets])


def _shared(sockets: Sequence[socket.socket], moves: Sequence[Move]) -> Move:
    """Pieces dealt to the sockets in turn, each in a thread of its own."""
    if len(sockets) == 1:
        return moves[0]

    def some(move: Move, pieces: Sequence[memoryview]) -> None:
        for piece in pieces:
            move(piece)

    def everything(data: memoryview) -> None:
        pieces = _pieces(data)
        threads = [
            threading.Thread(target=some, args=(move, pieces[number :: len(moves)]))
            for number, move in enumerate(moves)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return everything


def _taker(one: socket.socket) -> Move:
    def take(into: memoryview) -> None:
        filled = 0
        while filled < into.nbytes:
            came = one.recv_into(into[filled:])
            if not came:
                raise WrongAnswerError("the near end is gone")
            filled += came

    return take


def _count(column: str) -> int:
    return int(column.partition(" ")[0]) if column.endswith("connections") else 1


@contextlib.contextmanager
def _servers(folder: Path, column: str) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(TIMEOUT)
        cable.leave(folder / "port", str(server.getsockname()[1]))
        sockets = [stack.enter_context(server.accept()[0]) for _ in range(_count(column))]
        yield [_prepared(one) for one in sockets]


@contextlib.contextmanager
def _clients(folder: Path, column: str) -> Iterator[list[socket.socket]]:
    address = ("127.0.0.1", int(cable.wait_for(folder / "port")))
    with contextlib.ExitStack() as stack:
        yield [
            _prepared(stack.enter_context(socket.create_connection(address))) for _ in range(_count(column))
        ]


def _prepared(one: socket.socket) -> socket.socket:
    one.settimeout(TIMEOUT)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one


@contextlib.contextmanager
def _zmq(folder: Path, column: str, *, bind: bool) -> Iterator[zmq.Socket[bytes]]:
    """A pair over tcp; unused where the column is another."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as pair:
        pair.linger = 0
        pair.rcvtimeo = pair.sndtimeo = int(TIMEOUT * 1000)
        if column.startswith("zmq") and bind:
            port = pair.bind_to_random_port("tcp://127.0.0.1")
            cable.leave(folder / "zmq", str(port))
        elif column.startswith("zmq"):
            pair.connect(f"tcp://127.0.0.1:{cable.wait_for(folder / 'zmq')}")
        yield pair


def _rows(quick: bool) -> list[Row]:
    parts = {end: f"bench.sockets:{end}" for end in ("near", "far")}
    plan = [list(item) for item in list(SIZES.items())[: 1 if quick else None]]
    return [Row(name=way, parts=parts, arguments={"column": way, "plan": plan}) for way in WAYS]


def _cells(result: Result, nbytes: int) -> list[str]:
    if result.failure is not None:
        return [FAILED, FAILED]

    def median(kind: str, values: dict[str, object]) -> float:
        return statistics.median(numbers(values[f"{kind} {nbytes}"]))  # type: ignore[arg-type]

    rate = result.spread(lambda values: nbytes / median("way", dict(values)) / 1e9)
    ratio = result.spread(lambda values: median("way", dict(values)) / median("plain", dict(values)))
    return [figure(rate), figure(ratio)]


def _show(results: Sequence[Result]) -> list[Grid]:
    plan = results[0].row.arguments["plan"] if results else []
    assert isinstance(plan, list)
    grids = []
    for nbytes, _ in plan:
        rows = [[result.row.name, *_cells(result, nbytes)] for result in results]
        columns = ["", "GB/s", "x plain"]
        grids.append(Grid(title=f"loopback, {nbytes // MIB} MiB", columns=columns, rows=rows))
    return grids


BENCHMARK = Benchmark(
    title="what carries bulk bytes between hosts: a plain socket, 2 and 4 of them, zmq with recv_into",
    method=METHOD,
    rows=_rows,
    show=_show,
)
