"""From the fields of a dataclass to flags, TOML keys and environment variables, and back to checked values.

A field is the only place where an option is defined: its name gives the flag, the key and the variable, its
type the values that are allowed (`Literal` gives the choices), `option()` default, help, unit and bounds.

    tensor_transport  ->  --tensor-transport   tensor_transport = "shm"   TENSORFERRY_TENSOR_TRANSPORT=shm
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import click

ENVIRONMENT_PREFIX = "TENSORFERRY_"
_KIND = {bool: "true or false", int: "a whole number", float: "a number", str: "a non-empty text"}
# What Kubernetes sets in every container of a namespace for each Service there, under the Service's name.
_OF_A_SERVICE = re.compile(
    r"[A-Z0-9_]+_(SERVICE_HOST=[0-9a-f.:]+|SERVICE_PORT(_[A-Z0-9_]+)?=\d+"
    r"|PORT(_\d+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://\S+:\d+"
    r"|PORT_\d+_(TCP|UDP|SCTP)_(PROTO=(tcp|udp|sctp)|PORT=\d+|ADDR=[0-9a-f.:]+))"
)
_TRUTH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


class ConfigError(ValueError):
    """An option is unknown or its value is not allowed; says where it came from and what is allowed."""


def option(
    default: object,
    *,
    help: str,
    unit: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    short: str | None = None,
) -> Any:
    """A field of a `Settings` class; `minimum` and `maximum` are allowed values, `short` is one more flag."""
    about = {"help": help, "unit": unit, "minimum": minimum, "maximum": maximum, "short": short}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """What one field says about itself: `kind` is bool, int, float or str; if `optional`, None is allowed."""

    name: str
    kind: type
    optional: bool
    choices: tuple[str, ...]
    default: object
    help: str
    unit: str | None
    minimum: float | None
    maximum: float | None
    short: str | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def negative_flag(self) -> str:
        return "--no-" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def allowed(self) -> str:
        """In words: `a whole number, at least 1`, `one of auto, cpu, cuda`."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        bounds = [f"at least {self.minimum}"] if self.minimum is not None else []
        bounds += [f"at most {self.maximum}"] if self.maximum is not None else []
        unit = f" of {self.unit}" if self.unit else ""
        return _KIND[self.kind] + unit + (", " + " and ".join(bounds) if bounds else "")

    def parse(self, text: str) -> object:
        """The value that a flag or variable spells; a text that spells none is returned, to be refused."""
        try:
            return _TRUTH[text.lower()] if self.kind is bool else self.kind(text)
        except (KeyError, ValueError):
            return text

    def accepts(self, value: object) -> bool:
        """Whether `value` is allowed. True is no whole number here: as a number of ranks it is a mistake."""
        if value is None:
            return self.optional
        if isinstance(value, bool):
            return self.kind is bool
        if isinstance(value, str):
            return self.kind is str and value != "" and (not self.choices or value in self.choices)
        if isinstance(value, int | float):
            fits = self.kind is float or (self.kind is int and isinstance(value, int))
            return fits and self._in_bounds(value)
        return False

    def _in_bounds(self, value: float) -> bool:
        least = -sys.float_info.max if self.minimum is None else self.minimum
        most = sys.float_info.max if self.maximum is None else self.maximum
        return least <= value <= most  # refuses infinities and NaN, too

    def checked(self, value: object, source: str) -> object:
        """`value` in the field's own type, 2 as 2.0 where a float is meant; raises `ConfigError`."""
        if not self.accepts(value):
            raise ConfigError(self.refusal(value, source))
        return float(value) if self.kind is float and isinstance(value, int) else value

    def refusal(self, value: object, source: str) -> str:
        """In words, that this value is not allowed."""
        return f"{self.name} = {value!r} ({source}): must be {self.allowed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What every configuration can do: check itself, load, say where a value came from, print itself.

    `sources` says for each field where its value came from: `default`, `argument`, `file 'a.toml'`,
    `environment TENSORFERRY_SEED` or `flag --seed`. It is no part of equality.
    """

    sources: dict[str, str] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for item in options_of(type(self)):
            value = item.checked(getattr(self, item.name), f"argument of {type(self).__name__}")
            object.__setattr__(self, item.name, value)
            self.sources[item.name] = "default" if value == item.default else "argument"

    @classmethod
    def load(
        cls, flags: Mapping[str, object], *, environ: Mapping[str, str], file: Path | None = None
    ) -> Self:
        """What flags, environment and file give together; of several values for a field the first counts.

        flags: by field name, as text or value; None means not given, which is how click hands them over.
        environ: usually `os.environ`; variables without the prefix are none of our business, nor are those
        that Kubernetes sets for a Service whose name begins with it.
        file: TOML with field names as keys.
        Raises `ConfigError`: an unknown name, a value that is not allowed, a file that can't be read.
        """
        known = {item.name: item for item in options_of(cls)}
        given = [*_from_file(known, file), *_from_environ(known, environ), *_from_flags(known, flags)]
        # Each is checked, not only what counts: a wrong line in a file must not hide behind a flag.
        values = {name: known[name].checked(value, source) for name, value, source in given}
        config = cls(**values)
        config.sources.update((name, source) for name, _, source in given)
        return config

    def to_toml(self) -> str:
        """All fields as TOML that `load` reads back as an equal configuration, with sources as comments."""
        return "".join(self._line(item.name) for item in options_of(type(self)))

    def _line(self, name: str) -> str:
        value = getattr(self, name)
        if value is None:  # TOML has no null: leaving the key out is how one says it
            return f"# {name} is unset  # {self.sources[name]}\n"
        # JSON spells texts, numbers and truth as TOML does, but for DEL, which TOML wants escaped.
        literal = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return f"{name} = {literal}  # {self.sources[name]}\n"


def options_of(cls: type[Settings]) -> tuple[Option, ...]:
    """The options of a settings class, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    fields = (field for field in dataclasses.fields(cls) if "help" in field.metadata)
    return tuple(
        Option(name=field.name, default=field.default, **_shape(hints[field.name]), **field.metadata)
        for field in fields
    )


