"""The command line: a thin face over `query`, `files` and `node.serve`.

Tables and JSON go to stdout, messages and progress to stderr. Exit status 0; 1: nothing found,
or refused; 2: wrong usage or setting.

What needs torch, a database or matplotlib is imported by the command that uses it, so that `--help`
and the receiver start without.
"""

from typing import Any

import click

from dicomnode import log
from dicomnode.cli import ask, exchange, files, mine, node, patient, setup
from dicomnode.errors import ConfigError, ExpressionError, NodeError, WeightsError


class _Group(click.Group):
    """Turns what the node raises on purpose into a message and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NodeError as exc:
            click.echo(f"Error: {exc}", err=True)
            ctx.exit(2 if isinstance(exc, ConfigError | WeightsError | ExpressionError) else 1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dicomnode-ssbr")
def main() -> None:
    """A DICOM node that scores CT slices by body height and aligns timepoints.

    \b
    dicomnode demo                          see it work, with phantom patients
    dicomnode score FOLDER                  score files, without a node
    dicomnode serve --config node.toml      run the node
    """
    # What pydicom warns of quotes values of the data set: whatever the command, it stays silent.
    log.setup("WARNING", json=False)


for _command in (
    node.demo,
    node.serve,
    node.check,
    node.import_,
    node.rescore,
    node.spool,
    files.score,
    files.regions,
    files.align,
    ask.series,
    ask.curve,
    ask.offset,
    ask.view,
    ask.slices,
    mine.mine,
    exchange.fetches,
    exchange.deliveries,
    patient.patient,
    setup.token,
    setup.db,
):
    main.add_command(_command)
