"""The README's code runs as it stands there, its links lead somewhere, and lists in docs are complete."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import shm
import transport
from engine.config import EngineConfig
from engine.options import options_of
from tests.crash.test_every_step import events_in_the_source
from tests.engine.processes import python

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
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


def rows(page: str, heads: str) -> list[list[str]]:
    """The cells of the table under these heads, as they stand there."""
    table = page.partition(f"\n{heads}\n")[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]


def section(title: str) -> str:
    """What the reference says under that title."""
    return REFERENCE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_operations_page_lists_every_step() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = rows(page, "| event | when | fields |")
    listed = [event for row in table for event in re.findall(r"`([\w.]+)`", row[0])]
    assert sorted(listed) == sorted(events_in_the_source())


FIELDS = dataclasses.fields(transport.TransportConfig)
CONFIGURATION = rows(REFERENCE, "| field | default | means | flag of `tensorferry run` |")


def shown(field: dataclasses.Field[Any]) -> str:
    """A default as the reference writes it."""
    value: Any = field.default
    if value is None or value == "":
        return "unset"
    if field.name.endswith("_bytes") or field.name in ("inline_below", "tcp_window"):
        return shm.human(value)
    if isinstance(value, float) and field.name != "peer_share":
        return f"{value:g} s"
    return str(value)


def test_the_reference_lists_every_field_and_default_of_the_transport() -> None:
    assert [row[:2] for row in CONFIGURATION] == [[f"`{field.name}`", shown(field)] for field in FIELDS]


def test_the_reference_lists_the_flag_of_every_field_that_has_one() -> None:
    flags = {item.name: f"`{item.flag}`" for item in options_of(EngineConfig)}
    others = {"backend": "tensor_transport", "ring_bytes": "shm_ring_gb", "inline_below": "inline_below_kb"}
    flags |= {field: flags[option] for field, option in others.items()} | {"trace": "`--log-level debug`"}
    assert [row[3] for row in CONFIGURATION] == [flags.get(field.name, "") for field in FIELDS]


def test_the_reference_names_every_error() -> None:
    exported = [getattr(transport, name) for name in transport.__all__]
    errors = [it.__name__ for it in exported if isinstance(it, type) and issubclass(it, Exception)]
    in_tree = re.findall(r"^    (?:[├└]── )?(\w+)", section("Errors"), re.MULTILINE)
    in_table = [row[0].strip("`") for row in rows(REFERENCE, "| error | whose doing | what to do |")]
    assert sorted(in_tree) == sorted(errors)
    assert sorted(["TransportError", *in_table]) == sorted(errors)


def test_the_reference_names_what_transport_exports_and_every_call_of_an_endpoint() -> None:
    named = set(re.findall(r"`(?:transport)?\.?(\w+)", section("Endpoint") + section("Errors")))
    calls = {name for name in vars(transport.Endpoint) if not name.startswith("_")}
    assert named >= {*transport.__all__, *calls}
