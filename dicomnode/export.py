"""What an expression finds, written to Parquet or CSV files of three kinds.

Columns have the names of IDC's index where that has them, so that the same DuckDB queries work:
one row a Series; one row a slice; one row a pair. Rows are written as they are read, so that
memory stays as it is however many there are.
"""

import csv
import hashlib
import hmac
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from dicomnode import store
from dicomnode.core.region import Region
from dicomnode.errors import ConfigError
from dicomnode.mining import Expression
from dicomnode.mining.fields import spelled
from dicomnode.model import PatientKey
from dicomnode.store import FoundPair, Match

if TYPE_CHECKING:
    import pyarrow  # 0.1 s, which CSV need not wait for

Row = TypeVar("Row", Match, FoundPair)

KINDS = (".parquet", ".csv")
KEY_BYTES = 16
# A date is moved back by a time of the patient's own, so that intervals hold: up to ten years.
MOVED_DAYS = 3652
GROUP = 50_000  # rows of a Parquet row group
CURVES = 200  # read in one go: 300 slices each are some 2.5 MB

# Columns and their Arrow types, as pyarrow.type_for_alias knows them; "flags" is a list of text.
SERIES = {
    "PatientID": "string",
    "IssuerOfPatientID": "string",
    "StudyInstanceUID": "string",
    "SeriesInstanceUID": "string",
    "StudyDate": "date32",
    "Modality": "string",
    "BodyPartExamined": "string",
    "Manufacturer": "string",
    "instanceCount": "int32",
    "state": "string",
    "reason": "string",
    "slices": "int32",
    "spacing_mm": "float64",
    "pearson_r": "float64",
    "slope": "float64",
    "height_min_mm": "float64",
    "height_max_mm": "float64",
    "flags": "flags",
    "bundle": "string",
}
SLICES = {
    "SeriesInstanceUID": "string",
    "SOPInstanceUID": "string",
    "frame": "int32",
    "z_mm": "float64",
    "score": "float32",
    "height_mm": "float64",
}
PAIRS = {
    "PatientID": "string",
    "IssuerOfPatientID": "string",
    "FixedStudyInstanceUID": "string",
    "FixedSeriesInstanceUID": "string",
    "MovingStudyInstanceUID": "string",
    "MovingSeriesInstanceUID": "string",
    "method": "string",
    "status": "string",
    "reason": "string",
    "offset_mm": "float64",
    "sigma_mm": "float64",
    "overlap_mm": "float64",
    "dx_mm": "float64",
    "dy_mm": "float64",
    "bundle": "string",
}


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Names in another's stead, by HMAC-SHA256: one key, one name, and none without the key."""

    key: bytes = field(repr=False)

    @classmethod
    def of(cls, path: Path) -> "Pseudonyms":
        """Return those of a key in a file; white space around it does not count.

        Raises
        ------
        ConfigError
            If the file cannot be read, or the key is short enough to be guessed.
        """
        try:
            key = path.read_bytes().strip()
        except OSError as exc:
            raise ConfigError(f"key of pseudonyms: {exc}") from exc
        if len(key) < KEY_BYTES:
            raise ConfigError(
                f"key of pseudonyms: {len(key)} bytes in {path}, {KEY_BYTES} or more are needed"
            )
        return cls(key)

    def uid(self, uid: str) -> str:
        """Return a UID, derived from 128 bits as PS3.5 B.2 has it."""
        return f"2.25.{int.from_bytes(self._digest('uid', uid)[:16])}" if uid else ""

    def patient(self, patient: PatientKey) -> str:
        """Return a Patient ID; nobody stays nobody."""
        if not patient.known:
            return ""
        return self._digest("patient", patient.issuer, patient.patient_id)[:16].hex()

    def day(self, day: date, patient: PatientKey, study_uid: str) -> date | None:
        """Return a date of the patient, moved back; of nobody, by a time of the Study's own."""
        own = (patient.issuer, patient.patient_id) if patient.known else (study_uid,)
        days = 1 + int.from_bytes(self._digest("days", *own)[:8]) % MOVED_DAYS
        try:
            return day - timedelta(days=days)
        except OverflowError:  # a date of the year 1 is none
            return None

    def _digest(self, *parts: str) -> bytes:
        # The length of each keeps ("ab", "c") apart from ("a", "bc").
        message = b"".join(b"%d:%b" % (len(p), p) for p in (part.encode() for part in parts))
        return hmac.new(self.key, message, hashlib.sha256).digest()


