"""An Orthanc in a network of its own, other archives and AEs beside it: what a node talks to.

Orthanc 1.10.1 listens on every address, whatever its settings say: nothing here runs outside of a
private network namespace, and all that asks it something runs inside.
"""

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO

from tests.dicom import part10
from tests.e2e.conftest import dcmsend, eventually, run, save

AE_TITLE = "ORTHANC"
SCANNER = "CTSCANNER"  # what it sends is forwarded to the node
ARCHIVE = "ARCHIVE"  # what it sends stays where it is
DICOM_PORT, HTTP_PORT = 14242, 18042
DCMQRSCP = "DCMQRSCP"
DICOMWEB = f"http://127.0.0.1:{HTTP_PORT}/dicom-web"

# The body is a literal string: DumpJson() of Orthanc 1.10.1 writes numbers as floats, and a
# Priority of 0.0 is refused, silently.
FORWARD = """\
function OnStableSeries(seriesId, tags, metadata)
   if tags['Modality'] ~= 'CT' and tags['Modality'] ~= 'KO' then return end
   if metadata['RemoteAET'] ~= 'CTSCANNER' then return end -- from elsewhere
   local body = '{"Resources":["' .. seriesId .. '"],"Synchronous":false,"Priority":0}'
   if RestApiPost('/modalities/dicomnode/store', body) == nil then
      print('forward: series ' .. seriesId .. ' was refused')
   end
end
"""

FORWARD_ALL = "\n".join(line for line in FORWARD.split("\n") if "-- from elsewhere" not in line)

# Asks over HTTP from within the namespace: one JSON array a line, in and out.
ASK = """
import base64, http.client, json, sys
for line in sys.stdin:
    method, port, path, body, headers = json.loads(line)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, base64.b64decode(body), headers)
    answer = connection.getresponse()
    content = base64.b64encode(answer.read()).decode()
    connection.close()
    print(json.dumps([answer.status, answer.getheader("Content-Type", ""), content]), flush=True)
"""


class Orthanc:
    """An Orthanc that runs: a PACS that answers, forwards, keeps and is asked over HTTP."""

    def __init__(self, folder: Path, prefix: Sequence[str], asker: subprocess.Popen[str]) -> None:
        self.folder, self.prefix = folder, list(prefix)
        self._asker, self._lock = asker, threading.Lock()
        self._sent = 0

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        port: int = HTTP_PORT,
    ) -> tuple[int, str, bytes]:
        """Return status, content type and content of an answer over HTTP."""
        asked = [method, port, path, base64.b64encode(body).decode(), dict(headers or {})]
        with self._lock:
            assert self._asker.stdin is not None and self._asker.stdout is not None
            self._asker.stdin.write(json.dumps(asked) + "\n")
            self._asker.stdin.flush()
            line = self._asker.stdout.readline()
        assert line, "the asker ended"
        status, kind, content = json.loads(line)
        return status, kind, base64.b64decode(content)

    def get(self, path: str) -> Any:
        """Return what a GET answers as JSON."""
        status, _, content = self.request("GET", path, headers={"Accept": "application/json"})
        assert status in (200, 204), (status, path)
        return json.loads(content) if content else []

    def post(self, path: str, body: object) -> Any:
        """Return what a POST of JSON answers."""
        status, _, content = self.request("POST", path, json.dumps(body).encode())
        assert status == 200, (status, path, content[:500])
        return json.loads(content)

    def find(self, level: str, **query: str) -> list[dict[str, Any]]:
        """Return what Orthanc itself knows of Studies, Series or Instances, with details."""
        return self.post("/tools/find", {"Level": level, "Query": query, "Expand": True})

    def qido(self, path: str, **query: str) -> list[dict[str, Any]]:
        """Return what QIDO-RS answers (PS3.18 10.6): attributes by tag, as DICOM JSON."""
        terms = "&".join(f"{k}={v}" for k, v in query.items())
        return self.get(f"/dicom-web/{path}?{terms}")

    def wado(self, study_uid: str, series_uid: str, sop_instance_uid: str) -> Dataset:
        """Return an Instance as WADO-RS gives it (PS3.18 10.4)."""
        path = f"/dicom-web/studies/{study_uid}/series/{series_uid}/instances/{sop_instance_uid}"
        accept = {"Accept": 'multipart/related; type="application/dicom"'}
        status, kind, content = self.request("GET", path, headers=accept)
        assert status == 200, status
        (part,) = _parts(kind, content)
        return pydicom.dcmread(DicomBytesIO(part))

    def send(self, datasets: Sequence[Dataset], calling: str = SCANNER) -> None:
        """Let a scanner, or another archive, store Instances here by DCMTK's dcmsend."""
        self._sent += 1
        folder = save(datasets, self.folder / "sent" / str(self._sent))
        titles = ["-aet", calling, "-aec", AE_TITLE]
        run([*self.prefix, *dcmsend(DICOM_PORT, folder, options=titles)])

    def post_instance(self, ds: Dataset) -> None:
        """Store an Instance over HTTP: Orthanc then knows no AE that it came from."""
        status, _, content = self.request("POST", "/instances", part10(ds))
        assert status == 200, content[:500]

    def log(self) -> str:
        """Return what it logged so far."""
        return (self.folder / "log").read_text(errors="replace")

    def jobs(self, kind: str) -> list[dict[str, Any]]:
        """Return its jobs of one type, such as `DicomModalityStore`."""
        return [job for job in self.get("/jobs?expand") if job["Type"] == kind]


