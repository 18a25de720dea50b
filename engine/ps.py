"""`tensorferry ps`: the rings in /dev/shm, whose they are, how full, who reads them; or one, by record."""

from __future__ import annotations

import dataclasses
import json

import click

import shm
from engine.console import console
from engine.segments import all_segments, find, readable, records_table, segments_tables


@click.command()
@click.argument("segment", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes in bytes, times in seconds.")
@readable()
def ps(segment: str | None, as_json: bool) -> None:
    """List the segments of this user in /dev/shm, or the records of one SEGMENT.

    SEGMENT: as much of its name, or of the eight letters that the list shows, as makes it the only one.
    It only looks: no living process notices.
    """
    if segment is None:
        _list(as_json=as_json)
    else:
        _look_into(find(segment), as_json=as_json)


def _list(*, as_json: bool) -> None:
    segments = all_segments()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(info) for info in segments], indent=2))
        return
    if not segments:
        click.echo("no segments")
        return
    console().print(segments_tables(segments, full_names=not console().is_terminal))
    if not all(info.alive for info in segments):
        click.echo("The dead hold memory until the next start or: tensorferry sweep")


def _look_into(name: str, *, as_json: bool) -> None:
    try:
        info, records = shm.describe(name), shm.records(name)
    except shm.ShmError as error:
        raise click.ClickException(f"{name}: {error}") from error
    if as_json:
        lines = [dataclasses.asdict(record) for record in records]
        click.echo(json.dumps({"segment": dataclasses.asdict(info), "records": lines}, indent=2))
        return
    click.echo(name)
    console().print(segments_tables([info], full_names=False))
    if records:
        console().print(records_table(records))
    elif not info.unpublished:
        click.echo("no records")
    if info.unpublished:
        nbytes = shm.human(info.unpublished_nbytes)
        click.echo(f"not listed: {info.unpublished} records ({nbytes}) that the owner alone has")