class _Table(Protocol):
    def write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Append rows."""


def write(
    engine: Engine,
    expression: Expression,
    regions: Sequence[Region],
    *,
    series: Path | None = None,
    slices: Path | None = None,
    pairs: Path | None = None,
    pseudonyms: Pseudonyms | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[Path, int]:
    """Write what an expression finds, and return how many rows each file has.

    A file appears when it is complete. Of pairs, those are written whose fixed Series is found.

    Parameters
    ----------
    regions : sequence of Region
        Those whose shares get a column each.
    progress : function
        Takes how many more of all Series were looked at.
    """
    columns = _columns(regions)
    counts = {path: 0 for path in (series, slices, pairs) if path}
    with ExitStack() as stack:

        def open_table(path: Path | None, names: dict[str, str]) -> _Table | None:
            return stack.enter_context(_table(path, names)) if path else None

        to_series = open_table(series, columns)
        to_slices = open_table(slices, SLICES)
        to_pairs = open_table(pairs, PAIRS)

        def put(table: _Table, path: Path | None, rows: list[tuple[Any, ...]]) -> None:
            table.write(rows)
            counts[path] += len(rows)  # type: ignore[index]  # a table has its path

        for looked_at, ids in store.windows(engine, expression):
            for part in _parts(ids, CURVES):
                with store.reading(engine) as session:
                    found = store.matches(session, part)
                    of_pairs = store.pairs_of_fixed(session, part) if to_pairs else []
                    if pseudonyms:
                        found, of_pairs = _as_one(session, found), _as_one(session, of_pairs)
                    if to_series:
                        put(to_series, series, [_series(m, regions, pseudonyms) for m in found])
                    if to_slices:
                        uids = [m.series_uid for m in found if m.model]
                        curves = store.curves_of(session, uids)
                        for uid in uids:
                            if uid in curves:
                                put(to_slices, slices, list(_slices(curves[uid], pseudonyms)))
                    if to_pairs:
                        put(to_pairs, pairs, [_pair(p, pseudonyms) for p in of_pairs])
            progress(looked_at)
    return counts


def stream(
    engine: Engine,
    expression: Expression,
    regions: Sequence[Region],
    suffix: str,
) -> Iterator[bytes]:
    """Yield the bytes of the file of Series that `write` would write, as they come to be.

    Parameters
    ----------
    suffix : str
        Of `KINDS`: which kind of file.
    """
    buffer = _Drained()
    with _kind_of(suffix)(buffer, _columns(regions)) as table:
        for _, ids in store.windows(engine, expression):
            for part in _parts(ids, CURVES):
                with store.reading(engine) as session:
                    found = store.matches(session, part)
                table.write([_series(m, regions, None) for m in found])
                if chunk := buffer.drain():
                    yield chunk
    yield buffer.drain()


class _Drained(BytesIO):
    """A file of which what was written is taken out again and again."""

    _before = 0  # bytes that were taken out

    def tell(self) -> int:
        return self._before + super().tell()

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Do nothing: what writes to it closes it, and its last bytes are taken out after that."""

    def drain(self) -> bytes:
        """Take out what was written since."""
        chunk = self.getvalue()
        self._before += len(chunk)
        self.seek(0)
        self.truncate()
        return chunk


def _as_one(session: Session, rows: Sequence[Row]) -> list[Row]:
    """Return rows with one key for each patient, whatever links tie together.

    Else a patient of two keys had two pseudonyms, and dates moved by two times: the interval of a
    pair across both would be wrong.
    """
    firsts = store.first_keys(session, {row.patient for row in rows})
    return [replace(row, patient=firsts[row.patient]) for row in rows]


def _columns(regions: Iterable[Region]) -> dict[str, str]:
    return {**SERIES, **{f"covers_{spelled(r.name)}": "float64" for r in regions}}


def _series(m: Match, regions: Iterable[Region], names: Pseudonyms | None) -> tuple[Any, ...]:
    day = m.study_datetime.date() if m.study_datetime else None
    if names and day:
        day = names.day(day, m.patient, m.study_uid)
    shares = {r.name: share for r, share in m.coverage}
    return (
        *_patient(m.patient, names),
        _uid(m.study_uid, names),
        _uid(m.series_uid, names),
        day,
        m.modality,
        m.body_part_examined,
        m.manufacturer,
        m.received,
        str(m.state),
        str(m.reason) if m.reason else None,
        m.slices,
        m.spacing_mm,
        m.quality,
        m.slope,
        *(m.height_mm or (None, None)),
        [str(flag) for flag in m.flags],
        m.model,
        *(shares.get(r.name) for r in regions),
    )