def _parts(content_type: str, content: bytes) -> list[bytes]:
    """Return the parts of a multipart message (RFC 2046 5.1)."""
    boundary = content_type.split("boundary=")[1].split(";")[0].strip('"').encode()
    found = content.split(b"--" + boundary)[1:-1]
    return [part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n") for part in found]


@contextlib.contextmanager
def orthanc(
    folder: Path,
    prefix: Sequence[str],
    *,
    node_port: int,
    others: Mapping[str, int] | None = None,
    forward: str = FORWARD,
    more_settings: Mapping[str, Any] | None = None,
) -> Iterator[Orthanc]:
    """Give an Orthanc that forwards what the scanner sends to the node, with the DICOMweb plugin.

    `others` are AE titles that may ask it and are stored to, each with its port; `more_settings`
    are its own, by name, in place of those here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    allowed = ("Echo", "Find", "Move", "Get", "Store", "NAction", "NEventReport")
    ports = {"DICOMNODE": node_port, SCANNER: 104, ARCHIVE: 104, **(others or {})}
    settings = {
        "Name": "E2E",
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "Plugins": ["/usr/share/orthanc/plugins/libOrthancDicomWeb.so"],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "HttpPort": HTTP_PORT,
        "DicomServerEnabled": True,
        "DicomAet": AE_TITLE,
        "DicomPort": DICOM_PORT,
        "DicomCheckCalledAet": True,
        "DicomAlwaysAllowStore": True,
        "DicomModalities": {
            title.lower(): {
                "AET": title,
                "Host": "127.0.0.1",
                "Port": port,
                **{f"Allow{what}": True for what in allowed},
                "AllowStorageCommitment": True,
            }
            for title, port in ports.items()
        },
        "StableAge": 1,
        "ConcurrentJobs": 2,
        "JobsHistorySize": 1000,
        "SaveJobs": False,
        "SyncStorageArea": False,
        "LuaScripts": [str(folder / "forward.lua")],
        **(more_settings or {}),
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    (folder / "forward.lua").write_text(forward)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "log", "wb"))
        process = _started(stack, [*prefix, "Orthanc", str(folder / "orthanc.json")], log)
        made = Orthanc(folder, prefix, stack.enter_context(_asker(prefix)))
        eventually(
            lambda: process.poll() is not None or "Orthanc has started" in made.log(),
            "Orthanc up",
        )
        assert process.poll() is None, made.log()
        yield made


@contextlib.contextmanager
def dcmqrscp(folder: Path, prefix: Sequence[str], *, port: int, node_port: int) -> Iterator[None]:
    """Run DCMTK's dcmqrscp, an archive made by others, that may send to the node."""
    (folder / "db").mkdir(parents=True, exist_ok=True)
    (folder / "dcmqrscp.cfg").write_text(
        f"""\
NetworkTCPPort = {port}
MaxPDUSize = 131072
MaxAssociations = 16
HostTable BEGIN
node = (DICOMNODE, 127.0.0.1, {node_port})
HostTable END
VendorTable BEGIN
VendorTable END
AETable BEGIN
{DCMQRSCP} {folder / "db"} RW (200, 1024mb) ANY
AETable END
"""
    )
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "log", "wb"))
        command = ["/usr/bin/dcmqrscp", "-c", str(folder / "dcmqrscp.cfg")]
        process = _started(stack, [*prefix, *command], log)
        _wait_for_echo(prefix, process, DCMQRSCP, port, folder / "log")
        yield


class Destination:
    """DCMTK's storescp as an AE that gets things; what it got lies in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def received(self) -> list[Dataset]:
        """Return all that it was sent."""
        return [pydicom.dcmread(path) for path in sorted(self.folder.glob("*.dcm"))]


@contextlib.contextmanager
def destination(
    folder: Path, prefix: Sequence[str], ae_title: str, port: int
) -> Iterator[Destination]:
    """Give an AE that takes whatever is sent to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder.with_suffix(".log"), "wb"))
        options = ["-aet", ae_title, "-od", str(folder), "-fe", ".dcm", "+B"]
        # By its path: pynetdicom has a program of this name.
        process = _started(stack, [*prefix, "/usr/bin/storescp", *options, str(port)], log)
        _wait_for_echo(prefix, process, ae_title, port, folder.with_suffix(".log"))
        yield Destination(folder)


def _wait_for_echo(
    prefix: Sequence[str], process: subprocess.Popen, ae_title: str, port: int, log: Path
) -> None:
    echo = [*prefix, "/usr/bin/echoscu", "-aec", ae_title, "127.0.0.1", str(port)]

    def answers() -> bool:
        return subprocess.run(echo, capture_output=True).returncode == 0

    eventually(lambda: process.poll() is not None or answers(), f"{ae_title} up")
    assert process.poll() is None, log.read_text(errors="replace")


def _started(stack: contextlib.ExitStack, command: Sequence[str], log: Any) -> subprocess.Popen:
    process = subprocess.Popen(
        command,
        env={**os.environ, "TCP_NODELAY": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    stack.callback(process.wait, 30)
    stack.callback(process.terminate)
    return process


@contextlib.contextmanager
def _asker(prefix: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", ASK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:  # closes its stdin, on which it ends
        yield process
