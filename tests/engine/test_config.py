"""Configuration: every field by flag, file and environment, in this order, and refused in clear words."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.options import ConfigError, Settings, option, options, options_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Settings):
    """One field of each kind that a later option may have."""

    label: str = option("plain", help="A text.")
    color: Literal["red", "green"] = option("red", help="A choice.")
    count: int = option(3, minimum=1, maximum=9, short="-ct", help="A whole number.")
    ratio: float = option(0.5, minimum=0, unit="parts", help="A number.")
    limit: float | None = option(None, help="A number, unset unless given.")
    eager: bool = option(False, help="A switch that is off.")
    tidy: bool = option(True, help="A switch that is on.")


@click.command()
@click.option("--config", "file", type=Path)
@options(Sample)
def command(file: Path | None, **flags: object) -> None:
    click.echo(Sample.load(flags, environ={}, file=file).to_toml(), nl=False)


def write(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text, encoding="utf-8")
    return file


def load(
    flags: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
    file: Path | None = None,
) -> Sample:
    return Sample.load(flags or {}, environ=environ or {}, file=file)


def print_into(pipe: Connection, config: EngineConfig) -> None:
    pipe.send_bytes(config.to_toml().encode())


class TestPrecedence:
    def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(self, tmp_path: Path) -> None:
        file = write(tmp_path, 'count = 2\nratio = 2.0\nlabel = "file"\n')
        environ = {"TENSORFERRY_COUNT": "4", "TENSORFERRY_RATIO": "4"}
        config = load({"count": "6"}, environ, file)
        assert (config.count, config.ratio, config.label, config.color) == (6, 4.0, "file", "red")
        assert config.sources["count"] == "flag --count"
        assert config.sources["ratio"] == "environment TENSORFERRY_RATIO"
        assert config.sources["label"] == f"file {str(file)!r}"
        assert config.sources["color"] == "default"

    def test_a_flag_that_is_none_was_not_given(self) -> None:
        assert load({"count": None}, {"TENSORFERRY_COUNT": "4"}).count == 4

    def test_a_flag_may_say_the_default_against_the_file(self, tmp_path: Path) -> None:
        config = load({"count": 3, "tidy": True}, None, write(tmp_path, "count = 8\ntidy = false\n"))
        assert (config.count, config.tidy) == (3, True)
        assert config.sources["count"] == "flag --count"

    def test_other_variables_are_none_of_our_business(self) -> None:
        assert load(None, {"PATH": "/bin", "FERRY_COUNT": "x"}) == Sample()


class TestUnknownNames:
    def test_in_the_file_gives_the_nearest_name(self, tmp_path: Path) -> None:
        file = write(tmp_path, 'colour = "red"\n')
        with pytest.raises(
            ConfigError, match=r"unknown key 'colour' in file '.*run\.toml'; did you mean color\?"
        ):
            load(file=file)

    def test_in_the_environment_gives_the_nearest_variable(self) -> None:
        expected = "unknown environment variable TENSORFERRY_COUTN; did you mean TENSORFERRY_COUNT?"
        with pytest.raises(ConfigError) as caught:
            load(environ={"TENSORFERRY_COUTN": "1"})
        assert str(caught.value) == expected

    def test_a_variable_in_lower_case_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="did you mean TENSORFERRY_COUNT"):
            load(environ={"TENSORFERRY_count": "1"})

    def test_a_key_spelled_like_a_flag_gives_the_key(self, tmp_path: Path) -> None:
        file = write(tmp_path, 'tensor-transport = "shm"\n')
        with pytest.raises(ConfigError, match=r"did you mean tensor_transport\?"):
            EngineConfig.load({}, environ={}, file=file)

    def test_nothing_near_lists_what_is_known(self) -> None:
        with pytest.raises(ConfigError, match="known: label, color, count, ratio, limit, eager, tidy$"):
            load({"zzzzzz": 1})

    def test_a_table_in_the_file_is_no_key(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"unknown key 'counts' .*did you mean count\?"):
            load(file=write(tmp_path, "[counts]\nx = 1\n"))

    def test_sources_can_not_be_set(self) -> None:
        with pytest.raises(ConfigError, match="unknown option 'sources'"):
            load({"sources": {}})


WRONG: list[tuple[str, Any, str]] = [
    ("label", "", "a non-empty text"),
    ("label", 1, "a non-empty text"),
    ("color", "blue", "one of red, green"),
    ("color", "Red", "one of red, green"),
    ("count", 0, "a whole number, at least 1 and at most 9"),
    ("count", 10, "a whole number, at least 1 and at most 9"),
    ("count", 10**400, "a whole number, at least 1 and at most 9"),
    ("count", 2.0, "a whole number, at least 1 and at most 9"),
    ("count", True, "a whole number, at least 1 and at most 9"),
    ("count", None, "a whole number, at least 1 and at most 9"),
    ("count", [1], "a whole number, at least 1 and at most 9"),
    ("ratio", -0.1, "a number of parts, at least 0"),
    ("ratio", math.inf, "a number of parts, at least 0"),
    ("ratio", math.nan, "a number of parts, at least 0"),
    ("ratio", 10**400, "a number of parts, at least 0"),
    ("limit", math.inf, "a number"),
    ("limit", False, "a number"),
    ("eager", 1, "true or false"),
    ("eager", "true", "true or false"),
]


class TestWrongValues:
    @pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
    def test_as_an_argument(self, name: str, value: Any, allowed: str) -> None:
        with pytest.raises(ConfigError) as caught:
            Sample(**{name: value})
        assert str(caught.value) == f"{name} = {value!r} (argument of Sample): must be {allowed}"

    @pytest.mark.parametrize("text", ["0", "10", "two", "", "2.0", "0x2", "None"])
    def test_in_the_environment_names_the_variable(self, text: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load(environ={"TENSORFERRY_COUNT": text})
        start = f"count = {int(text) if text.isdigit() else text!r} (environment TENSORFERRY_COUNT)"
        assert str(caught.value) == f"{start}: must be a whole number, at least 1 and at most 9"

    @pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "-1", "half", ""])
    def test_a_number_is_finite_and_in_bounds(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"\(flag --ratio\): must be a number of parts, at least 0"):
            load({"ratio": text})

    def test_in_the_file_a_text_is_no_number(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"^count = '4' \(file '.*run\.toml'\): must be a whole number"):
            load(file=write(tmp_path, 'count = "4"\n'))

    def test_in_the_file_a_flag_does_not_hide_it(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"^count = 0 \(file"):
            load({"count": 5}, file=write(tmp_path, "count = 0\n"))

    def test_a_wrong_switch_is_named_by_what_was_given(self) -> None:
        with pytest.raises(ConfigError, match=r"^eager = 'maybe' \(environment TENSORFERRY_EAGER\)"):
            load(environ={"TENSORFERRY_EAGER": "maybe"})


class TestFile:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"^file '.*none\.toml' can't be read: No such file or directory$"
        ):
            load(file=tmp_path / "none.toml")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="can't be read: Is a directory"):
            load(file=tmp_path)

    def test_not_toml(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"run\.toml' is not TOML: .*line 1"):
            load(file=write(tmp_path, "count: 4\n"))

    def test_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "run.toml").write_bytes(b'label = "\xff"\n')
        with pytest.raises(ConfigError, match="is not TOML: .*utf-8"):
            load(file=tmp_path / "run.toml")

    def test_a_whole_number_is_a_number(self, tmp_path: Path) -> None:
        ratio = load(file=write(tmp_path, "ratio = 2\n")).ratio
        assert (ratio, type(ratio)) == (2.0, float)


class TestEnvironment:
    @pytest.mark.parametrize("text", ["1", "true", "Yes", "ON"])
    def test_a_switch_on(self, text: str) -> None:
        assert load(environ={"TENSORFERRY_EAGER": text}).eager is True

    @pytest.mark.parametrize("text", ["0", "false", "No", "OFF"])
    def test_a_switch_off(self, text: str) -> None:
        assert load(environ={"TENSORFERRY_TIDY": text}).tidy is False

    def test_every_field_of_the_engine_has_a_variable(self) -> None:
        for item in options_of(EngineConfig):
            text = item.choices[-1] if item.choices else str(item.maximum or "7")
            text = "true" if item.kind is bool else text
            # With these, 7 is allowed everywhere.
            environ = {
                "TENSORFERRY_DATA_PARALLEL_SIZE": "14",
                "TENSORFERRY_HEADLESS": "true",
                "TENSORFERRY_CURVE_KEY": "own",
            }
            config = EngineConfig.load({}, environ=environ | {item.variable: text})
            assert config.sources[item.name] == f"environment {item.variable}"
            assert getattr(config, item.name) == item.parse(text)


# What Kubernetes puts into every container of a namespace for its Services, under their names.
LINKS = {
    "_SERVICE_HOST": "10.0.0.1",
    "_SERVICE_PORT": "80",
    "_SERVICE_PORT_HTTP_ADMIN": "80",
    "_PORT": "tcp://10.0.0.1:80",
    "_PORT_80_TCP": "tcp://10.0.0.1:80",
    "_PORT_80_TCP_PROTO": "tcp",
    "_PORT_80_TCP_PORT": "80",
    "_PORT_80_TCP_ADDR": "10.0.0.1",
    "_PORT_53_UDP": "udp://[fd00::1]:53",
    "_PORT_53_UDP_PROTO": "udp",
    "_PORT_53_UDP_PORT": "53",
    "_PORT_53_UDP_ADDR": "fd00::1",
    "_PORT_9_SCTP": "sctp://10.0.0.1:9",
}


class TestServicesOfKubernetes:
    @pytest.mark.parametrize("service", ["", "_HEAD", "_HEAD_2", "_COUNT", "_PORT", "_SERVICE"])
    def test_are_none_of_our_business(self, service: str) -> None:
        links = {f"TENSORFERRY{service}{name}": value for name, value in LINKS.items()}
        config = load(environ={**links, "TENSORFERRY_COUNT": "4"})
        assert config == Sample(count=4)

    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("TENSORFERRY_TPC_PORT", "29551"),
            ("TENSORFERRY_PORT", "29551"),
            ("TENSORFERRY_PORT", "tcp://10.0.0.1"),
            ("TENSORFERRY_PORT", "http://10.0.0.1:80"),
            ("TENSORFERRY_LINK", "tcp://10.0.0.1:80"),
            ("TENSORFERRY_PORT_80_TCP", "80"),
            ("TENSORFERRY_PORT_80_TCP_ADRR", "10.0.0.1"),
            ("TENSORFERRY_SERVICE_HOST", "head.example"),
            ("TENSORFERRY_SERVICE_PORT", "eighty"),
            ("TENSORFERRY_service_port", "80"),
        ],
    )
    def test_what_is_like_them_only_is_a_mistake(self, variable: str, value: str) -> None:
        with pytest.raises(ConfigError, match=f"^unknown environment variable {variable}; "):
            load(environ={variable: value})

    @pytest.mark.parametrize(
        ("name", "service"),
        [("tcp_port", "tensorferry-tcp"), ("data_parallel_rpc_port", "tensorferry-data-parallel-rpc")],
    )
    def test_under_the_name_of_an_option_are_said_to_be_that(self, name: str, service: str) -> None:
        variable = f"TENSORFERRY_{name.upper()}"
        with pytest.raises(ConfigError) as caught:
            EngineConfig.load({}, environ={variable: "tcp://10.0.0.1:80"})
        assert str(caught.value) == (
            f"{name} = 'tcp://10.0.0.1:80' (environment {variable}): must be a whole number, at least 0 and"
            f" at most 65535; Kubernetes sets this variable for a Service called {service}: set"
            " enableServiceLinks: false in the pod, or give the Service another name"
        )
        with pytest.raises(ConfigError, match="and at most 65535$"):
            EngineConfig.load({}, environ={variable: "8O8O"})

    def test_an_option_that_they_are_a_value_of_takes_them(self) -> None:
        assert load(environ={"TENSORFERRY_LABEL": "tcp://10.0.0.1:80"}).label == "tcp://10.0.0.1:80"


class TestPrinted:
    def test_says_what_came_from_where(self) -> None:
        text = load({"count": 4}, {"TENSORFERRY_EAGER": "on"}).to_toml()
        assert text == (
            'label = "plain"  # default\n'
            'color = "red"  # default\n'
            "count = 4  # flag --count\n"
            "ratio = 0.5  # default\n"
            "# limit is unset  # default\n"
            "eager = true  # environment TENSORFERRY_EAGER\n"
            "tidy = true  # default\n"
        )

    @given(
        label=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        count=st.integers(1, 9),
        ratio=st.floats(0, 1e308),
        limit=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        eager=st.booleans(),
    )
    def test_feeds_back_as_an_equal_configuration(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        label: str,
        count: int,
        ratio: float,
        limit: float | None,
        eager: bool,
    ) -> None:
        config = Sample(label=label, count=count, ratio=ratio, limit=limit, eager=eager)
        file = write(tmp_path_factory.getbasetemp(), config.to_toml())
        assert load(file=file) == config

    def test_a_hostile_file_name_stays_in_its_comment(self, tmp_path: Path) -> None:
        odd = tmp_path / "a\ncount = 9 #.toml"
        odd.write_text("count = 2\n")
        config = load(file=odd)
        assert load(file=write(tmp_path, config.to_toml())) == config

    def test_of_the_engine_feeds_back(self, tmp_path: Path) -> None:
        config = EngineConfig(tensor_transport="shm", megapixels=1.5, model="a.b:C", seed=2**63 - 1)
        assert EngineConfig.load({}, environ={}, file=write(tmp_path, config.to_toml())) == config


class TestFlags:
    def run(self, *arguments: str) -> str:
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
        return result.output

    def test_reach_their_fields(self) -> None:
        text = self.run("--label", "x", "--color", "green", "--ratio", "2", "--limit", "1e3", "-ct", "5")
        assert text == (
            'label = "x"  # flag --label\n'
            'color = "green"  # flag --color\n'
            "count = 5  # flag --count\n"
            "ratio = 2.0  # flag --ratio\n"
            "limit = 1000.0  # flag --limit\n"
            "eager = false  # default\n"
            "tidy = true  # default\n"
        )

    def test_switches_come_in_pairs(self) -> None:
        text = self.run("--eager", "--no-tidy")
        assert "eager = true  # flag --eager\n" in text
        assert "tidy = false  # flag --no-tidy\n" in text

    def test_beat_the_file(self, tmp_path: Path) -> None:
        file = write(tmp_path, "count = 2\neager = true\n")
        text = self.run("--config", str(file), "--count", "7", "--no-eager")
        assert "count = 7  # flag --count\n" in text
        assert "eager = false  # flag --no-eager\n" in text

    def test_a_wrong_value_is_refused_in_our_words(self) -> None:
        with pytest.raises(
            ConfigError, match=r"^color = 'blue' \(flag --color\): must be one of red, green$"
        ):
            self.run("--color", "blue")

    def test_a_wrong_name_is_refused_with_the_nearest(self) -> None:
        result = CliRunner().invoke(command, ["--colr", "red"])
        assert result.exit_code == 2
        assert "--colr" in result.output
        assert "--color" in result.output.split("--colr", 1)[1]

    def test_help_has_text_choices_unit_and_default(self) -> None:
        words = " ".join(self.run("--help").split())
        assert "--color red|green A choice. [default: red]" in words
        assert "-ct, --count INT A whole number. [default: 3]" in words
        assert "--ratio PARTS A number. [default: 0.5]" in words
        assert "--limit FLOAT A number, unset unless given. [default: unset]" in words
        assert "--eager / --no-eager A switch that is off. [default: --no-eager]" in words

    def test_help_keeps_the_order_of_the_fields(self) -> None:
        text = self.run("--help")
        places = [text.index(item.flag) for item in options_of(Sample)]
        assert places == sorted(places)


class TestEngineConfig:
    def test_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            EngineConfig().seed = 1  # type: ignore[misc]  # that is what the test is about

    def test_defaults_are_allowed_and_say_so(self) -> None:
        assert set(EngineConfig().sources.values()) == {"default"}

    def test_an_argument_is_a_source_too(self) -> None:
        config = EngineConfig(seed=4)
        assert config.sources["seed"] == "argument"
        assert dataclasses.replace(config, seed=5).sources["seed"] == "argument"

    def test_every_field_is_an_option_with_help(self) -> None:
        names = {field.name for field in dataclasses.fields(EngineConfig)}
        assert names - {"sources"} == {item.name for item in options_of(EngineConfig)}
        assert all(item.help.endswith(".") for item in options_of(EngineConfig))

    def test_names_that_people_know(self) -> None:
        flags = {item.flag for item in options_of(EngineConfig)}
        assert flags >= {
            "--tensor-transport",
            "--shm-ring-gb",
            "--inline-below-kb",
            "--data-parallel-size",
            "--device",
            "--model",
            "--prompts",
            "--images-per-prompt",
        }

    @pytest.mark.parametrize("more", [{"headless": True}, {"data_parallel_size_local": 0}])
    def test_a_port_that_nobody_can_know_is_refused(self, more: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="data_parallel_rpc_port = 0: give the head and the ranks"):
            EngineConfig(data_parallel_rpc_port=0, **more)
        EngineConfig(data_parallel_rpc_port=0)  # nobody comes from elsewhere
        EngineConfig(data_parallel_rpc_port=0, data_parallel_size_local=0, data_parallel_backend="ray")

    def test_sizes_in_bytes(self) -> None:
        config = EngineConfig(shm_ring_gb=0.5, inline_below_kb=3)
        assert (config.ring_bytes, config.inline_below) == (512 * 1024 * 1024, 3072)

    def test_crosses_into_a_spawned_process_whole(self) -> None:
        config = EngineConfig.load({"seed": 3}, environ={})
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=print_into, args=(theirs, config))
        worker.start()
        theirs.close()
        try:
            assert ours.poll(60), "the process did not answer"
            assert ours.recv_bytes().decode() == config.to_toml()
        finally:
            ours.close()
            worker.join(60)
            worker.close()
