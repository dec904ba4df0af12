"""DICOMweb (PS3.18): QIDO-RS finds Studies and Series, WADO-RS brings them into the spool."""

import contextlib
import json
import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import date
from typing import Any
from urllib.parse import urlsplit

import httpx2
from pydicom.dataset import Dataset

from dicomnode.config import DICOMwebServer, SpoolSettings
from dicomnode.core.retrieval import SeriesAnswer, StudyAnswer
from dicomnode.errors import ConfigError, PeerRefused, PeerUnavailable, SpoolFull
from dicomnode.scu.find import BAD_VALUE, MAX_ANSWERS, is_uid, series_of, study_of
from dicomnode.scu.move import Retrieved
from dicomnode.scu.multipart import boundary_of, parts
from dicomnode.spool import Spool

CONNECT_S = 10.0
READ_S = 120.0  # until the next bytes
QUERY_S = 600.0
RETRIEVE_S = 6 * 3600.0
MAX_JSON = 64 << 20
# Answers a page; a server may give fewer.
PAGE = 1000
# 0020000D and the like: attributes that an answer need not have by itself (PS3.18 10.6.3).
STUDY_FIELDS = ("00080062", "00100021", "00201206", "00201208")
SERIES_FIELDS = ("00201209",)


class WebSession:
    """Questions to one server, and what it sends."""

    def __init__(self, client: httpx2.Client, name: str, spool: SpoolSettings) -> None:
        self._client, self._name, self._spool = client, name, spool

    def find_studies(
        self,
        *,
        patient_id: str = "",
        days: tuple[date, date] | None = None,
        most: int = MAX_ANSWERS,
    ) -> list[StudyAnswer]:
        """Return the Studies with CT that the server names, of a patient, of some days, or both.

        Raises
        ------
        PeerRefused
            If the server refuses, or answers more than `most`.
        PeerUnavailable
            If it cannot be reached, or breaks off.
        """
        query: list[tuple[str, str]] = [("ModalitiesInStudy", "CT")]
        if patient_id:
            query.append(("PatientID", patient_id))
        if days:
            query.append(("StudyDate", f"{days[0]:%Y%m%d}-{days[1]:%Y%m%d}"))
        query += [("includefield", field) for field in STUDY_FIELDS]
        answers = [study_of(ds) for ds in self._query("studies", query, most)]
        return [answer for answer in answers if is_uid(answer.study_uid)]

    def find_series(self, study_uid: str, series_uid: str = "") -> list[SeriesAnswer]:
        """Return the CT Series of a Study that the server names, or one of them.

        Raises
        ------
        PeerRefused, PeerUnavailable
            As `find_studies`.
        """
        query: list[tuple[str, str]] = [("Modality", "CT")]
        if series_uid:
            query.append(("SeriesInstanceUID", series_uid))
        query += [("includefield", field) for field in SERIES_FIELDS]
        path = f"studies/{study_uid}/series"
        answers = [series_of(ds, study_uid) for ds in self._query(path, query, MAX_ANSWERS)]
        return [answer for answer in answers if is_uid(answer.series_uid)]

    def retrieve(self, study_uid: str, series_uid: str) -> Retrieved:
        """Put each Instance of a Series into the spool, as it comes in.

        Raises
        ------
        PeerRefused
            If the server refuses, or sends no Instance at all.
        PeerUnavailable
            If it breaks off before the first Instance.
        """
        association_id = secrets.token_hex(8)  # to the worker it is one, as an import is
        kind, completed, failed, reason = "aborted", 0, 0, ""
        with contextlib.closing(Spool.of(self._spool)) as spool:
            try:
                for data in self._instances(study_uid, series_uid):
                    if data[128:132] != b"DICM":
                        failed += 1
                        continue
                    spool.put(data, association_id)
                    completed += 1
                kind = "released"
            except SpoolFull as exc:
                reason = f"our spool takes no more: {exc}"
            except (PeerRefused, PeerUnavailable) as exc:
                if not completed:
                    raise
                reason = str(exc)
            finally:
                if completed:
                    with contextlib.suppress(SpoolFull):  # it is lost to the worker after a while
                        spool.put_event(association_id, kind)
        if not completed and not reason:
            raise PeerRefused(f"{self._name} sends no Instance of it")
        if failed and not reason:
            reason = f"{failed} of {completed + failed} parts are no DICOM file"
        return Retrieved(completed, failed, 0, reason)

    def _instances(self, study_uid: str, series_uid: str) -> Iterator[bytes]:
        # Whatever it is stored in: the worker reads all that a modality writes.
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        path = f"studies/{study_uid}/series/{series_uid}"
        deadline = time.monotonic() + RETRIEVE_S
        with self._asked(path, [], accept) as answer:
            if answer.status_code != 200:
                raise PeerRefused(self._refusal(answer.status_code))
            try:
                boundary = boundary_of(answer.headers.get("content-type", ""))
                for data in parts(answer.iter_bytes(), boundary):
                    if time.monotonic() > deadline:
                        raise PeerUnavailable(f"{self._name} is not done after {RETRIEVE_S:.0f} s")
                    yield data
            except PeerRefused as exc:
                raise PeerRefused(f"{self._name}: {exc}") from exc

    def _query(self, path: str, query: list[tuple[str, str]], most: int) -> list[Dataset]:
        """Return all answers, page by page (PS3.18 8.3.4.4)."""
        found: list[Dataset] = []
        last: list[dict[str, Any]] = []
        deadline = time.monotonic() + QUERY_S
        while True:
            page = [("limit", str(PAGE)), ("offset", str(len(found)))]
            answers = self._page(path, query + page)
            # A server that knows no pages gives the first one for ever.
            if not answers or answers == last:
                return found
            last = answers
            found += [_dataset(answer) for answer in answers]
            if len(found) > most:
                raise PeerRefused(
                    f"{self._name} answers more than {most} times: does it pass over what it is "
                    "asked for?"
                )
            if time.monotonic() > deadline:
                raise PeerUnavailable(f"{self._name} is not done after {QUERY_S:.0f} s")

    def _page(self, path: str, query: list[tuple[str, str]]) -> list[dict[str, Any]]:
        with self._asked(path, query, "application/dicom+json") as answer:
            if answer.status_code == 204:  # nothing matches
                return []
            if answer.status_code != 200:
                raise PeerRefused(self._refusal(answer.status_code))
            text = bytearray()
            for chunk in answer.iter_bytes():
                text += chunk
                if len(text) > MAX_JSON:
                    raise PeerRefused(f"{self._name} answers more than {MAX_JSON} bytes")
        try:
            answers = json.loads(text or b"[]")
        except ValueError as exc:
            raise PeerRefused(f"{self._name} does not answer in JSON: is the URL right?") from exc
        if not isinstance(answers, list) or not all(isinstance(a, dict) for a in answers):
            raise PeerRefused(f"{self._name} does not answer in DICOM JSON: is the URL right?")
        return answers

    @contextlib.contextmanager
    def _asked(
        self, path: str, query: list[tuple[str, str]], accept: str
    ) -> Iterator[httpx2.Response]:
        # No error of httpx2 may get out with its text: it quotes the URL, which names a patient.
        try:
            with self._client.stream(
                "GET", path, params=httpx2.QueryParams(tuple(query)), headers={"Accept": accept}
            ) as answer:
                yield answer
        except httpx2.TimeoutException:
            raise PeerUnavailable(f"{self._name} does not answer in time") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as exc:
            raise PeerUnavailable(f"{self._name}: {type(exc).__name__}") from None

    def _refusal(self, status: int) -> str:
        meaning = {
            401: "it wants another token, or user and password",
            403: "it does not allow us this",
            404: "it has no such thing, or the URL is wrong",
            406: "it does not send what we take",
        }.get(status, "redirects are not followed" if 300 <= status < 400 else "it refuses")
        return f"{self._name} answers HTTP {status}: {meaning}"


