"""A head that does what its standard input says; answers are lines of JSON.

`python -m tests.hosts.head FLAGS`, with the flags of `tensorferry run`. `encode N`: N photographs, a line for
each; `peers`; `statistics`; at the end of the input it closes. What it can't is a line with `error`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from typing import Any

import click

from engine import Engine, EngineConfig, EngineError
from engine.images import open_image, sample_photographs
from engine.options import options
from tests.engine.pictures import expected
from tests.hosts.namespaces import Host

MODEL = "tests.engine.models:Checksum"


class Head:
    """The test's side of such a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, word: str) -> Any:
        """The answer to a word with one line."""
        self.tell(word)
        return self.answer()

    def tell(self, word: str) -> None:
        """Say a word; its lines are read by `answer`."""
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        """The next line."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def encode(self, count: int) -> list[dict[str, Any]]:
        """The results of that many photographs."""
        self.tell(f"encode {count}")
        return [self.answer() for _ in range(count)]

    def end(self) -> str:
        """Let it close; what it wrote to its standard error."""
        _, said = self.process.communicate()
        return str(said)


@cache
def sums() -> list[list[float]]:
    return [expected(open_image(path), megapixels=0.05).tolist() for path in sample_photographs()]


def check(results: list[dict[str, Any]]) -> set[str]:
    """Every result has the bytes of its photograph, in order; the ranks that answered."""
    for number, result in enumerate(results):
        assert result["error"] == ""
        assert result["embedding"] == sums()[number % len(sums())]
    return {result["rank"] for result in results}


@contextmanager
def head_on(host: Host, *flags: str) -> Iterator[Head]:
    """A head on a host, with a model that any rank answers with the sum of all bytes."""
    command = [sys.executable, "-m", "tests.hosts.head", "--model", MODEL, "--images-per-prompt", "1"]
    command += ["--megapixels", "0.05", "--inline-below-kb", "0", "--data-parallel-address", host.address]
    with host.run([*command, *flags], stdin=subprocess.PIPE) as process:
        yield Head(process)


def _say(answer: object) -> None:
    print(json.dumps(answer), file=_answers, flush=True)


def _encode(engine: Engine, count: int) -> None:
    photographs = itertools.islice(itertools.cycle(sample_photographs()), count)
    for result in engine.encode(photographs):
        embedding = None if result.embedding is None else result.embedding.tolist()
        _say({"rank": result.rank, "error": result.error, "embedding": embedding})


@click.command()
@options(EngineConfig)
def main(**flags: Any) -> None:
    """Serve until the input ends."""
    try:
        with Engine(EngineConfig.load(flags, environ={})) as engine:
            _say("ready")
            for line in sys.stdin:
                word, *rest = line.split()
                if word == "encode":
                    _encode(engine, int(*rest))
                elif word == "peers":
                    _say([asdict(rank) for rank in engine.peers])
                else:
                    _say(asdict(engine.statistics()))
    except EngineError as error:
        _say({"error": str(error)})


if __name__ == "__main__":
    # Ray prints what it has to say to whatever is standard output.
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main()
