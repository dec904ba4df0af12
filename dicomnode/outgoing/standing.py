"""Whether what is held may go out as what the database says it is, looked at while it is sent."""

import time
from collections.abc import Iterable

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.core import placeholder
from dicomnode.dicomio import Identity
from dicomnode.errors import DicomError

# A Series of 500 slices takes seconds to minutes: what came meanwhile is to be seen, at the price
# of one look at the database a second.
LOOK_S = 1.0

REJECTED = "a rejection note took it back"
OTHER = (
    "what is held names another patient or Study than the database: have the whole Series sent "
    "again as it was corrected"
)


class Standing:
    """What the database says of some Instances of one Series, not older than `LOOK_S`."""

    def __init__(
        self,
        engine: Engine,
        series_uid: str,
        sop_instance_uids: Iterable[str],
        placeholders: tuple[str, ...] = (),
    ) -> None:
        self._engine, self._series_uid = engine, series_uid
        self._placeholders = placeholders  # Patient IDs that are nobody's
        self._uids = frozenset(sop_instance_uids)
        self._looked_at: float | None = None
        self._whose: store.Whose | None = None
        self._rejected: set[str] = set()

    def check(self, told: Identity) -> None:
        """Return where an Instance may go out now.

        Raises
        ------
        DicomError
            If it was taken back, or is not of the patient and Study that the Series is of.
        """
        self._look()
        if told.sop_instance_uid in self._rejected:
            raise DicomError(REJECTED)
        if (
            self._whose is None
            or told.series_uid != self._series_uid
            or told.sop_instance_uid not in self._uids
            or not self._is_of(self._whose, told)
        ):
            raise DicomError(OTHER)

    def _is_of(self, whose: store.Whose, told: Identity) -> bool:
        nobody = placeholder.named(told.patient, self._placeholders)
        return any(whose.has(told.study_uid, patient) for patient in (told.patient, nobody))

    def _look(self) -> None:
        now = time.monotonic()
        if self._looked_at is not None and now - self._looked_at < LOOK_S:
            return
        with store.reading(self._engine) as session:
            self._whose = store.whose(session, self._series_uid)
            self._rejected = store.rejected_of(session, self._uids)
        self._looked_at = now
