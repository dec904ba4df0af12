"""Commands that set a node up: db, token."""

import sys
from pathlib import Path

import click

from dicomnode import config as configuration
from dicomnode.cli.database import config_path, opened, schema_errors
from dicomnode.cli.options import config_option
from dicomnode.cli.output import progress
from dicomnode.errors import ConfigError


@click.command()
@click.argument("role", type=click.Choice(["read", "admin"]))
@click.argument("name")
@config_option
def token(role: str, name: str, config: Path | None) -> None:
    """Make a token that lets NAME into the page, and print it; it is shown this once.

    Its SHA-256 is written to [web] token_file. Take its line out to shut NAME out again; the page
    reads the file anew by itself.

    \b
    Example:  dicomnode token read viewer --config node.toml
    """
    from dicomnode.web import tokens

    path = configuration.load(config_path(config)).web.token_file
    if path is None:
        raise ConfigError("web.token_file: not set, so there is no file to write to")
    click.echo(tokens.add(path, tokens.Holder(name, tokens.Role(role))))


@click.group()
def db() -> None:
    """Look after the database."""


@db.command()
@config_option
def upgrade(config: Path | None) -> None:
    """Bring the database to the schema of this version; safe to repeat.

    \b
    Example:  dicomnode db upgrade --config node.toml
    """
    from db import migrate
    from dicomnode import store

    with opened(config, checked=False) as engine, schema_errors():
        migrate.upgrade(engine)
        click.echo(migrate.current(engine))
        if missing := store.count_uncovered(engine):
            with progress("what curves cover", missing) as advance:
                done = store.cover_curves(engine, advance)
            click.echo(f"what {done} curves cover was stored, for mining", err=True)


@db.command()
@config_option
def current(config: Path | None) -> None:
    """Print the revision of the database, and the one this version needs.

    \b
    Example:  dicomnode db current
    """
    from db import migrate

    with opened(config, checked=False) as engine, schema_errors():
        now = migrate.current(engine)
    click.echo(f"{now or 'empty'} (this version needs {migrate.head()})")
    sys.exit(0 if now == migrate.head() else 1)
