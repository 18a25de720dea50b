"""`tensorferry keys`: makes the key pairs with which links over tcp are encrypted and their ends known."""

from __future__ import annotations

from pathlib import Path

import click

_NAMES = ("head", "rank")


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
@click.option("--name", "names", multiple=True, metavar="NAME", help="A pair to make [head and rank].")
def keys(folder: Path, names: tuple[str, ...]) -> None:
    """Make key pairs in DIR: NAME.key_secret, for its owner alone, and clients/NAME.key, which others know.

    Keep DIR on the hosts that need it. Who listens takes its own secret key and the folder `clients`; who
    connects takes its own secret key and the public key of who listens.
    """
    import transport  # here, since it takes seconds

    public = folder / "clients"
    for name in names or _NAMES:
        try:
            public.mkdir(parents=True, exist_ok=True, mode=0o700)
            secret = transport.make_keys(folder, name, public=public)
        except OSError as error:
            why = f"{error.filename}: {error.strerror}" if error.strerror else str(error)
            raise click.ClickException(why) from error
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"{secret}: for {name} alone; {public / name}.key: for who talks to it")
    click.echo(
        f"who listens:  --curve-key {folder}/{(names or _NAMES)[0]}.key_secret --curve-clients {public}\n"
        f"who connects: --curve-key {folder}/{(names or _NAMES)[-1]}.key_secret"
        f" --curve-server {public}/{(names or _NAMES)[0]}.key"
    )
