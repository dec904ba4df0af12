"""Links between patient keys: merged, taken back, and what that does to pairs.

What headers say stays as it is; a link says that two keys are one patient. Whatever the order in
which links come and go, pairs are those of the patients that the links which hold make.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import DeliveryKind, DeliveryState, PatientKey
from dicomnode.store.fetches import AskPriors, ask_priors_of
from dicomnode.store.identity import hold_identity, of_keys, patient_keys, regroup
from dicomnode.store.pairs import ask_offsets_between, drop_offsets_between, series_of_keys
from dicomnode.store.retelling import retell
from dicomnode.store.session import insert

UNLINKED = "not one patient any more"


class LinkSource(StrEnum):
    """Who said that two keys are one patient."""

    CLI = "cli"
    HL7 = "hl7"


@dataclass(frozen=True, slots=True)
class Link:
    """Two patient keys that are, or were, one patient."""

    id: int
    merged: PatientKey
    into: PatientKey
    source: LinkSource
    control_id: str
    linked_at: datetime
    unlinked_at: datetime | None  # None: it holds


@dataclass(frozen=True, slots=True)
class Changed:
    """What a link that came or went did."""

    link: Link
    is_new: bool  # False: it was so already, and nothing was done
    pairs: int = 0  # of Series: asked for, or dropped
    together: bool = True  # whether both keys are one patient now
    delivered: int = 0  # registrations of dropped pairs that a peer has


def link_patients(
    session: Session,
    merged: PatientKey,
    into: PatientKey,
    source: LinkSource,
    now: datetime,
    control_id: str = "",
    priors: AskPriors | None = None,
) -> Changed:
    """Say that two patient keys are one patient, and ask for the pairs that brings.

    And, where `priors` says whom, for earlier Studies that an archive has under either key.

    Raises
    ------
    ValueError
        If a key is nobody's, or both are the same.
    """
    if not (merged.known and into.known):
        raise ValueError("an empty Patient ID is nobody")
    if merged == into:
        raise ValueError("both are the same")
    hold_identity(session, exclusive=True)
    known = _links_between(session, merged, into)
    if known:
        return Changed(_link(known[0]), is_new=False)
    ours, theirs = patient_keys(session, merged), patient_keys(session, into)
    row = schema.PatientLink(
        merged_id=merged.patient_id,
        merged_issuer=merged.issuer,
        into_id=into.patient_id,
        into_issuer=into.issuer,
        source=source,
        control_id=control_id[:199],
        linked_at=now,
    )
    session.add(row)
    session.flush()
    if into in ours:  # by other links: this one holds when those go
        return Changed(_link(row), is_new=True)
    regroup(session, [*ours, *theirs])
    if priors is not None:
        ask_priors_of(session, priors, [*ours, *theirs], now)
    return Changed(_link(row), True, ask_offsets_between(session, ours, theirs, now))


def unlink_patients(session: Session, link_id: int, now: datetime) -> Changed | None:
    """Take a link back, and drop the pairs that rested on it; None where there is no such link."""
    hold_identity(session, exclusive=True)
    row = session.get(schema.PatientLink, link_id, populate_existing=True)
    if row is None:
        return None
    if row.unlinked_at is not None:
        return Changed(_link(row), is_new=False, together=False)
    merged = PatientKey(row.merged_id, row.merged_issuer)
    into = PatientKey(row.into_id, row.into_issuer)
    row.unlinked_at = now
    session.flush()
    regroup(session, patient_keys(session, merged))
    ours, theirs = patient_keys(session, merged), patient_keys(session, into)
    if into in ours:  # by other links
        return Changed(_link(row), is_new=True)
    pairs = drop_offsets_between(session, ours, theirs)
    delivered = _drop_deliveries(session, ours, theirs, now)
    return Changed(_link(row), True, pairs, together=False, delivered=delivered)


def unlink_between(
    session: Session, one: PatientKey, other: PatientKey, now: datetime
) -> list[Changed]:
    """Take back the links that say of these two keys themselves that they are one patient."""
    hold_identity(session, exclusive=True)
    found = (unlink_patients(session, r.id, now) for r in _links_between(session, one, other))
    return [changed for changed in found if changed is not None]


def list_links(
    session: Session,
    *,
    patient: PatientKey | None = None,
    every: bool = False,
    limit: int | None = None,
) -> list[Link]:
    """Return links, the newest first.

    Parameters
    ----------
    patient
        Only those of today's patient that this key belongs to, and with `every` those that were
        taken back and name one of its keys.
    every
        Those that were taken back, too.
    """
    links = schema.PatientLink
    query = select(links).order_by(links.id.desc()).limit(limit)
    if not every:
        query = query.where(links.unlinked_at.is_(None))
    if patient is not None:
        keys = patient_keys(session, patient)
        query = query.where(
            or_(
                of_keys(links.merged_id, links.merged_issuer, keys),
                of_keys(links.into_id, links.into_issuer, keys),
            )
        )
    return [_link(row) for row in session.scalars(query)]


def is_known(session: Session, key: PatientKey) -> bool:
    """Whether a Series or a link names this patient key."""
    return key.issuer in issuers_of(session, key.patient_id)


def issuers_of(session: Session, patient_id: str) -> list[str]:
    """Return the issuers with which a PatientID is known here, from Series and links."""
    series, links = schema.Series, schema.PatientLink
    found: set[str] = set()
    for issuer, id_ in (
        (series.issuer, series.patient_id),
        (links.merged_issuer, links.merged_id),
        (links.into_issuer, links.into_id),
    ):
        found |= set(session.scalars(select(issuer).where(id_ == patient_id).distinct()))
    return sorted(found)


def take_message(session: Session, parts: Iterable[str], now: datetime) -> bool:
    """Note that a message was taken; False where it was taken before, and nothing is to be done.

    `parts` are what makes the message this one: who sent it, its number, and what it says, since
    there are senders whose numbers begin anew.
    """
    hold_identity(session, exclusive=True)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    known = select(schema.PatientMessage.digest).where(schema.PatientMessage.digest == digest)
    if session.scalar(known) is not None:
        return False
    values = {"digest": digest, "taken_at": now}
    session.execute(insert(session, schema.PatientMessage).values(values))
    return True


def _links_between(
    session: Session, one: PatientKey, other: PatientKey
) -> list[schema.PatientLink]:
    """Return the links that hold of two keys, whichever was merged into which."""
    links = schema.PatientLink
    found: list[schema.PatientLink] = []
    for merged, into in ((one, other), (other, one)):
        found += session.scalars(
            select(links).where(
                of_keys(links.merged_id, links.merged_issuer, [merged]),
                of_keys(links.into_id, links.into_issuer, [into]),
                links.unlinked_at.is_(None),
            )
        )
    return found


def _drop_deliveries(
    session: Session, ours: Sequence[PatientKey], theirs: Sequence[PatientKey], now: datetime
) -> int:
    """Drop registrations that wait, of Studies of two patients; return how many are out.

    What is on its way at this moment may still arrive. Webhooks are told that the pairs are gone.
    """
    rows, study_uid = schema.Delivery, schema.Series.study_uid
    mine, others = series_of_keys(ours, study_uid), series_of_keys(theirs, study_uid)
    # A Study that has Series of both may have pairs left: who makes the object will see.
    only_mine, only_others = (
        mine.where(study_uid.not_in(others)),
        others.where(study_uid.not_in(mine)),
    )
    out = 0
    for fixed, moving in ((only_mine, only_others), (only_others, only_mine)):
        about = and_(rows.subject.in_(fixed), rows.other.in_(moving))
        retell(session, now, rows.kind == DeliveryKind.WEBHOOK, about)
        about = and_(about, rows.kind == DeliveryKind.REGISTRATION)
        session.execute(
            update(rows)
            .where(about, rows.state == DeliveryState.WAITING)
            .values(
                state=DeliveryState.DROPPED,
                reason=UNLINKED,
                due_at=now,
                version=rows.version + 1,  # what is being sent at this moment settles nothing
            )
            .execution_options(synchronize_session=False)
        )
        sent = about, rows.done_at.is_not(None)
        out += session.scalar(select(func.count()).select_from(rows).where(*sent)) or 0
        session.execute(  # what is done stays so, but for what a person is to know of it
            update(rows)
            .where(about, rows.state == DeliveryState.DONE)
            .values(reason=UNLINKED)
            .execution_options(synchronize_session=False)
        )
    return out


def _link(row: schema.PatientLink) -> Link:
    return Link(
        id=row.id,
        merged=PatientKey(row.merged_id, row.merged_issuer),
        into=PatientKey(row.into_id, row.into_issuer),
        source=LinkSource(row.source),
        control_id=row.control_id,
        linked_at=row.linked_at,
        unlinked_at=row.unlinked_at,
    )