def options(cls: type[Settings]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: one flag for each option; the click command gets them by field name, None where not given.

    Texts pass through click unread: the same code, with the same words, checks flag, file and environment.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for item in reversed(options_of(cls)):  # decorators apply from the inside out
            command = _click_option(item)(command)
        return command

    return decorate


def _click_option(item: Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    short = [item.short] if item.short else []
    default = "unset" if item.default is None else str(item.default)
    if item.kind is bool:
        default = item.flag if item.default else item.negative_flag
        names = [*short, f"{item.flag}/{item.negative_flag}", item.name]
        return click.option(*names, default=None, help=f"{item.help}  [default: {default}]")
    metavar = "|".join(item.choices) or (item.unit or item.kind.__name__).upper()
    names = [*short, item.flag, item.name]
    return click.option(*names, metavar=metavar, help=f"{item.help}  [default: {default}]")


def _shape(hint: Any) -> dict[str, Any]:
    """Kind, optional and choices of a type: a plain one, a `Literal` of texts, or either `| None`."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    (kind,) = (part for part in parts if part is not types.NoneType)
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return {"kind": str if choices else kind, "optional": types.NoneType in parts, "choices": choices}


_Given = Iterator[tuple[str, object, str]]  # field name, value, where it came from


def _from_file(known: Mapping[str, Option], file: Path | None) -> _Given:
    if file is None:
        return
    source = f"file {str(file)!r}"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{source} can't be read: {error.strerror}") from error
    except ValueError as error:  # no TOML, or not even UTF-8
        raise ConfigError(f"{source} is not TOML: {error}") from error
    for name, value in table.items():
        if name not in known:
            raise _unknown(known, name, f"key {name!r} in {source}", lambda item: item.name)
        yield name, value, source


def _from_environ(known: Mapping[str, Option], environ: Mapping[str, str]) -> _Given:
    for variable in sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX)):
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        of_a_service = _OF_A_SERVICE.fullmatch(f"{variable}={environ[variable]}")
        if name in known and variable == known[name].variable:
            value, source = known[name].parse(environ[variable]), f"environment {variable}"
            if of_a_service and not known[name].accepts(value):
                raise _not_ours(known[name], value, source)
            yield name, value, source
        elif not of_a_service:
            raise _unknown(known, name, f"environment variable {variable}", lambda item: item.variable)


def _from_flags(known: Mapping[str, Option], flags: Mapping[str, object]) -> _Given:
    for name, value in flags.items():
        if name not in known:
            raise _unknown(known, name, f"option {name!r}", lambda item: item.name)
        if value is not None:
            flag = known[name].negative_flag if value is False else known[name].flag
            yield name, known[name].parse(value) if isinstance(value, str) else value, f"flag {flag}"


def _not_ours(item: Option, value: object, source: str) -> ConfigError:
    """The error for a variable of an option that a Service of Kubernetes has overridden."""
    service = item.variable.removesuffix("_PORT").lower().replace("_", "-")
    return ConfigError(
        f"{item.refusal(value, source)}; Kubernetes sets this variable for a Service called {service}: set"
        " enableServiceLinks: false in the pod, or give the Service another name"
    )


def _unknown(
    known: Mapping[str, Option], name: str, what: str, spelled: Callable[[Option], str]
) -> ConfigError:
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)
    if near:
        return ConfigError(f"unknown {what}; did you mean {spelled(known[near[0]])}?")
    return ConfigError(f"unknown {what}; known: {', '.join(map(spelled, known.values()))}")
