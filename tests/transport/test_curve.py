"""Keys: who has a known one is served, encrypted; who has none or another gets nothing."""

from __future__ import annotations

import dataclasses
import stat
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import transport
from tests.transport.proxy import Proxy
from tests.transport.test_handshake import says
from tests.transport.test_tcp import ADDRESS, MIB, hub_of, proxied, until
from transport import Timeout, TransportConfig, TransportError
from transport.conformance import Pumped, joined, noise, same, warm_up

SECRET_TEXT = b"what nobody on the way may read "


@dataclasses.dataclass(frozen=True)
class Keys:
    """Files of three pairs, of which `front` and `rank` know each other."""

    folder: Path

    def of(self, name: str) -> str:
        return str(self.folder / f"{name}.key_secret")

    def listening(self, **changes: str) -> TransportConfig:
        fields = {"curve_key": self.of("front"), "curve_clients": str(self.folder / "clients"), **changes}
        return TransportConfig(ring_bytes=8 * MIB, **fields)  # type: ignore[arg-type]

    def connecting(self, name: str = "rank", **changes: str) -> TransportConfig:
        fields = {
            "curve_key": self.of(name),
            "curve_server": str(self.folder / "public/front.key"),
            **changes,
        }
        return TransportConfig(ring_bytes=8 * MIB, **fields)  # type: ignore[arg-type]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    for public in ("clients", "public"):
        (tmp_path / public).mkdir()
    transport.make_keys(tmp_path, "rank", public=tmp_path / "clients")
    transport.make_keys(tmp_path, "front", public=tmp_path / "public")
    transport.make_keys(tmp_path, "stranger", public=tmp_path / "public")
    return Keys(tmp_path)


@pytest.mark.parametrize("backend", ["tcp", "frames", "auto"])
def test_known_keys_are_served(keys: Keys, backend: str) -> None:
    with (
        transport.listen(ADDRESS, config=keys.listening(backend=backend)) as front,
        joined(front, "rank", keys.connecting(backend=backend)) as rank,
    ):
        pumped = Pumped(rank)
        for seed in range(3):
            front.send({"value": noise(2 * MIB, seed)}, to="rank")
            assert same(pumped.next().body["value"], noise(2 * MIB, seed))
        pumped.stop()
        back = Pumped(front)
        rank.send({"value": noise(MIB)})
        assert same(back.next().body["value"], noise(MIB))
        back.stop()


@pytest.mark.parametrize("encrypted", [True, False])
def test_nothing_on_the_bulk_connection_can_be_read(keys: Keys, encrypted: bool) -> None:
    plain = TransportConfig(backend="tcp", ring_bytes=8 * MIB)
    own = keys.listening(backend="tcp") if encrypted else plain
    other = keys.connecting(backend="tcp") if encrypted else plain
    with ExitStack() as stack:
        front = stack.enter_context(transport.listen(ADDRESS, config=own))
        proxy: Proxy = stack.enter_context(proxied(front))
        pumped = Pumped(stack.enter_context(joined(front, "near", other)))
        stack.callback(pumped.stop)
        warm_up(front, pumped)
        before = proxy.connections  # more than one where it was dialled before its certificate was known
        proxy.watching = True
        text = np.frombuffer(SECRET_TEXT * 10_000, np.uint8)
        front.send({"value": text}, to="near")
        assert same(pumped.next().body["value"], text)
        assert proxy.connections == before
        assert len(proxy.seen) > text.nbytes
        assert (SECRET_TEXT in proxy.seen) != encrypted


def test_a_flipped_byte_of_an_encrypted_connection_is_seen(keys: Keys) -> None:
    with ExitStack() as stack:
        front = stack.enter_context(transport.listen(ADDRESS, config=keys.listening(backend="tcp")))
        proxy = stack.enter_context(proxied(front))
        pumped = Pumped(stack.enter_context(joined(front, "near", keys.connecting(backend="tcp"))))
        stack.callback(pumped.stop)
        warm_up(front, pumped)
        before = proxy.connections
        proxy.flips = [proxy.forwarded + 500_000]
        front.send({"value": noise(MIB)}, to="near")
        assert same(pumped.next().body["value"], noise(MIB))
        assert proxy.connections > before


@pytest.mark.usefixtures("patient")
def test_a_payload_for_two_peers_of_a_host_crosses_once_and_encrypted(keys: Keys) -> None:
    names = ["first", "second"]
    with ExitStack() as stack:
        front = stack.enter_context(transport.listen(ADDRESS, config=keys.listening(backend="tcp")))
        proxy = stack.enter_context(proxied(front))
        peers = []
        for name in names:
            peers.append(Pumped(stack.enter_context(joined(front, name, keys.connecting(backend="tcp")))))
            stack.callback(peers[-1].stop)
            front.send({"value": noise(MIB)}, to=name)
            peers[-1].next()

        def count(what: str) -> int:
            counted = hub_of(front).statistics()[what]
            assert isinstance(counted, int)
            return counted

        def know_each_other() -> bool:
            front.send({"value": noise(MIB)}, to=names)
            assert all(same(peer.next().body["value"], noise(MIB)) for peer in peers)
            return count("neighbours") > 0

        until(know_each_other)
        proxy.watching = True
        text = np.frombuffer(SECRET_TEXT * 20_000, np.uint8)
        crossed = count("crossed once")
        front.send({"value": text}, to=names)
        assert all(same(peer.next().body["value"], text) for peer in peers)
        assert count("crossed once") == crossed + 1
        assert text.nbytes < len(proxy.seen) < 1.5 * text.nbytes
        assert SECRET_TEXT not in proxy.seen


