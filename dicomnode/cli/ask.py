"""Commands that ask a node's database: series, curve, offset, view, slices."""

import sys
from pathlib import Path

import click

from dicomnode.audit import Act
from dicomnode.cli.database import opened, write_audit
from dicomnode.cli.options import (
    FILE,
    METHODS,
    config_option,
    csv_option,
    json_option,
    png_option,
    registration_option,
    transform_option,
)
from dicomnode.cli.output import (
    answer_offset,
    nothing,
    print_json,
    table_console,
    write_curves,
    write_registration,
    write_report,
)
from dicomnode.model import Method, OffsetStatus, SeriesState


@click.command()
@click.option("--patient", help="Patient ID.")
@click.option("--study", help="Study Instance UID.")
@click.option("--state", type=click.Choice([s.value for s in SeriesState]))
@click.option("--limit", default=200, show_default=True)
@config_option
@json_option
def series(
    patient: str | None,
    study: str | None,
    state: str | None,
    limit: int,
    config: Path | None,
    as_json: bool,
) -> None:
    """List Series and where they stand, the newest first; open ones with slices scored so far.

    \b
    Example:  dicomnode series --state quarantined
    """
    from dicomnode import present, store

    with opened(config) as engine, store.reading(engine) as session:
        # That a patient was asked for, but not which: the audit log names none.
        write_audit(
            config,
            Act.QUERY,
            command="series",
            study_uid=study,
            by_patient=True if patient else None,
            state=state,
        )
        rows = store.list_series(
            session,
            patient_id=patient,
            study_uid=study,
            state=SeriesState(state) if state else None,
            limit=limit,
        )
        quarantined = store.count_quarantined(session)
        asked = state == SeriesState.QUARANTINED
        details = store.list_quarantined(session, limit) if asked else []
    if as_json:
        print_json([present.series_json(r) for r in rows])
    elif rows:
        table_console().print(present.series_table(rows))
    for name, reason, detail in details:
        click.echo(f"{name}  {reason}  {detail}", err=True)
    if quarantined:
        detail = ", ".join(f"{reason} {n}" for reason, n in sorted(quarantined.items()))
        click.echo(f"{sum(quarantined.values())} files in quarantine: {detail}", err=True)
    if not rows:
        nothing("no such Series")


@click.command()
@click.argument("series_uid")
@config_option
@json_option
@csv_option
@png_option
@click.option("--report", type=FILE, help="Write a DICOM SR of what the Series covers.")
def curve(
    series_uid: str,
    config: Path | None,
    as_json: bool,
    csv_path: Path | None,
    png_path: Path | None,
    report: Path | None,
) -> None:
    """Show the body-height curve of one Series.

    \b
    Example:  dicomnode curve 1.2.840.113619.2.55 --png curve.png
    """
    from dicomnode import plot, present, query

    with opened(config) as engine:
        write_audit(config, Act.QUERY, command="curve", series_uid=series_uid)
        found = query.series_curve(engine, series_uid)
        if report and found and found.curve:
            known = query.source_of(engine, found.curve)
            write_report(report, known.curve, known.regions, known.source, known.origin)
    if found is None:
        nothing("the node never saw this Series")
    row = found.series
    if found.curve is None:
        if row.state is not SeriesState.OPEN:
            nothing(f"no curve: {row.state}:{row.reason}")
        if len(found.live_z_mm) > 1:
            click.echo(plot.curve_text(found.live_z_mm, found.live_height_mm))
        nothing(f"still arriving: {row.scored} slices scored of {row.received} received")
    write_curves([found.curve], csv_path, png_path)
    if as_json:
        print_json(present.curve_json(found.curve, found.regions))
    else:
        click.echo(plot.curve_text(found.curve.z_mm, found.curve.height_mm))
        click.echo(present.quality_line(found.curve, found.regions))


@click.command()
@click.argument("fixed_study")
@click.argument("moving_study")
@click.option("--method", type=METHODS, help="The best one where none is named.")
@config_option
@json_option
@transform_option
@registration_option
@png_option
def offset(
    fixed_study: str,
    moving_study: str,
    method: str | None,
    config: Path | None,
    as_json: bool,
    transform: Path | None,
    registration: Path | None,
    png_path: Path | None,
) -> None:
    """Tell the offset that aligns one Study onto another: z_fixed = z_moving + offset.

    \b
    Example:  dicomnode offset FIXED_STUDY_UID MOVING_STUDY_UID --transform start.tfm
    """
    from dicomnode import query

    with opened(config) as engine:
        write_audit(config, Act.QUERY, command="offset", study_uid=[fixed_study, moving_study])
        answer = query.pair(engine, fixed_study, moving_study, Method(method) if method else None)
        if answer is None:
            nothing("no pair of curves of these two Studies; see `dicomnode series --study UID`")
        if registration and answer.stored.offset.status is not OffsetStatus.REFUSED:
            fixed, moving = (query.source_of(engine, c) for c in (answer.fixed, answer.moving))
            origin = fixed.origin_with(moving)
            write_registration(registration, answer, fixed.source, moving.source, origin)
    answer_offset(answer, as_json, transform, png_path)


@click.command()
@click.argument("series_uid")
@click.argument("region")
@config_option
@json_option
def view(series_uid: str, region: str, config: Path | None, as_json: bool) -> None:
    """Tell which slice of a Series to open first for a region, by name or SNOMED CT code.

    Exit status 1 where the region is not shown; then the nearest slice is told.

    \b
    Example:  dicomnode view 1.2.840.113619.2.55 liver
              dicomnode view 1.2.840.113619.2.55 10200004 --json
    """
    from dicomnode import present, query

    with opened(config) as engine:
        write_audit(config, Act.QUERY, command="view", series_uid=series_uid)
        found = query.view(engine, series_uid, region)
    if found is None:
        nothing("no curve of this Series; see `dicomnode series`")
    if as_json:
        print_json(present.view_json(found))
    else:
        click.echo(present.view_line(found), err=found.place is None)
    sys.exit(0 if found.place else 1)


@click.command()
@click.argument("fixed_study")
@click.argument("moving_study")
@click.option("--method", type=METHODS, help="The best one where none is named.")
@config_option
@json_option
def slices(
    fixed_study: str,
    moving_study: str,
    method: str | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Tell which slice of one Study shows what a slice of another does, by their offset.

    Each slice of the fixed Series with the nearest of the moving one, feet to head; "-" where
    there is none within half a slice.

    \b
    Example:  dicomnode slices FIXED_STUDY_UID MOVING_STUDY_UID
              dicomnode slices FIXED_STUDY_UID MOVING_STUDY_UID --method l1 --json
    """
    from dicomnode import present, query

    with opened(config) as engine:
        write_audit(config, Act.QUERY, command="slices", study_uid=[fixed_study, moving_study])
        named = Method(method) if method else None
        found = query.slice_map(engine, fixed_study, moving_study, named)
    if found is None:
        nothing("no pair of curves of these two Studies; see `dicomnode series --study UID`")
    if as_json:
        print_json(present.map_json(found))
    elif found.slices:
        table_console().print(present.map_table(found))
    if not found.slices:
        nothing(f"refused: {found.stored.offset.reason}")
    if all(m.moving is None for m in found.slices):
        nothing("no slice of one lies beside one of the other")
