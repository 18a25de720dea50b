"""Holds docs/failure-modes.md against the tests: each row's test is there, each crash test has its row."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "failure-modes.md"
_COLUMNS = 5


def rows() -> list[list[str]]:
    """The cells of every row, heads and rules left out."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if "what happens" not in row[0] and not set("".join(row)) <= set("-|")]


def named() -> list[str]:
    """The test of every row."""
    return [match[1] for row in rows() if (match := re.fullmatch(r"`(tests/\S+?::.+)`", row[-1]))]


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """The tests there are in the files that the table names, and in all of tests/crash."""
    files = sorted({"tests/crash", *(name.partition("::")[0] for name in named())})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "stress or not stress", *files]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert listing.returncode == 0, listing.stdout + listing.stderr
    return {line for line in listing.stdout.splitlines() if "::" in line}


def test_every_row_is_whole_and_names_a_test() -> None:
    assert [row for row in rows() if len(row) != _COLUMNS or not all(row)] == []
    assert len(named()) == len(rows()) > 40


def test_every_row_has_its_test(collected: set[str]) -> None:
    bare = {name.partition("[")[0] for name in collected}
    assert [name for name in named() if name not in collected | bare] == []


def test_every_crash_test_has_its_row(collected: set[str]) -> None:
    """A test with several cases needs one row for all of them, or one for each."""
    listed = set(named())
    crash = {name for name in collected if name.startswith("tests/crash/")}
    assert sorted(name for name in crash if not {name, name.partition("[")[0]} & listed) == []
