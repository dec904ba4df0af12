"""All real CT at hand through a fresh node, by a sender of choice, and what became of it.

    python -m tests.e2e.everything --sender dcmsend

Exit status 1 where a Series is left open, is short of a slice, or ends without a reason.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from dicomnode.model import SeriesState
from dicomnode.store import SeriesRow
from tests.e2e import pacs
from tests.e2e.conftest import (
    REAL_CT,
    Node,
    dcmsend,
    eventually,
    free_port,
    network_namespace,
    run,
    running_node,
    storescu,
)

SENDERS = ("storescu", "dcmsend", "orthanc")
DEADLINE_S = 3600.0
# storescu proposes one compressed transfer syntax at a time.
STORESCU_OPTIONS = {
    JPEGLSLossless: "-xt",
    JPEG2000Lossless: "-xv",
    JPEGLosslessSV1: "-xs",
    RLELossless: "-xr",
}


@dataclass(frozen=True)
class Folder:
    """One Series as it lies on disk."""

    path: Path
    series_uid: str
    study_uid: str
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"


def folders(root: Path) -> list[Folder]:
    """Return every Series under a folder that holds one folder a Series."""
    files: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*.dcm")):
        files[path.parent].append(path)
    found = []
    for folder, members in files.items():
        ds = pydicom.dcmread(members[0], stop_before_pixels=True)
        uids = (str(ds.SeriesInstanceUID), str(ds.StudyInstanceUID))
        found.append(Folder(folder, *uids, tuple(members)))
    return found


def commands(sender: str, port: int, sent: Sequence[Folder]) -> Iterator[list[str]]:
    """Yield the command lines that send these folders, to the node or to an Orthanc."""
    paths = [folder.path for folder in sent]
    if sender == "dcmsend":
        yield dcmsend(port, *paths)
    elif sender == "orthanc":  # a later -aec counts
        # Orthanc delays its acknowledgements: without Nagle's algorithm nobody waits for them.
        yield [
            "env",
            "TCP_NODELAY=1",
            *dcmsend(port, *paths, options=["-aet", pacs.SCANNER, "-aec", pacs.AE_TITLE]),
        ]
    else:
        by_syntax: dict[str, list[Path]] = defaultdict(list)
        for folder in sent:
            by_syntax[read_file_meta_info(folder.files[0]).TransferSyntaxUID].append(folder.path)
        for syntax, members in by_syntax.items():
            option = STORESCU_OPTIONS.get(syntax)
            yield storescu(port, *members, options=[option] if option else [])


def send(node: Node, sender: str, sent: Sequence[Folder], resources: ExitStack) -> None:
    """Send folders to a node; with Orthanc, it has them then, and forwards."""
    port = node.port
    if sender == "orthanc":
        folder = node.folder / "orthanc"
        forwards = pacs.orthanc(folder, node.prefix, node_port=node.port)
        resources.enter_context(forwards)
        port = pacs.DICOM_PORT
    for command in commands(sender, port, sent):
        run([*node.prefix, *command], DEADLINE_S)


def start(folder: Path, sender: str, resources: ExitStack) -> Node:
    """Start a node; for Orthanc, which listens on every address, in a network of its own."""
    prefix = resources.enter_context(network_namespace()) if sender == "orthanc" else []
    return resources.enter_context(running_node(folder, prefix=prefix, port=free_port()))


def wait(node: Node, sent: Sequence[Folder], seconds: float) -> dict[str, SeriesRow]:
    """Return name -> Series once each is finished with all its slices, or when time is up."""

    def rows() -> dict[str, SeriesRow]:
        known = {row.series_uid: row for row in node.series()}
        return {f.name: known[f.series_uid] for f in sent if f.series_uid in known}

    def done() -> bool:
        found = rows()
        complete = all(
            f.name in found
            and found[f.name].state is not SeriesState.OPEN
            and found[f.name].received >= len(f.files)
            for f in sent
        )
        return complete and node.is_idle()

    try:
        eventually(done, f"{len(sent)} Series finished", seconds)
    except AssertionError as exc:
        print(exc, file=sys.stderr)
    return rows()


def main(arguments: Sequence[str] | None = None) -> int:
    """Send everything, print what became of it, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.everything")
    parser.add_argument("--sender", choices=SENDERS, default="dcmsend")
    parser.add_argument("--root", type=Path, default=REAL_CT, help="one folder a Series")
    options = parser.parse_args(arguments)
    sent = folders(options.root)
    if not sent:
        print(f"no CT under {options.root}", file=sys.stderr)
        return 1
    files = sum(len(f.files) for f in sent)
    print(f"{files} files of {len(sent)} Series by {options.sender}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="dicomnode-all-") as folder, ExitStack() as resources:
        node = start(Path(folder), options.sender, resources)
        began = time.monotonic()
        try:
            send(node, options.sender, sent, resources)
        except BaseException:
            print(node.log_text()[-5000:], file=sys.stderr)
            raise
        print(f"sent after {time.monotonic() - began:.0f} s", file=sys.stderr)
        rows = wait(node, sent, DEADLINE_S)
        print(f"finished after {time.monotonic() - began:.0f} s", file=sys.stderr)
        return report(node, sent, rows)


def report(node: Node, sent: Sequence[Folder], rows: dict[str, SeriesRow]) -> int:
    """Print a table of what became of each Series, and return the exit status."""
    faults = []
    ends: Counter[str] = Counter()
    for folder in sent:
        row = rows.get(folder.name)
        state = "missing" if row is None else str(row.state)
        if row is not None and row.reason is not None:
            state += f":{row.reason}"
        ends[state] += 1
        scored, received = (row.scored, row.received) if row else (0, 0)
        quality = row.quality if row else None
        flags = ", ".join(quality.flags) if quality else ""
        numbers = f"{quality.pearson_r:7.4f} {quality.slope:6.2f}" if quality else " " * 14
        heights = (
            f"{row.height_mm[0]:6.0f}..{row.height_mm[1]:<6.0f}" if row and row.height_mm else ""
        )
        print(
            f"{folder.name:52} {state:28} {scored:4}/{received:<4} {numbers} {heights:14} {flags}"
            f"{' ' + str(row.set_aside) if row and row.set_aside else ''}"
        )
        if row is None or row.state is SeriesState.OPEN or received != len(folder.files):
            faults.append(f"{folder.name}: {state}, {received} of {len(folder.files)} received")
        elif row.state is not SeriesState.CURVE and row.reason is None:
            faults.append(f"{folder.name}: {state} without a reason")
    files = sum(len(f.files) for f in sent)
    received = sum(row.received for row in rows.values())
    scored = sum(row.scored for row in rows.values())
    print(f"\n{len(sent)} Series, {files} files, {received} received, {scored} in curves")
    print(", ".join(f"{state} {count}" for state, count in sorted(ends.items())))
    print(f"in quarantine: {node.quarantined() or 'nothing'}")
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
