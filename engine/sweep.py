"""`tensorferry sweep`: removes the rings and folders of the dead, told by their locks and nothing else."""

from __future__ import annotations

import json

import click

import shm
from engine import folders
from engine.segments import readable


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@readable()
def sweep(dry_run: bool, as_json: bool) -> None:
    """Remove the segments and folders of dead processes of this user; a living one's are never touched."""
    names, paths = shm.sweep(dry_run=dry_run), folders.sweep(dry_run=dry_run)
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, "segments": names, "folders": paths}, indent=2))
        return
    for found in (*names, *paths):
        click.echo(f"{'would remove' if dry_run else 'removed'} {found}")
    if not names and not paths:
        click.echo("nothing to sweep")
