"""A client of the REST interface: its answers as values, its pages as one iteration.

    from dicomnode.client import Client

    with Client("http://127.0.0.1:8080", token="...") as node:
        offset = node.offset(fixed_study, moving_study)
        for match in node.find("covers(liver, 0.9) and slices >= 100"):
            print(match.series_uid)

It needs neither torch nor a database, and may be used by several threads.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2 as httpx
from pydantic import BaseModel, TypeAdapter

from dicomnode.errors import NodeError, TransientError
from dicomnode.model import DeliveryState, Method, SeriesState
from dicomnode.web.models import (
    Count,
    Curve,
    Delivery,
    DeliveryPage,
    Format,
    Histogram,
    Match,
    MatchPage,
    Offset,
    PatientFound,
    Readiness,
    RegionKnown,
    Series,
    SeriesPage,
    SliceMap,
    Timeline,
    View,
)

M = TypeVar("M", bound=BaseModel)

API = "/api/v1"
TIMEOUT_S = 60.0


class RequestRefused(NodeError):
    """The node understood, and does not answer: `status` and `detail` say why.

    `position` is that of the character where an expression cannot be read, counted from 0.
    """

    def __init__(self, status: int, detail: str, position: int | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail, self.position = status, detail, position


class NodeUnavailable(TransientError):
    """The node, or its database, does not answer: the same call may work later."""


class Client:
    """Asks one node.

    Parameters
    ----------
    url
        Of the node, such as `https://dicomnode.hospital.example`.
    token
        Made by `dicomnode token`; None where the node asks for none.
    timeout_s
        Seconds to wait for a connection, and between pieces of an answer.
    verify
        False takes any certificate; for trials. A context of `ssl` for authorities of one's own.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        verify: Any = True,
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, verify=verify)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of every connection."""
        self._http.close()

    def series(
        self,
        *,
        patient_key: str | None = None,
        study_uid: str | None = None,
        state: SeriesState | str | None = None,
        covers: Iterable[str] = (),
    ) -> Iterator[Series]:
        """Yield Series, those that came last first; `covers` as `liver` or `liver,0.9`."""
        params: dict[str, Any] = {
            "patient": patient_key,
            "study": study_uid,
            "state": state,
            "covers": list(covers),
        }
        page: SeriesPage | None = None
        while page is None or page.next is not None:
            params["before"] = page.next if page else None
            page = self._get(SeriesPage, "/series", params)
            yield from page.series

    def one_series(self, series_uid: str) -> Series:
        """Return one Series and where it stands."""
        return self._get(Series, f"/series/{series_uid}")

    def curve(self, series_uid: str) -> Curve:
        """Return the curve of a Series."""
        return self._get(Curve, f"/series/{series_uid}/curve")

    def view(self, series_uid: str, region: str) -> View:
        """Return which slice to open first for a region."""
        return self._get(View, f"/series/{series_uid}/view", {"region": region})

    def offset(self, fixed: str, moving: str, method: Method | str | None = None) -> Offset:
        """Return the best offset of two Studies, or that of a method."""
        return self._get(Offset, f"/studies/{fixed}/offsets/{moving}", {"method": method})

    def slices(self, fixed: str, moving: str, method: Method | str | None = None) -> SliceMap:
        """Return which slice of the moving Study shows what each of the fixed one does."""
        return self._get(SliceMap, f"/studies/{fixed}/slices/{moving}", {"method": method})

    def transform(self, fixed: str, moving: str, method: Method | str | None = None) -> bytes:
        """Return the offset as an ITK transform file (.tfm)."""
        path = f"/studies/{fixed}/offsets/{moving}/transform"
        return self._send("GET", API + path, _given({"method": method})).content

    def registration(self, fixed: str, moving: str, method: Method | str | None = None) -> bytes:
        """Return the offset as a DICOM Spatial Registration, a Part 10 file."""
        path = f"/studies/{fixed}/offsets/{moving}/registration"
        return self._send("GET", API + path, _given({"method": method})).content

    def patient_keys(self, patient_id: str, issuer: str | None = None) -> list[PatientFound]:
        """Return the keys of a Patient ID, one for each issuer under which it is known."""
        body = {"patient_id": patient_id, "issuer": issuer}
        answer = self._send("POST", f"{API}/patients/lookup", body=body)
        return TypeAdapter(list[PatientFound]).validate_json(answer.content)

    def timeline(self, patient_key: str) -> Timeline:
        """Return all Studies of a patient, and how they align."""
        return self._get(Timeline, f"/patients/{patient_key}/timeline")

    def find(self, expression: str) -> Iterator[Match]:
        """Yield Series that an expression finds, those that came last first."""
        body: dict[str, Any] = {"q": expression}
        page: MatchPage | None = None
        while page is None or page.next is not None:
            body["before"] = page.next if page else None
            answer = self._send("POST", f"{API}/coverage", body=body)
            page = MatchPage.model_validate_json(answer.content)
            yield from page.series

    def count(self, expression: str) -> int:
        """Return how many Series an expression finds."""
        return self._get(Count, "/coverage/count", {"q": expression}).series

    def histogram(self, expression: str) -> Histogram:
        """Return how many of them reach each body height."""
        return self._get(Histogram, "/coverage/histogram", {"q": expression})

    def export(self, expression: str, path: Path) -> None:
        """Write all that an expression finds to a `.csv` or `.parquet`.

        The file appears when it is complete.
        """
        body = {"q": expression, "format": Format(path.suffix.lower().removeprefix("."))}
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with (
                _translated(),
                self._http.stream("POST", f"{API}/coverage", json=body) as answer,
                open(part, "wb") as file,
            ):
                if not answer.is_success:
                    answer.read()
                _check(answer)
                for chunk in answer.iter_bytes():
                    file.write(chunk)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def regions(self) -> list[RegionKnown]:
        """Return the regions that expressions may name."""
        answer = self._send("GET", f"{API}/regions")
        return TypeAdapter(list[RegionKnown]).validate_json(answer.content)

    def deliveries(
        self,
        *,
        state: DeliveryState | str | None = None,
        destination: str | None = None,
        subject: str | None = None,
    ) -> Iterator[Delivery]:
        """Yield deliveries, the newest first. For the role admin."""
        params: dict[str, Any] = {"state": state, "destination": destination, "subject": subject}
        page: DeliveryPage | None = None
        while page is None or page.next is not None:
            params["before"] = page.next if page else None
            page = self._get(DeliveryPage, "/deliveries", params)
            yield from page.deliveries

    def readiness(self) -> Readiness:
        """Return whether the node can do its work."""
        with _translated():
            return Readiness.model_validate_json(self._http.get("/readyz").content)

    def _get(self, model: type[M], path: str, params: Mapping[str, Any] | None = None) -> M:
        return model.model_validate_json(self._send("GET", API + path, _given(params)).content)

    def _send(self, method: str, path: str, params: Any = None, body: Any = None) -> httpx.Response:
        with _translated():
            answer = self._http.request(method, path, params=params, json=body)
        _check(answer)
        return answer


class _translated:
    """Turns what is wrong with the connection into NodeUnavailable."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, value: BaseException | None, traceback: Any) -> None:
        if isinstance(value, httpx.TransportError):
            raise NodeUnavailable(f"{type(value).__name__}: {value}") from value


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    try:
        problem = answer.json()
        detail, position = str(problem["detail"]), problem.get("position")
    except (ValueError, KeyError, TypeError):  # of something between us and the node
        detail, position = answer.reason_phrase, None
    if answer.status_code in (502, 503, 504):
        raise NodeUnavailable(f"{answer.status_code}: {detail}")
    raise RequestRefused(answer.status_code, detail, position)


def _given(params: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (params or {}).items() if value not in (None, [])}
