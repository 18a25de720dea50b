"""`tensorferry sweep`: removes the rings whose writer is dead, told by its lock and nothing else."""

from __future__ import annotations

import json

import click

import shm


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sweep(dry_run: bool, as_json: bool) -> None:
    """Remove the segments of dead processes of this user; a living one's is never touched."""
    names = shm.sweep(dry_run=dry_run)
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, "segments": names}, indent=2))
        return
    for name in names:
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}")
    if not names:
        click.echo("nothing to sweep")