@pytest.mark.parametrize("who", ["nobody", "stranger"])
def test_unknown_keys_get_nothing(keys: Keys, who: str, caplog: pytest.LogCaptureFixture) -> None:
    config = TransportConfig() if who == "nobody" else keys.connecting(who)
    with transport.listen(ADDRESS, config=keys.listening()) as front:
        words = "only who has a key that it knows" if who == "nobody" else "not among its curve_clients"
        says(f"closes the connection during the handshake: .*{words}", front.addresses[0], config, who)
        assert not front.peers
        assert front.statistics()["dropped"] == {}
    if who == "stranger":
        assert "its key is not in" in caplog.text


def test_keys_for_who_has_none(keys: Keys) -> None:
    with transport.listen(ADDRESS) as front:
        what = "closes the connection during the handshake: it has no keys"
        says(what, front.addresses[0], keys.connecting(), "rank")


def test_a_key_that_is_added_or_taken_away_counts_at_once(keys: Keys) -> None:
    known, public = keys.folder / "clients/stranger.key", keys.folder / "public/stranger.key"
    with transport.listen(ADDRESS, config=keys.listening()) as front:
        known.write_bytes(public.read_bytes())
        with joined(front, "stranger", keys.connecting("stranger")):
            pass
        known.unlink()
        with pytest.raises(Timeout):
            transport.connect(front.addresses[0], name="again", config=keys.connecting("stranger"), timeout=1)


def test_who_listens_must_be_the_one_that_is_meant(keys: Keys) -> None:
    wrong = keys.connecting(curve_server=str(keys.folder / "public/stranger.key"))
    with (
        transport.listen(ADDRESS, config=keys.listening()) as front,
        pytest.raises(Timeout),
    ):
        transport.connect(front.addresses[0], name="rank", config=wrong, timeout=1.0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"curve_clients": ""}, "must be a folder"),
        ({"curve_key": "/nowhere/front.key_secret"}, "Invalid certificate|No such file"),
    ],
)
def test_missing_files_are_named(keys: Keys, changes: dict[str, str], complaint: str) -> None:
    with pytest.raises(TransportError, match=complaint):
        transport.listen(ADDRESS, config=keys.listening(**changes))


@pytest.mark.parametrize("option", ["curve_clients", "curve_server"])
def test_keys_of_others_without_ones_own_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} without curve_key encrypts nothing"):
        TransportConfig(**{option: "keys"})  # type: ignore[arg-type]


def test_who_connects_is_told_that_the_key_of_who_listens_is_not_set(keys: Keys) -> None:
    with pytest.raises(TransportError, match=r"curve_server \(not set\): "):
        transport.connect("tcp://127.0.0.1:1", name="rank", config=keys.connecting(curve_server=""))


def test_a_bad_file_among_the_clients_is_named_and_passed_by(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    clients = keys.folder / "clients"
    bad = {
        clients / f"bad{number}.key": text for number, text in enumerate(("?", "public-key", "public-key=?"))
    }
    for path, text in bad.items():
        path.write_text(text)
    with transport.listen(ADDRESS, config=keys.listening()) as front:
        with joined(front, "rank", keys.connecting()):
            for path in bad:
                assert f"a file in curve_clients is passed by: No public key found in {path}" in caplog.text
        assert "nobody can connect" not in caplog.text
        (clients / "rank.key").unlink()
        says("closes the connection during the handshake", front.addresses[0], keys.connecting(), "again")
    assert f"nobody can connect: {clients} holds no public key (*.key) that can be read" in caplog.text


def test_a_secret_key_that_others_may_read_is_refused(keys: Keys) -> None:
    secret = Path(keys.of("front"))
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    secret.chmod(0o640)
    with pytest.raises(TransportError, match="chmod 600"):
        transport.listen(ADDRESS, config=keys.listening())


def test_a_public_key_is_no_secret_one(keys: Keys) -> None:
    with pytest.raises(TransportError, match="key_secret"):
        transport.listen(ADDRESS, config=keys.listening(curve_key=str(keys.folder / "public/front.key")))


def test_off_loopback_only_with_keys(keys: Keys) -> None:
    with pytest.raises(TransportError, match="curve_key"):
        transport.listen("tcp://0.0.0.0:0")
    with pytest.raises(TransportError, match="curve_key"):
        transport.connect("tcp://192.0.2.1:1", name="rank", timeout=0.1)
    with transport.listen("tcp://0.0.0.0:0", config=keys.listening()):
        pass


def test_without_the_extra_auto_goes_by_encrypted_frames(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transport.bulk.hub.available", lambda: "with keys, cryptography is needed")
    with (
        transport.listen(ADDRESS, config=keys.listening(backend="tcp")) as front,
        joined(front, "rank", keys.connecting(backend="tcp")),
        pytest.raises(transport.Full, match="not tcp: with keys, cryptography"),
    ):
        front.send({"value": noise(MIB)}, to="rank", timeout=1.0)


def test_make_keys_replaces_nothing(tmp_path: Path) -> None:
    secret = transport.make_keys(tmp_path, "head", public=tmp_path)
    before = secret.read_bytes()
    with pytest.raises(FileExistsError):
        transport.make_keys(tmp_path, "head", public=tmp_path)
    assert secret.read_bytes() == before
    with pytest.raises(ValueError, match="no name"):
        transport.make_keys(tmp_path, "../head", public=tmp_path)
