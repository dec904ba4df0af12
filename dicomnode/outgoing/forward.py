"""The Instances that a rule sends on: a Series as it was received, or the slices of a region."""

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from dicomnode import dicomio, store
from dicomnode.config import Rule, Settings
from dicomnode.core import geometry, region
from dicomnode.dicomio import Identity
from dicomnode.errors import DicomError
from dicomnode.held import Held
from dicomnode.outgoing import Nothing, Outgoing, circle
from dicomnode.outgoing.matched import met
from dicomnode.outgoing.standing import Standing
from dicomnode.rules import region_of
from dicomnode.store import Delivery, Match


def make(engine: Engine, settings: Settings, delivery: Delivery) -> Sequence[Outgoing]:
    """Return what is held of the Series that a delivery is about, as far as its rule wants it.

    In the order of their names; bytes and transfer syntax are those that were received. Nothing
    is read before it is its turn but what says which object it is.

    Raises
    ------
    Nothing
        If the rule is gone or altered, the Series does not meet it any more, it shows nothing of
        the rule's region, nothing of it is held any more, or the destination made it.
    NotYet
        If it is arriving again: once it is finished, it is asked for anew where it is to go still.
    DicomError
        If the disk damaged what was held, or it names another patient or Study than the database:
        later attempts may find what the archive corrected.
    """
    with store.reading(engine) as session:
        rule, found = met(session, settings, delivery)
        wanted = None if rule.region is None else _slices(session, rule, found)
        files = held_of(settings, found.study_uid, found.series_uid)
        # What a rejection note took back goes nowhere.
        rejected = store.rejected_of(session, list(files))
        files = {uid: file for uid, file in files.items() if uid not in rejected}
    if not files:
        _check_mounted(settings)
        raise Nothing("its pixels are not held any more")
    chosen = [uid for uid in files if wanted is None or uid in wanted]
    if not chosen:
        raise Nothing(f"no slice that is held shows {rule.region}")
    told = {uid: _identity(files[uid]) for uid in chosen}
    standing = Standing(engine, found.series_uid, chosen, settings.node.placeholder_ids)
    for one in told.values():  # before anything is sent: as one patient's, or not at all
        standing.check(one)
    others = circle.of_others(told, delivery.what.destination)
    with store.reading(engine) as session:
        circle.check(session, told.values(), found, delivery.what.destination)
    return [
        Outgoing(
            one.sop_class_uid,
            one.sop_instance_uid,
            one.transfer_syntax_uid,
            partial(_read, files[uid], one, standing),
        )
        for uid, one in others.items()
    ]


def held_of(settings: Settings, study_uid: str, series_uid: str) -> dict[str, Path]:
    """Return SOP Instance UID -> file of what is held of a Series."""
    # Where the setting changed, what was held before lies at the other place.
    places = [settings.held_path]
    if settings.keep.dicom_path is not None:
        places.append(settings.keep.dicom_path)
    files: dict[str, Path] = {}
    for place in places:
        try:
            files |= Held(place).instances(study_uid, series_uid)
        except OSError as exc:
            raise _unreadable(exc) from exc
    return dict(sorted(files.items()))


def _check_mounted(settings: Settings) -> None:
    """Raise where nothing at all lies in the folder in which everything is kept for good."""
    path = settings.keep.dicom_path
    try:
        if path is not None and not any(path.iterdir()):
            raise DicomError("keep.dicom_path is empty: is its disk mounted?")
    except OSError as exc:
        raise DicomError(f"keep.dicom_path cannot be read: {exc.strerror}") from exc


def _slices(session: Session, rule: Rule, found: Match) -> set[str]:
    """Return the SOP Instance UIDs of slices that show a rule's region, or lie near it."""
    curve = store.curve_of(session, found.series_uid)
    if curve is None:
        raise Nothing("the Series has no curve any more")
    wanted = region_of(rule, store.regions_of(session, curve.model))
    if wanted is None:
        raise Nothing(f"the bundle that made the curve does not know {rule.region}")
    ends = region.bounds(curve.z_mm, curve.height_mm, wanted, rule.margin_mm)
    if ends is None:
        return set()
    first, last = ends
    uids = set(curve.sop_instance_uids[first : last + 1])
    # Where several slices lie at one position, of phases perhaps, the curve has but one of them.
    beside = store.slices_beside(session, found.id)
    if beside:
        normal = geometry.slice_normal(beside[0].image_orientation)
        z_mm = geometry.slice_positions(np.array([s.image_position for s in beside]), normal)
        low, high = curve.z_mm[[first, last]] + np.array([-1, 1]) * geometry.SAME_POSITION_MM
        uids |= {s.sop_instance_uid for s, z in zip(beside, z_mm, strict=True) if low <= z <= high}
    return uids


def _identity(source: Path | BytesIO) -> Identity:
    try:
        return dicomio.identity(source)
    except OSError as exc:
        raise _unreadable(exc) from exc


def _read(file: Path, told: Identity, standing: Standing) -> bytes:
    """Return a file as it goes out, where it is still what was looked at and may still go."""
    try:
        data = file.read_bytes()
    except OSError as exc:
        raise _unreadable(exc) from exc
    # Of these bytes: the Series may have been sent again meanwhile, in another transfer syntax
    # than the peer is about to be told.
    now = _identity(BytesIO(data))
    if _encoded(now) != _encoded(told):
        raise DicomError("it was sent again meanwhile")
    standing.check(now)
    return dicomio.with_group_length(data)


def _encoded(told: Identity) -> tuple[str, str, str]:
    return told.sop_class_uid, told.sop_instance_uid, told.transfer_syntax_uid


def _unreadable(exc: OSError) -> DicomError:
    if isinstance(exc, FileNotFoundError):  # dropped by hand, or rule_days were over
        return DicomError("its pixels are not held any more")
    return DicomError(f"its pixels cannot be read: {exc.strerror}")
