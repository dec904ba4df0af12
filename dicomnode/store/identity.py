"""Who is one patient: patient keys that links tie together, and the lock that keeps them so.

Today's patients are the connected components of the links that hold; `patient_member` keeps
those of more than one key, so that one look in an index tells them.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, tuple_
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import PatientKey
from dicomnode.store.session import upsert

T = TypeVar("T")

# Any number will do, as long as it stays and no other lock of this database has it.
IDENTITY_LOCK = 0x70_61_74_69_65_6E_74_73  # "patients"
KEYS = 100  # in a condition


def hold_identity(session: Session, *, exclusive: bool = False) -> None:
    """Keep who is one patient as it is until the transaction ends.

    Taken by every transaction that asks for pairs, stores or drops their offsets: shared, so
    that these do not wait for each other. Whoever changes who is one patient takes it for
    itself, and so neither misses the pairs of a Series that is finished meanwhile nor leaves
    some across a cut. SQLite has one writer at a time, which is lock enough.

    A transaction takes its locks in this order, and no lock of a kind that comes before one it
    has, so that nobody who waits holds what the holder wants:

    1. between slices and rejection notes, `hidden.lock_rejections`
    2. this one; alone, where it may be needed alone: nobody who has it shared asks for more
    3. rows of `series`, by UID; those of one Study that move along, under 2 held alone
    4. the lock of one patient, `pairs.ask_offsets`
    5. rows of `offset`, then of the outbox and of what peers are asked for
    """
    if session.get_bind().dialect.name == "postgresql":
        lock = func.pg_advisory_xact_lock if exclusive else func.pg_advisory_xact_lock_shared
        session.execute(select(lock(IDENTITY_LOCK)))


def group_of(session: Session, key: PatientKey) -> int | None:
    """Return the group of a patient key, None where it is alone."""
    return session.scalar(
        select(schema.PatientMember.group_id).where(
            schema.PatientMember.patient_id == key.patient_id,
            schema.PatientMember.issuer == key.issuer,
        )
    )


def members_of(session: Session, group: int) -> list[PatientKey]:
    """Return the patient keys of a group, in a fixed order."""
    rows = session.execute(
        select(schema.PatientMember.patient_id, schema.PatientMember.issuer).where(
            schema.PatientMember.group_id == group
        )
    )
    return sorted((PatientKey(*row) for row in rows), key=_order)


def patient_keys(session: Session, key: PatientKey) -> list[PatientKey]:
    """Return every patient key of today's patient, the asked one among them.

    An empty PatientID is nobody: it is alone with itself.
    """
    group = group_of(session, key) if key.known else None
    return [key] if group is None else members_of(session, group)


def of_keys(id_column: Any, issuer_column: Any, keys: Iterable[PatientKey]) -> ColumnElement[bool]:
    """Return the condition that two columns hold one of some keys, for an index of both."""
    # SQLite takes expressions 1000 deep; of `or`, it looks each part up in the index.
    keys = list(keys)
    if len(keys) > KEYS:
        return tuple_(id_column, issuer_column).in_([(k.patient_id, k.issuer) for k in keys])
    return or_(*(and_(id_column == k.patient_id, issuer_column == k.issuer) for k in keys))


def regroup(session: Session, keys: Sequence[PatientKey]) -> None:
    """Work out anew who is one patient, of keys with no link to any other key."""
    members, links = schema.PatientMember, schema.PatientLink
    edges: list[tuple[int, PatientKey, PatientKey]] = []
    for part in in_parts(keys, KEYS):
        rows = session.execute(
            select(
                links.id, links.merged_id, links.merged_issuer, links.into_id, links.into_issuer
            ).where(
                links.unlinked_at.is_(None), of_keys(links.merged_id, links.merged_issuer, part)
            )
        )
        edges += [(id_, PatientKey(a, b), PatientKey(c, d)) for id_, a, b, c, d in rows]
        session.execute(delete(members).where(of_keys(members.patient_id, members.issuer, part)))
    rows_of = [
        {"patient_id": key.patient_id, "issuer": key.issuer, "group_id": group}
        for key, group in _groups(edges).items()
    ]
    upsert(session, members, rows_of)


def in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield items so many at a time."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def _groups(edges: Sequence[tuple[int, PatientKey, PatientKey]]) -> dict[PatientKey, int]:
    """Return key -> lowest link of its connected component, of keys that have a link."""
    near: dict[PatientKey, list[PatientKey]] = {}
    for _, a, b in edges:
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    found: dict[PatientKey, int] = {}
    for id_, a, _ in sorted(edges, key=lambda edge: edge[0]):
        waiting = [a]
        while waiting:
            key = waiting.pop()
            if key not in found:
                found[key] = id_
                waiting += near[key]
    return found


def _order(key: PatientKey) -> tuple[str, str]:
    return key.issuer, key.patient_id
