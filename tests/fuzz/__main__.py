"""Fuzz with coverage: `python -m tests.fuzz TARGET [--seconds N | --runs N]`; needs atheris (extra `fuzz`).

TARGET is decode, handshake, attach, or all of them one after the other. What an input broke is printed with
the input, which `--repeat` takes: `python -m tests.fuzz decode --repeat BASE64`.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TARGETS = {"decode": "Decode", "handshake": "Handshake", "attach": "Attach"}
_HANGS_AFTER = 60  # seconds with one input
_MEMORY_MB = 3000
_LONGEST = 600  # bytes of an input


def load(name: str) -> Any:
    """The class of a target."""
    return getattr(importlib.import_module(f"tests.fuzz.{name}"), TARGETS[name])


def fuzz(name: str, options: list[str], folder: Path) -> None:
    """Run libFuzzer on a target; it ends this process, with a code that is not 0 for a finding."""
    import atheris

    target = load(name)(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed{number}").write_bytes(seed)
    atheris.Setup([name, *options, f"-artifact_prefix={folder}/", str(corpus)], target)
    atheris.Fuzz()


def in_child(name: str, options: list[str]) -> int:
    """The same in a child, which has everything imported; its exit code. What it leaves is removed."""
    import shm  # not before it is instrumented

    sys.stderr.flush()
    with own_folder() as folder:
        child = os.fork()
        if not child:
            try:
                fuzz(name, options, folder)
            except BaseException:  # noqa: BLE001  # libFuzzer says what an input broke, but not this
                traceback.print_exc()
            finally:
                os._exit(1)  # who comes here has not fuzzed
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shm.sweep()
    return code


@contextmanager
def own_folder() -> Iterator[Path]:
    """An empty folder with a short name: the path of a Unix socket has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="tf-", dir="/tmp") as folder:
        yield Path(folder)


def main() -> int:
    """The command line; 1 when a target was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=0, help="for each target; 0: as many as --runs take")
    parser.add_argument("--runs", type=int, default=-1, help="inputs for each target; -1: as --seconds say")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--repeat", metavar="BASE64", help="run this one input, without atheris")
    given = parser.parse_args()
    names = list(TARGETS) if given.target == "all" else [given.target]
    if given.repeat is not None:
        for name in names:
            with own_folder() as folder:
                target = load(name)(folder)
                target(base64.b64decode(given.repeat))
                target.close()
        return 0
    if given.seconds == 0 and given.runs < 0:
        parser.error("say for how long: --seconds or --runs")
    import atheris

    with atheris.instrument_imports(include=["shm", "transport", "tests.fuzz"]):
        for name in names:
            load(name)
    options = [
        f"-max_total_time={given.seconds}",
        f"-runs={given.runs}",
        f"-seed={given.seed}",
        f"-timeout={_HANGS_AFTER}",
        f"-rss_limit_mb={_MEMORY_MB}",
        f"-max_len={_LONGEST}",
        "-len_control=10",  # long inputs early: a conversation takes some bytes
        "-print_final_stats=1",
    ]
    broken = {name: code for name in names if (code := in_child(name, options))}
    for name, code in broken.items():
        print(f"{name} was broken (its process ended with {code}): see above")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
