"""The README's code runs as it stands there, its links lead somewhere, and lists in docs are complete."""

from __future__ import annotations

import re
from pathlib import Path

from tests.crash.test_every_step import events_in_the_source
from tests.engine.processes import python

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENGINE, FRONT, RANK = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_engine_block_encodes_every_photograph() -> None:
    with python("-c", ENGINE) as running:
        shown, said = running.communicate()
    assert (running.returncode, said) == (0, "")
    assert shown.count("tensor([") == 8
    assert shown.rstrip().endswith("}")
    assert "{'shm': " in shown


def test_the_two_transport_blocks_talk_to_each_other(address: str) -> None:
    front, rank = (code.replace("ipc:///tmp/front.sock", address) for code in (FRONT, RANK))
    assert front != FRONT
    assert rank != RANK
    with python("-c", front) as one, python("-c", rank) as other:
        assert other.communicate() == ("", "")
        shown, said = one.communicate()
    assert (one.returncode, other.returncode, said) == (0, 0, "")
    assert shown == f"{{'total': {3.0 * 3481 * 1176}}} shm: the peer proved that it maps the ring\n"


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_no_text_of_the_product_installs_it_from_an_index() -> None:
    # It is on none: that fails, or brings what somebody registered under the name.
    for folder in ("shm", "transport", "engine"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"pip install \W*tensorferry", path.read_text(encoding="utf-8")), path


def test_the_operations_page_lists_every_step() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = page.partition("| event | when | fields |")[2].partition("\n\n")[0].splitlines()
    listed = [event for row in rows if row for event in re.findall(r"`([\w.]+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(events_in_the_source())
