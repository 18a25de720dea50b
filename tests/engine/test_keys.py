"""`tensorferry keys`: pairs that work, for their owner alone, and never replaced."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

import transport
from engine.cli import main
from transport.conformance import joined


def test_makes_pairs_that_two_ends_can_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"--curve-key {folder}/head.key_secret --curve-clients {folder}/clients" in said
    assert f"--curve-key {folder}/rank.key_secret --curve-server {folder}/clients/head.key" in said
    for name in ("head", "rank"):
        assert stat.S_IMODE((folder / f"{name}.key_secret").stat().st_mode) == 0o600
        assert "secret" not in (folder / f"clients/{name}.key").read_text().lower()
    head = transport.TransportConfig(curve_key=f"{folder}/head.key_secret", curve_clients=f"{folder}/clients")
    rank = transport.TransportConfig(
        curve_key=f"{folder}/rank.key_secret", curve_server=f"{folder}/clients/head.key"
    )
    with (
        transport.listen("tcp://127.0.0.1:0", config=head) as front,
        joined(front, "rank", rank) as endpoint,
    ):
        endpoint.send({"hello": 1})
        assert front.receive(timeout=30).body == {"hello": 1}


@pytest.mark.parametrize("where", ["/proc/nowhere", "{file}/keys"])
def test_a_folder_that_cannot_be_made_is_one_line(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    folder = where.format(file=tmp_path / "file")
    assert main(["keys", folder]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"tensorferry: {folder}")
    assert said.err.count("\n") == 1


def test_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", str(tmp_path), "--name", "node7"]) == 0
    before = (tmp_path / "node7.key_secret").read_bytes()
    assert main(["keys", str(tmp_path), "--name", "node7"]) == 1
    assert "a key that may be in use is not replaced" in capsys.readouterr().err
    assert (tmp_path / "node7.key_secret").read_bytes() == before
