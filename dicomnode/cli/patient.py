"""Commands about who is one patient: patient merge, unmerge, links."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dicomnode import config as configuration
from dicomnode.audit import Act
from dicomnode.cli.database import config_path, opened, write_audit
from dicomnode.cli.options import config_option, json_option
from dicomnode.cli.output import nothing, print_json, table_console
from dicomnode.core import placeholder
from dicomnode.model import PatientKey

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@click.group()
def patient() -> None:
    """Say which Patient IDs are one patient, or take that back.

    A patient is written as ID^^^ISSUER, as in HL7; ID^^^ is one without an issuer. The ID alone
    will do where the node knows it with one issuer.
    """


@patient.command()
@click.argument("merged", metavar="FROM")
@click.argument("into", metavar="INTO")
@click.option("--force", is_flag=True, help="Also where the node knows nothing of one of them yet.")
@config_option
@json_option
def merge(merged: str, into: str, force: bool, config: Path | None, as_json: bool) -> None:
    """Make two Patient IDs one patient: pairs of all their Studies are computed.

    Headers stay as they are, and what arrives under either ID later belongs to both.

    \b
    Example:  dicomnode patient merge 4711^^^HOSPITAL 0815^^^HOSPITAL
    """
    from dicomnode import present, store

    settings = configuration.load(config_path(config))
    own = settings.node
    priors = store.AskPriors(settings.priors.names, settings.priors.recent_days)
    with opened(config) as engine:
        with store.writing(engine) as session:
            keys = [
                _patient_key(session, text, own.default_issuer, force) for text in (merged, into)
            ]
            names = own.placeholder_ids
            if any(placeholder.is_placeholder(key.patient_id, names) for key in keys):
                raise click.UsageError(
                    "a placeholder is nobody (node.placeholder_ids): all who ever had it would "
                    "become one patient"
                )
            try:
                how = store.LinkSource.CLI, datetime.now(UTC), "", priors
                changed = store.link_patients(session, keys[0], keys[1], *how)
            except ValueError as exc:
                raise click.UsageError(str(exc)) from exc
    link = changed.link
    if changed.is_new:
        write_audit(config, Act.PATIENTS_LINKED, source="cli", link=link.id, pairs=changed.pairs)
    if as_json:
        print_json({**present.link_json(link), "pairs": changed.pairs})
    elif changed.is_new:
        click.echo(f"link {link.id}: one patient; {changed.pairs} pairs are computed")
    else:
        click.echo(f"one patient already, by link {link.id}")


@patient.command()
@click.argument("link_id", metavar="ID", type=click.IntRange(1))
@config_option
@json_option
def unmerge(link_id: int, config: Path | None, as_json: bool) -> None:
    """Take a link back, by its number in `dicomnode patient links`: pairs across it are dropped.

    \b
    Example:  dicomnode patient unmerge 17
    """
    from dicomnode import present, store

    with opened(config) as engine, store.writing(engine) as session:
        changed = store.unlink_patients(session, link_id, datetime.now(UTC))
    if changed is None:
        nothing("no such link; see `dicomnode patient links`")
    if changed.is_new:
        write_audit(config, Act.PATIENTS_UNLINKED, source="cli", link=link_id, pairs=changed.pairs)
    if as_json:
        found = {"pairs": changed.pairs, "together": changed.together}
        print_json({**present.link_json(changed.link), **found, "delivered": changed.delivered})
        return
    if not changed.is_new:
        click.echo(f"link {link_id} was taken back before")
    elif changed.together:
        click.echo(f"link {link_id} taken back; other links still make them one patient")
    else:
        click.echo(f"link {link_id} taken back; {changed.pairs} pairs dropped")
    if changed.delivered:
        click.echo(
            f"{changed.delivered} registrations of such pairs were delivered, and stay where they "
            "are: see `dicomnode deliveries`",
            err=True,
        )


@patient.command()
@click.option("--patient", "text", help="Of this patient alone, as ID^^^ISSUER.")
@click.option("--all", "every", is_flag=True, help="Those that were taken back, too.")
@click.option("--limit", default=200, show_default=True)
@config_option
@json_option
def links(text: str | None, every: bool, limit: int, config: Path | None, as_json: bool) -> None:
    """List which Patient IDs were made one patient, by whom and when, the newest first.

    \b
    Example:  dicomnode patient links --patient 4711^^^HOSPITAL --all
    """
    from dicomnode import present, store

    default = configuration.load(config_path(config)).node.default_issuer
    with opened(config) as engine, store.reading(engine) as session:
        write_audit(config, Act.QUERY, command="patient links", by_patient=True if text else None)
        asked = None if text is None else _patient_key(session, text, default, True)
        found = store.list_links(session, patient=asked, every=every, limit=limit)
    if as_json:
        print_json([present.link_json(link) for link in found])
    elif found:
        table_console().print(present.link_table(found))
    if not found:
        nothing("no such link")


def _patient_key(session: "Session", text: str, default_issuer: str, force: bool) -> PatientKey:
    """Return the patient that somebody wrote as ID or ID^^^ISSUER."""
    from dicomnode import store

    patient_id, named, issuer = text.partition("^^^")
    key = PatientKey(patient_id.strip(" "), issuer.strip(" "))
    if not key.known:
        raise click.UsageError("an empty Patient ID is nobody")
    if any(len(v) > 64 or "\\" in v or not v.isprintable() for v in (key.patient_id, key.issuer)):
        raise click.UsageError("not what a Patient ID or its issuer may be (PS3.5, LO)")
    issuers = store.issuers_of(session, key.patient_id)
    if not named:
        if len(issuers) > 1:
            known = ", ".join(repr(name) for name in issuers)
            raise click.UsageError(f"{text}: known of several issuers, {known}: write ID^^^ISSUER")
        key = PatientKey(key.patient_id, issuers[0] if issuers else default_issuer)
    if key.issuer not in issuers and not force:
        nothing(
            f"{text}: no Series and no link has this patient; --force remembers it all the same"
        )
    return key