@contextlib.contextmanager
def opened(server: DICOMwebServer, spool: SpoolSettings) -> Iterator[WebSession]:
    """Give a session with a server; what it sends goes into that spool.

    Raises
    ------
    ConfigError
        If a file of its settings cannot be used.
    PeerUnavailable
        If nobody listens there.
    """
    headers, auth = {}, None
    if server.token_file is not None:
        headers["Authorization"] = f"Bearer {_secret(server, 'token_file')}"
    elif server.user is not None:
        auth = httpx2.BasicAuth(server.user, _secret(server, "password_file"))
    try:
        verify = ssl.create_default_context(cafile=server.ca_file)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"priors.dicomweb: {server.name}: ca_file: {server.ca_file}") from exc
    # That it is away altogether is to be known before anything counts as asked.
    url = urlsplit(server.url)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), CONNECT_S).close()
    except (OSError, UnicodeError) as exc:
        why = exc.strerror or str(exc) if isinstance(exc, OSError) else "no host name"
        raise PeerUnavailable(f"no connection to {server.name}: {why}") from exc
    with httpx2.Client(
        base_url=server.url.rstrip("/") + "/",
        headers=headers,
        auth=auth,
        verify=verify,
        timeout=httpx2.Timeout(READ_S, connect=CONNECT_S),
        follow_redirects=False,  # the token is for this server
        trust_env=False,  # nor does a proxy of the environment get to see a Patient ID
    ) as client:
        yield WebSession(client, server.name, spool)


def _secret(server: DICOMwebServer, key: str) -> str:
    path = getattr(server, key)
    try:
        secret = str(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"priors.dicomweb: {server.name}: {key}: cannot read {path}") from exc
    if not secret or not secret.isascii() or not secret.isprintable():
        raise ConfigError(f"priors.dicomweb: {server.name}: {key}: no secret in {path}")
    return secret


def _dataset(answer: dict[str, Any]) -> Dataset:
    try:
        return Dataset.from_json(answer)
    except BAD_VALUE:
        return Dataset()  # names no Study, and is left out