def _slices(curve: Any, names: Pseudonyms | None) -> Iterator[tuple[Any, ...]]:
    series_uid = _uid(curve.series_uid, names)
    for uid, *values in zip(
        curve.sop_instance_uids,
        curve.frames,
        curve.z_mm.tolist(),
        curve.score.tolist(),
        curve.height_mm.tolist(),
        strict=True,
    ):
        yield (series_uid, _uid(uid, names), *values)


def _pair(p: FoundPair, names: Pseudonyms | None) -> tuple[Any, ...]:
    offset, stored = p.stored.offset, p.stored
    uids = (stored.fixed_study, stored.fixed_series, stored.moving_study, stored.moving_series)
    return (
        *_patient(p.patient, names),
        *(_uid(uid, names) for uid in uids),
        str(offset.method),
        str(offset.status),
        offset.reason,
        offset.offset_mm,
        offset.sigma_mm,
        offset.overlap_mm,
        offset.dx_mm,
        offset.dy_mm,
        stored.model,
    )


def _patient(patient: PatientKey, names: Pseudonyms | None) -> tuple[str, str]:
    return (names.patient(patient), "") if names else (patient.patient_id, patient.issuer)


def _uid(uid: str, names: Pseudonyms | None) -> str:
    return names.uid(uid) if names else uid


def _parts(ids: list[int], size: int) -> Iterator[list[int]]:
    for i in range(0, len(ids), size):
        yield ids[i : i + size]


@contextmanager
def _table(path: Path, columns: dict[str, str]) -> Iterator[_Table]:
    """Give a table that becomes the file when all went well, and nothing otherwise."""
    kind = _kind_of(path.suffix.lower(), path.name)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with open(part, "wb") as file, kind(file, columns) as table:
                yield table
            os.replace(part, path)
        except OSError as exc:
            raise ConfigError(f"{path}: {exc.strerror or exc}") from exc
    finally:
        part.unlink(missing_ok=True)


def _kind_of(
    suffix: str, name: str = ""
) -> Callable[[IO[bytes], dict[str, str]], AbstractContextManager[_Table]]:
    kinds = dict(zip(KINDS, (_parquet, _csv), strict=True))
    if suffix not in kinds:
        raise ConfigError(f"{name or suffix}: expected a name that ends in {' or '.join(KINDS)}")
    return kinds[suffix]


@contextmanager
def _csv(file: IO[bytes], columns: dict[str, str]) -> Iterator[_Table]:
    text = TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(columns)

    class Lines:
        def write(self, rows: Sequence[tuple[Any, ...]]) -> None:
            for row in rows:
                writer.writerow(";".join(v) if isinstance(v, list) else v for v in row)

    yield Lines()
    text.detach()


@contextmanager
def _parquet(file: IO[bytes], columns: dict[str, str]) -> Iterator[_Table]:
    import pyarrow
    from pyarrow import parquet

    aliases = {"flags": pyarrow.list_(pyarrow.string())}
    schema = pyarrow.schema(
        [
            (name, aliases.get(kind) or pyarrow.type_for_alias(kind))
            for name, kind in columns.items()
        ]
    )
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        groups = _Groups(writer, schema)
        yield groups
        groups.flush()


class _Groups:
    """Gathers rows, as Arrow has them, until they are worth a row group."""

    def __init__(self, writer: Any, schema: "pyarrow.Schema") -> None:
        self.writer = writer
        self.schema = schema
        self.batches: list[Any] = []
        self.count = 0

    def write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Append rows."""
        import pyarrow

        if not rows:
            return
        arrays = [
            pyarrow.array(values, column.type)
            for values, column in zip(zip(*rows, strict=True), self.schema, strict=True)
        ]
        # As they come, rows of 40 Python objects each would take ten times the memory.
        self.batches.append(pyarrow.record_batch(arrays, schema=self.schema))
        self.count += len(rows)
        if self.count >= GROUP:
            self.flush()

    def flush(self) -> None:
        """Write what is left."""
        import pyarrow

        if self.batches:
            self.writer.write_table(
                pyarrow.Table.from_batches(self.batches), row_group_size=max(self.count, 1)
            )
        self.batches, self.count = [], 0
