"""What peers are asked for: questions to them, and the Series that follow from the answers."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, exists, func, or_, select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import FetchCause, FetchState, PatientKey
from dicomnode.store.identity import of_keys
from dicomnode.store.session import insert

CAUSES = tuple(FetchCause)
UNDER_WAY = (FetchState.WAITING, FetchState.SENT)
ENDED = (FetchState.DONE, FetchState.FAILED, FetchState.DROPPED)
# Longer than any pause between attempts, lease, or `priors.settle_seconds`.
LONGEST = timedelta(days=2)
DAY = "%Y%m%d"
# Of a patient whose keys changed, so many are looked at for one that is recent and no prior itself.
NEWEST = 50
NEVER_SENT = {"sent_at": None, "held_before": None, "fruitless": 0}

Counts = tuple[int | None, int | None, int | None]  # Instances completed, failed, with a warning


@dataclass(frozen=True, slots=True)
class AskPriors:
    """Whom a new Study asks for earlier ones, and how old it may be to count as new."""

    peers: tuple[str, ...]
    recent_days: int  # 0: whatever its age


@dataclass(frozen=True, slots=True)
class Inquiry:
    """A question to a peer, and how it stands."""

    id: int
    cause: FetchCause
    peer: str
    subject: str  # UID of the Study that asks; of catching up, a day as 20260131
    version: int
    state: FetchState
    attempts: int
    asked_at: datetime
    due_at: datetime
    done_at: datetime | None
    reason: str | None
    studies: int | None
    series: int | None


@dataclass(frozen=True, slots=True)
class Order:
    """A Series that a peer is to be asked for."""

    series_uid: str
    study_uid: str
    peer: str
    cause: FetchCause
    asked_by: str  # the subject of the inquiry
    study_date: date | None
    expected: int | None  # Instances


@dataclass(frozen=True, slots=True)
class Fetch:
    """A Series that a peer is asked for, and how that stands."""

    id: int
    what: Order
    version: int
    state: FetchState
    attempts: int
    asked_at: datetime
    due_at: datetime
    done_at: datetime | None
    reason: str | None
    completed: int | None
    failed: int | None
    warning: int | None
    others: tuple[str, ...] = ()  # peers that have it, too
    sent_at: datetime | None = None  # when a peer last said that it sent some of it
    held_before: int | None = None  # Instances that were here before that
    fruitless: int = 0  # times in a row that it was sent, and nothing new was here after


@dataclass(frozen=True, slots=True)
class Sent:
    """What a peer says that it sent of a Series, and how that compares with before."""

    at: datetime
    held_before: int  # Instances
    fruitless: int


def ask_priors(
    session: Session,
    ask: AskPriors,
    study_uid: str,
    patient: PatientKey,
    study_datetime: datetime | None,
    now: datetime,
    *,
    anew: bool = False,
) -> bool:
    """Ask for earlier Studies of a patient, in the transaction that stores the first of a new one.

    Once for each Study; `anew` where who the patient is was corrected. A Study that was itself
    asked for as a prior asks for none, nor does an old one: then it is False.
    """
    if not ask.peers or not patient.known:
        return False
    # Local time, as the scanner wrote it: a day more or less does not matter here.
    if ask.recent_days and study_datetime is not None:
        if study_datetime.date() < (now - timedelta(days=ask.recent_days)).date():
            return False
    is_prior = and_(schema.Fetch.study_uid == study_uid, schema.Fetch.cause == FetchCause.PRIOR)
    if session.scalar(select(exists().where(is_prior))):
        return False
    for peer in sorted(ask.peers):  # one order, so that two workers cannot deadlock
        _ask(session, FetchCause.PRIOR, peer, study_uid, now, anew=anew)
    return True


def ask_priors_of(
    session: Session, ask: AskPriors, keys: Sequence[PatientKey], now: datetime
) -> None:
    """Ask anew for earlier Studies of a patient whose keys have changed, for the newest Study."""
    if not ask.peers:
        return
    columns = schema.Series
    newest = func.max(columns.study_datetime)
    rows = session.execute(
        select(columns.study_uid, newest)
        .where(of_keys(columns.patient_id, columns.issuer, keys), columns.modality == "CT")
        .group_by(columns.study_uid)
        .order_by(newest.desc().nulls_last(), columns.study_uid)
        .limit(NEWEST)
    )
    for study_uid, when in rows.all():
        if ask_priors(session, ask, study_uid, keys[0], when, now, anew=True):
            return


def ask_days(session: Session, peer: str, days: Iterable[date], now: datetime) -> None:
    """Ask what a peer has of these days, anew where that was asked before."""
    for day in sorted(set(days)):
        _ask(session, FetchCause.CATCH_UP, peer, day.strftime(DAY), now, anew=True)


def asked_days(session: Session, peer: str, days: Iterable[date]) -> dict[date, datetime | None]:
    """Return, of these days, those asked about before, and when it was done; None: not yet."""
    subjects = {day.strftime(DAY): day for day in days}
    rows = session.execute(
        select(schema.Inquiry.subject, schema.Inquiry.done_at).where(
            schema.Inquiry.cause == FetchCause.CATCH_UP,
            schema.Inquiry.peer == peer,
            schema.Inquiry.subject.in_(sorted(subjects)),
        )
    )
    return {subjects[subject]: done_at for subject, done_at in rows}


def has_due(session: Session, peer: str, now: datetime, causes: Sequence[FetchCause]) -> bool:
    """Whether there is something to ask a peer for now."""
    return any(
        session.scalar(select(table.id).where(_due(table, peer, now, causes)).limit(1)) is not None
        for table in (schema.Inquiry, schema.Fetch)
    )


def claim_inquiry(
    session: Session,
    peer: str,
    now: datetime,
    lease: timedelta,
    causes: Sequence[FetchCause] = CAUSES,
) -> Inquiry | None:
    """Take the question to a peer that is due longest, and hide it from others for so long."""
    row = _claim(session, schema.Inquiry, peer, now, lease, causes)
    return None if row is None else _inquiry(row)


def claim_fetch(
    session: Session,
    peer: str,
    now: datetime,
    lease: timedelta,
    causes: Sequence[FetchCause] = CAUSES,
) -> Fetch | None:
    """Take the Series that is due longest of those a peer is asked for, and hide it likewise."""
    row = _claim(session, schema.Fetch, peer, now, lease, causes)
    return None if row is None else _fetch(row)


def renew_lease(session: Session, claimed: Inquiry | Fetch, until: datetime) -> bool:
    """Hide what was claimed for longer; False where it was asked for anew meanwhile."""
    table = schema.Inquiry if isinstance(claimed, Inquiry) else schema.Fetch
    found = session.execute(
        update(table)
        .where(table.id == claimed.id, table.version == claimed.version)
        .values(due_at=until)
        .returning(table.id)
    )
    return found.scalar() is not None


def note_expected(session: Session, fetch: Fetch, expected: int) -> None:
    """Note how many Instances of a Series a peer is about to send; it may have grown there."""
    row = schema.Fetch
    session.execute(
        update(row)
        .where(row.id == fetch.id, row.version == fetch.version)
        .where(or_(row.expected.is_(None), row.expected < expected))
        .values(expected=expected)
    )


def settle_inquiry(
    session: Session,
    inquiry: Inquiry,
    state: FetchState,
    now: datetime,
    *,
    due_at: datetime | None = None,
    reason: str | None = None,
    found: tuple[int, int] | None = None,
    is_attempt: bool = True,
) -> bool:
    """Note how a question went; False where it was asked anew meanwhile, and waits for that.

    Parameters
    ----------
    found
        Studies that were wanted, and Series asked for.
    is_attempt
        Whether it was tried at all.
    """
    values: dict[str, Any] = {} if found is None else {"studies": found[0], "series": found[1]}
    if not is_attempt:
        values["attempts"] = inquiry.attempts - 1
    return _settle(session, inquiry, state, now, due_at, reason, values)


def settle_fetch(
    session: Session,
    fetch: Fetch,
    state: FetchState,
    now: datetime,
    *,
    due_at: datetime | None = None,
    reason: str | None = None,
    counts: Counts | None = None,
    expected: int | None = None,
    sent: Sent | None = None,
    fruitless: int | None = None,
    is_attempt: bool = True,
    else_ask: Collection[str] = (),
) -> bool:
    """Note how asking for a Series went; False where it was asked for anew meanwhile.

    Parameters
    ----------
    counts
        Instances completed, failed, and completed with a warning; None: it did not come so far.
    expected
        What the peer says now, where it says something. The most is kept: a count that goes up
        and down again is no growth.
    sent
        None: nothing was sent.
    fruitless
        How often in a row it was sent for nothing, where that is known without a further sending.
    is_attempt
        Whether it was tried at all.
    else_ask
        Peers that may be asked instead: the next one of those that have it is, at once until each
        had its turn.
    """
    row = session.get_one(schema.Fetch, fetch.id, with_for_update=True, populate_existing=True)
    if row.version != fetch.version:
        return False
    row.state, row.reason, row.due_at = state, reason, due_at or now
    row.done_at = now if state in ENDED else None
    if counts is not None:
        row.completed, row.failed, row.warning = counts
    if expected is not None:
        row.expected = max(expected, row.expected or 0)
    if sent is not None:
        row.sent_at, row.held_before, row.fruitless = sent.at, sent.held_before, sent.fruitless
    elif fruitless is not None:
        row.fruitless = fruitless
    if not is_attempt:
        row.attempts = fetch.attempts - 1
    if hand_on(row, else_ask) and (not is_attempt or fetch.attempts <= len(row.others)):
        row.due_at = now
    session.flush()
    return True


def hand_on(row: schema.Fetch, allowed: Collection[str]) -> bool:
    """Let the next of the other peers be asked for a Series; False where there is none."""
    if not (found := [peer for peer in row.others if peer in allowed]):
        return False
    row.others = [*(peer for peer in row.others if peer != found[0]), row.peer]
    row.peer = found[0]
    return True


def patient_of_study(session: Session, study_uid: str) -> tuple[PatientKey, datetime | None] | None:
    """Return the patient and time of a Study, as its Series that arrived last says."""
    row = session.execute(
        select(schema.Series.patient_id, schema.Series.issuer, schema.Series.study_datetime)
        .where(schema.Series.study_uid == study_uid, schema.Series.patient_id != "")
        .order_by(schema.Series.last_arrival_at.desc(), schema.Series.id.desc())
        .limit(1)
    ).first()
    return None if row is None else (PatientKey(row[0], row[1]), row[2])


def dates_of_studies(
    session: Session, keys: Sequence[PatientKey], asked_by: str
) -> dict[str, date]:
    """Return Study -> date of a patient's Studies with CT that are here or on order.

    On order is what the Study `asked_by` asked for before, of another peer.
    """
    here = session.execute(
        select(schema.Series.study_uid, schema.Series.study_datetime).where(
            of_keys(schema.Series.patient_id, schema.Series.issuer, keys),
            schema.Series.modality == "CT",
        )
    )
    found = {uid: when.date() for uid, when in here if when is not None}
    ordered = session.execute(
        select(schema.Fetch.study_uid, schema.Fetch.study_date).where(
            schema.Fetch.asked_by == asked_by, schema.Fetch.cause == FetchCause.PRIOR
        )
    )
    for uid, day in ordered:
        if day:
            found.setdefault(uid, datetime.strptime(day, DAY).date())
    return found


def expected_of(session: Session, series_uid: str) -> int | None:
    """Return how many Instances of a Series will come, where we had a peer send it as a prior.

    Of one that is only caught up with, or that comes before it was asked for, the archive's count
    tells nothing: it is forwarded slice by slice, and grows there while it does.
    """
    return session.scalar(
        select(schema.Fetch.expected).where(
            schema.Fetch.series_uid == series_uid,
            schema.Fetch.cause == FetchCause.PRIOR,
            schema.Fetch.attempts > 0,
        )
    )


def list_inquiries(
    session: Session,
    *,
    state: FetchState | None = None,
    peer: str | None = None,
    limit: int | None = None,
) -> list[Inquiry]:
    """Return questions to peers, those asked last first."""
    query = select(schema.Inquiry).order_by(schema.Inquiry.id.desc()).limit(limit)
    rows = session.scalars(_filtered(query, schema.Inquiry, state, peer))
    return [_inquiry(row) for row in rows]


def list_fetches(
    session: Session,
    *,
    state: FetchState | None = None,
    peer: str | None = None,
    limit: int | None = None,
) -> list[Fetch]:
    """Return Series that peers are asked for, those asked for last first."""
    query = select(schema.Fetch).order_by(schema.Fetch.id.desc()).limit(limit)
    return [_fetch(row) for row in session.scalars(_filtered(query, schema.Fetch, state, peer))]


def count_fetches(
    session: Session, peers: Collection[str], since: datetime
) -> dict[FetchState, int]:
    """Return how many questions and Series are under way, and were given up since a time."""
    counts: Counter[FetchState] = Counter()
    for table in (schema.Inquiry, schema.Fetch):
        given_up = and_(table.state == FetchState.FAILED, table.done_at >= since)
        rows = session.execute(
            select(table.state, func.count())
            .where(table.peer.in_(peers), table.state.in_((*UNDER_WAY, FetchState.FAILED)))
            .where(or_(table.state.in_(UNDER_WAY), given_up))
            .group_by(table.state)
        )
        counts.update({FetchState(state): count for state, count in rows})
    return dict(counts)


def requeue_fetches(session: Session, now: datetime, uids: Sequence[str] = ()) -> int:
    """Queue again what was given up, of these UIDs of Series and Studies, or all; return how many.

    Peers that could not be reached may be asked at once.
    """
    count = 0
    subjects: Mapping[Table, Any] = {
        schema.Fetch: or_(schema.Fetch.series_uid.in_(uids), schema.Fetch.study_uid.in_(uids)),
        schema.Inquiry: schema.Inquiry.subject.in_(uids),
    }
    for table, is_named in subjects.items():
        given_up = update(table).where(table.state == FetchState.FAILED)
        anew = {"state": FetchState.WAITING, "version": table.version + 1, "attempts": 0}
        if table is schema.Fetch:
            anew |= NEVER_SENT
        found = session.execute(
            (given_up.where(is_named) if uids else given_up)
            .values({**anew, "asked_at": now, "due_at": now, "done_at": None})
            .returning(table.id)
        )
        count += len(found.all())
    session.execute(
        update(schema.Turn)
        .where(schema.Turn.failures > 0)
        .values(next_at=now, failures=0, reason=None)
    )
    return count


Table = type[schema.Inquiry] | type[schema.Fetch]


def _ask(
    session: Session, cause: FetchCause, peer: str, subject: str, now: datetime, *, anew: bool
) -> None:
    again = {"state": FetchState.WAITING, "attempts": 0, "asked_at": now, "due_at": now}
    asking = insert(session, schema.Inquiry).values(
        {"cause": cause, "peer": peer, "subject": subject, "version": 1, **again}
    )
    if anew:
        asking = asking.on_conflict_do_update(
            index_elements=["cause", "peer", "subject"],
            set_={
                **again,
                "done_at": None,
                "reason": None,
                "version": schema.Inquiry.version + 1,
            },
        )
    else:
        asking = asking.on_conflict_do_nothing()
    session.execute(asking)


def _due(
    table: Table, peer: str, now: datetime, causes: Sequence[FetchCause]
) -> ColumnElement[bool]:
    # What waits for longer than anything does was put off before the clock was set back.
    due = or_(table.due_at <= now, table.due_at > now + LONGEST)
    waiting = and_(table.state == FetchState.WAITING, table.cause.in_(causes))
    # To look at what came needs no peer, and so no hours.
    state = or_(waiting, table.state == FetchState.SENT)
    return and_(table.peer == peer, table.state.in_(UNDER_WAY), due, state)


def _claim(
    session: Session,
    table: Table,
    peer: str,
    now: datetime,
    lease: timedelta,
    causes: Sequence[FetchCause],
) -> Any:
    due = _due(table, peer, now, causes)
    query: Select[Any] = select(table).where(due).order_by(table.due_at, table.id).limit(1)
    # SQLite has one writer at a time, which is lock enough; Postgres skips what is claimed.
    if session.get_bind().dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)
    row = session.scalars(query).first()
    if row is not None:
        row.due_at = now + lease
        row.attempts += row.state == FetchState.WAITING
        session.flush()
    return row


def _settle(
    session: Session,
    claimed: Inquiry,
    state: FetchState,
    now: datetime,
    due_at: datetime | None,
    reason: str | None,
    more: Mapping[str, Any],
) -> bool:
    values = {
        "state": state,
        "reason": reason,
        "due_at": due_at or now,
        "done_at": None if state is FetchState.WAITING else now,
    }
    asked = schema.Inquiry
    found = session.execute(
        update(asked)
        .where(asked.id == claimed.id, asked.version == claimed.version)
        .values({**values, **more})
        .returning(asked.id)
    )
    return found.scalar() is not None


def _filtered(
    query: Select[Any], table: Table, state: FetchState | None, peer: str | None
) -> Select[Any]:
    if state is not None:
        query = query.where(table.state == state)
    return query if peer is None else query.where(table.peer == peer)


def _inquiry(row: schema.Inquiry) -> Inquiry:
    return Inquiry(
        id=row.id,
        cause=FetchCause(row.cause),
        peer=row.peer,
        subject=row.subject,
        version=row.version,
        state=FetchState(row.state),
        attempts=row.attempts,
        asked_at=row.asked_at,
        due_at=row.due_at,
        done_at=row.done_at,
        reason=row.reason,
        studies=row.studies,
        series=row.series,
    )


def _fetch(row: schema.Fetch) -> Fetch:
    what = Order(
        series_uid=row.series_uid,
        study_uid=row.study_uid,
        peer=row.peer,
        cause=FetchCause(row.cause),
        asked_by=row.asked_by,
        study_date=datetime.strptime(row.study_date, DAY).date() if row.study_date else None,
        expected=row.expected,
    )
    return Fetch(
        id=row.id,
        what=what,
        version=row.version,
        state=FetchState(row.state),
        attempts=row.attempts,
        asked_at=row.asked_at,
        due_at=row.due_at,
        done_at=row.done_at,
        reason=row.reason,
        completed=row.completed,
        failed=row.failed,
        warning=row.warning,
        others=tuple(row.others),
        sent_at=row.sent_at,
        held_before=row.held_before,
        fruitless=row.fruitless,
    )
