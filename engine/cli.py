"""The command `tensorferry`. What the user got wrong is one line on standard error."""

from __future__ import annotations

import errno
import io
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine import signals
from engine.config import EngineConfig
from engine.doctor import doctor
from engine.environment import placed
from engine.errors import EngineError, OutputError
from engine.keys import keys
from engine.options import ConfigError, options, options_of
from engine.ps import ps
from engine.sweep import sweep
from engine.top import top

# Torch takes seconds to import. What needs it comes when a run begins, so that help and mistakes are quick.
if TYPE_CHECKING:
    from engine.results import RankStatus, Result, Statistics

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


def _version() -> str:
    try:
        return metadata.version("tensorferry")
    except metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), message="tensorferry %(version)s")
def tensorferry() -> None:
    """Moves large tensors between the processes of an inference engine."""


for command in (ps, top, sweep, doctor, keys):
    tensorferry.add_command(command)


@tensorferry.command()
@click.argument("images", nargs=-1, metavar="[IMAGES or FOLDERS]...")
@options(EngineConfig)
@click.option("--config", "config_file", type=Path, metavar="FILE", help="Options as TOML; flags go first.")
@click.option("--print-config", is_flag=True, help="Print the options that hold, and where each is from.")
@click.option("--json", "json_file", type=Path, metavar="FILE", help="Write results and figures as JSON.")
@click.option("--output", type=Path, metavar="FILE", help="Write embeddings as .safetensors or .npz.")
def run(
    images: tuple[str, ...],
    config_file: Path | None,
    print_config: bool,
    json_file: Path | None,
    output: Path | None,
    **flags: Any,
) -> int:
    """Encode photographs on worker processes, and show which way every byte went.

    Without IMAGES, the photographs that come with scikit-image are taken. With --headless there are none:
    this host serves the head, which has them.
    """
    config = EngineConfig.load(flags, environ=os.environ, file=config_file)
    if config.headless and (images or json_file or output):
        raise click.UsageError("--headless takes no images and writes no results: the head does")
    if config.data_parallel_backend == "env":
        config = placed(config, os.environ)
    if print_config:
        click.echo(config.to_toml(), nl=False)
        return 0
    _log_to_stderr(config.log_level)
    if config.headless:
        return _serve(config)
    _check_targets(json_file, output)
    files = _find(images)
    outcome = _encode(config, _repeated(files, config))
    try:
        _write(outcome, config, json_file, output)
    finally:
        _show(outcome)
    return outcome.exit_code


def _serve(config: EngineConfig) -> int:
    from engine.headless import Headless

    host = Headless(config)
    numbers = ", ".join(map(str, config.local_ranks))
    _say(f"rank {numbers} for the head at {host.address}, waiting up to {config.head_timeout:g} s for it")
    host.run()
    _say(f"rank {numbers}: the head ended its run")
    return 0


@dataclass
class _Outcome:
    """What a run came to, complete or not."""

    results: list[Result] = field(default_factory=list)
    ranks: list[RankStatus] = field(default_factory=list)
    statistics: Statistics | None = None
    error: str = ""
    interrupted: int = 0  # the exit code for that

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return self.interrupted
        return _FAILED if self.error or any(result.error for result in self.results) else 0


def _find(images: Sequence[str]) -> list[Path]:
    from engine.images import ImageError, find

    try:
        return find(images)
    except ImageError as error:
        raise click.UsageError(str(error)) from error


def _repeated(files: list[Path], config: EngineConfig) -> list[Path]:
    """As many images as `prompts` prompts need, taken in turn; every file once when it is 0."""
    if not config.prompts:
        return files
    return list(itertools.islice(itertools.cycle(files), config.prompts * config.images_per_prompt))


def _check_targets(json_file: Path | None, output: Path | None) -> None:
    from engine.output import SUFFIXES, check_target

    try:
        if json_file is not None:
            check_target(json_file)
        if output is not None:
            check_target(output, suffixes=SUFFIXES)
    except OutputError as error:
        raise click.UsageError(str(error)) from error


def _encode(config: EngineConfig, files: list[Path]) -> _Outcome:
    from engine.client import Engine

    outcome = _Outcome()
    with _progress() as progress:
        task = progress.add_task("starting", total=None)
        with Engine(config) as engine:
            progress.update(task, description="encoding", total=len(files))
            try:
                for result in engine.encode(files):
                    outcome.results.append(result)
                    progress.advance(task)
                    signals.check()
            except EngineError as error:
                outcome.error = str(error)
            except KeyboardInterrupt as interrupt:
                outcome.interrupted = signals.exit_code(interrupt)
            outcome.ranks = engine.peers
    outcome.statistics = engine.statistics()
    return outcome


def _progress() -> Progress:
    """A bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _write(outcome: _Outcome, config: EngineConfig, json_file: Path | None, output: Path | None) -> None:
    from engine.output import write_json, write_tensors

    assert outcome.statistics is not None
    failed = []
    try:
        if output is not None:
            write_tensors(output, outcome.results)
    except OutputError as error:  # the other file is not lost with it
        failed.append(str(error))
    try:
        if json_file is not None:
            write_json(
                json_file,
                outcome.results,
                config={item.name: getattr(config, item.name) for item in options_of(EngineConfig)},
                statistics=outcome.statistics,
                ranks=outcome.ranks,
                error="interrupted" if outcome.interrupted else outcome.error,
            )
    except OutputError as error:
        failed.append(str(error))
    if failed:
        raise OutputError("; ".join(failed))


def _show(outcome: _Outcome) -> None:
    from engine.console import console
    from engine.report import tables

    assert outcome.statistics is not None
    console().print(tables(outcome.results, outcome.statistics, outcome.ranks))
    for result in outcome.results:
        if result.error:
            _say(result.error)
    if outcome.error:
        _say(outcome.error)
    if outcome.interrupted:
        _say(f"interrupted after {len(outcome.results)} images")


class _StandardError(logging.Handler):
    """One line for each record, to what is standard error now: the progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(f"{record.levelname.lower()}: {record.getMessage()}")


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(level=level.upper(), handlers=[_StandardError()], force=True)


def _say(message: str) -> None:
    print(f"tensorferry: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 1 something failed, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM."""
    signals.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where it has not all our signs, it shows the rest
    try:
        code = tensorferry.main(arguments, prog_name="tensorferry", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return _USAGE
    except click.ClickException as error:
        _say(error.format_message() + _where_to_look(error))
        return error.exit_code
    except ConfigError as error:
        _say(str(error))
        return _USAGE
    except (click.Abort, KeyboardInterrupt) as error:
        _say("interrupted")
        return signals.exit_code(error) if isinstance(error, KeyboardInterrupt) else _INTERRUPTED
    except EngineError as error:
        _say(str(error))
        return _FAILED
    except OSError as error:
        if error.filename is not None or not _output_is_lost():
            raise
        if error.errno != errno.EPIPE:  # who closes the pipe, as `head` does, wants no more
            _say(f"standard output can't be written: {error.strerror}")
        return _FAILED
    return code if isinstance(code, int) else 0


def _where_to_look(error: click.ClickException) -> str:
    """Which help tells what there is, of a mistake in the use of a command."""
    if not isinstance(error, click.UsageError) or error.ctx is None:
        return ""
    return f" (see {error.ctx.command_path} --help)"


def _output_is_lost() -> bool:
    """Whether standard output takes no end of line; if so, it is dropped from now on, also at the exit."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
