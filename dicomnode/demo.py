"""`dicomnode demo`: a node of its own, phantom patients over real C-STORE, and the truth beside.

Nothing but this package is needed: the bodies are drawn by `core.phantom`.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click
import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage
from sqlalchemy import Engine

from dicomnode import dicomio, plot, query, store
from dicomnode.core import phantom
from dicomnode.errors import NodeError
from dicomnode.model import Method, PatientKey, SeriesState

SEEDS = (9001, 9002, 9003)  # of the patients; training draws its phantoms from 0 up
MATRIX = 256
TOLERANCE_MM = 10.0
SHOWN = (Method.ROBUST, Method.L1, Method.FAST)
JUDGED = (Method.ROBUST, Method.L1)  # fast is a start, no more
START_S = 60.0
DEADLINE_S = 300.0
SEND_TRIES = 5
SEND_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Timepoint:
    """How one study of a phantom was scanned; heights are mm above its promontory."""

    when: datetime
    lowest_mm: float
    highest_mm: float
    spacing_mm: float
    pixel_mm: float
    centre_mm: tuple[float, float]
    table_mm: float  # what the scanner adds to every position
    breath_mm: float


@dataclass(frozen=True, slots=True)
class Study:
    """A study as it will be sent."""

    patient: int
    study_uid: str
    series_uid: str
    table_mm: float
    slices: tuple[Dataset, ...]


def run(*, keep: bool) -> int:
    """Show the main job, and return the exit status: 1 where an offset is wrong."""
    with tempfile.TemporaryDirectory(prefix="dicomnode-demo-") as folder:
        port = _free_port()
        config = _write_config(Path(folder), port)
        click.echo(f"starting a node on 127.0.0.1:{port}, SQLite in {folder}", err=True)
        with _node(config) as process, _database(Path(folder), port, process) as engine:
            status = _show(engine, port, process)
            if keep:
                click.echo(f"\nThe node stays up. Ask it:  dicomnode series --config {config}")
                click.echo("Ctrl-C ends it and removes its data.")
                with contextlib.suppress(KeyboardInterrupt):
                    process.wait()
    return status


def studies(seed: int) -> tuple[Study, Study]:
    """Return a prior and a follow-up of one phantom: moved, in another field of view."""
    rng = np.random.default_rng(seed)
    body = phantom.patient(seed)
    marks = phantom.landmarks(body)
    prior = Timepoint(
        when=datetime(2023, 3, 1, 9, 30),
        lowest_mm=marks["iliac_crest"] - 20 * rng.random(),
        highest_mm=marks["lung_apex"] + 40 * rng.random(),
        spacing_mm=5.0,
        pixel_mm=1.56,
        centre_mm=(0.0, 0.0),
        table_mm=float(rng.uniform(-300, 300)),
        breath_mm=0.0,
    )
    follow_up = Timepoint(
        when=datetime(2024, 5, 2, 14, 5),
        lowest_mm=marks["lung_base"] - 60 - 60 * rng.random(),
        highest_mm=marks["chin"] + 20 * rng.random(),
        spacing_mm=3.0,
        pixel_mm=1.84,
        centre_mm=(18.0, -12.0),
        table_mm=float(rng.uniform(-300, 300)),
        breath_mm=5.0,
    )
    return _scan(seed, body, prior), _scan(seed, body, follow_up)


def _scan(seed: int, body: phantom.PhantomPatient, at: Timepoint) -> Study:
    z_mm = np.arange(at.lowest_mm, at.highest_mm, at.spacing_mm)
    volume = phantom.volume(
        body,
        z_mm,
        pixel_mm=at.pixel_mm,
        matrix=MATRIX,
        center_mm=at.centre_mm,
        noise_hu=20,
        seed=at.when.year + seed,
        breath_mm=at.breath_mm,
    )
    study_uid, series_uid, frame = generate_uid(), generate_uid(), generate_uid()
    half = at.pixel_mm * (MATRIX - 1) / 2
    slices = tuple(
        dicomio.ct_dataset(
            image,
            patient=PatientKey(f"PHANTOM-{seed}", "DEMO"),
            study_uid=study_uid,
            series_uid=series_uid,
            sop_instance_uid=generate_uid(),
            instance_number=i + 1,
            image_position=(at.centre_mm[0] - half, at.centre_mm[1] - half, z + at.table_mm),
            pixel_mm=at.pixel_mm,
            spacing_mm=at.spacing_mm,
            study_datetime=at.when,
            frame_of_reference_uid=frame,
        )
        for i, (z, image) in enumerate(zip(z_mm.tolist(), volume, strict=True))
    )
    return Study(seed, study_uid, series_uid, at.table_mm, slices)


def send(slices: tuple[Dataset, ...], port: int) -> None:
    """Store the Instances, and send again what was not answered: a repeat does no harm.

    Under load pynetdicom's own thread now and then takes a response from its caller, who then
    waits for it in vain; the node has the Instance all the same.

    Raises
    ------
    NodeError
        If the node does not accept the association, or an Instance.
    """
    waiting = list(slices)
    for _ in range(SEND_TRIES):
        waiting = _send(waiting, port)
        if not waiting:
            return
    raise NodeError(f"{len(waiting)} Instances were not answered")


def _send(slices: list[Dataset], port: int) -> list[Dataset]:
    """Store over one association, and return what is left when it breaks off."""
    ae = AE("DEMO")
    ae.dimse_timeout = SEND_TIMEOUT_S
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    assoc = ae.associate("127.0.0.1", port, ae_title="DICOMNODE")
    if not assoc.is_established:
        raise NodeError("the node did not accept an association")
    try:
        for i, ds in enumerate(slices):
            status = assoc.send_c_store(ds).get("Status")
            if status is None:
                return slices[i:]
            if status != 0x0000:
                raise NodeError(f"C-STORE was answered 0x{status:04X}")
    finally:
        if assoc.is_established:
            assoc.release()
    return []


def _show(engine: Engine, port: int, process: subprocess.Popen[bytes]) -> int:
    pairs = []
    for seed in SEEDS:
        prior, follow_up = studies(seed)
        # The follow-up first for one of them: a prior that arrives late is paired as well.
        for study in (follow_up, prior) if seed == SEEDS[-1] else (prior, follow_up):
            send(study.slices, port)
            click.echo(f"sent {len(study.slices)} slices of PHANTOM-{seed}", err=True)
        pairs.append((follow_up, prior))
    _await_offsets(engine, len(pairs), process)
    worst = 0.0
    rows = []
    for fixed, moving in pairs:
        answers = [query.pair(engine, fixed.study_uid, moving.study_uid, m) for m in SHOWN]
        answer = answers[0]
        assert answer is not None
        truth = fixed.table_mm - moving.table_mm
        click.secho(f"\nPHANTOM-{fixed.patient}: follow-up (fixed) and prior, aligned", bold=True)
        click.echo(plot.pair_text(answer.fixed, answer.moving, answer.stored.offset))
        for name, c in (("fixed ", answer.fixed), ("moving", answer.moving)):
            click.echo(
                f"{name}  {len(c.z_mm)} slices, body height {c.height_mm[0]:.0f} to "
                f"{c.height_mm[-1]:.0f} mm, r {c.quality.pearson_r:.4f}"
            )
        offsets = [a.stored.offset for a in answers if a is not None]
        for o in offsets:
            if o.method in JUDGED:
                error = float("inf") if o.offset_mm is None else abs(o.offset_mm - truth)
                worst = max(worst, error)
        rows.append((fixed.patient, truth, offsets))
    heads = "".join(f"{f'{m} mm (error)':>18}" for m in SHOWN)
    click.secho(f"\npatient      true mm{heads}   sigma mm", bold=True)
    for patient, truth, offsets in rows:
        cells = "".join(
            f"{'refused':>18}"
            if o.offset_mm is None
            else f"{o.offset_mm:>10.1f} ({o.offset_mm - truth:+5.1f})"
            for o in offsets
        )
        sigma_mm = offsets[0].sigma_mm
        sigma = "-" if sigma_mm is None else f"{sigma_mm:.1f}"
        click.echo(f"PHANTOM-{patient}  {truth:>9.1f}{cells}{sigma:>11}")
    verdict = "ok" if worst <= TOLERANCE_MM else "FAIL"
    judged = " and ".join(JUDGED)
    click.echo(
        f"{verdict}: the largest error of {judged} is {worst:.1f} mm, {TOLERANCE_MM:.0f} allowed"
    )
    return 0 if worst <= TOLERANCE_MM else 1


def _await_offsets(engine: Engine, pairs: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with store.reading(engine) as session:
            series = store.list_series(session)
            done = store.count_offsets(session) >= pairs * len(Method)
        if done and all(s.state is SeriesState.CURVE for s in series):
            return
        if any(s.reason for s in series):
            raise NodeError(f"a series was refused: {[str(s.reason) for s in series]}")
        if process.poll() is not None:
            raise NodeError("the node stopped")
        time.sleep(0.2)
    raise NodeError(f"no offsets within {DEADLINE_S:.0f} s")


def _write_config(folder: Path, port: int) -> Path:
    path = folder / "node.toml"
    path.write_text(
        f"""\
[node]
port = {port}
peers = [{{ ae_title = "DEMO", host = "127.0.0.1", port = 104 }}]
[spool]
path = "{folder / "spool"}"
reserve_bytes = 0
[database]
url = "{_url(folder)}"
[series]
quiet_seconds = 1
"""
    )
    return path


@contextlib.contextmanager
def _node(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DICOMNODE_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "dicomnode", "serve", "--log-level=WARNING", "--config", config],
        env=environment,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait()


@contextlib.contextmanager
def _database(folder: Path, port: int, process: subprocess.Popen[bytes]) -> Iterator[Engine]:
    """Give the node's database once the node listens."""
    deadline = time.monotonic() + START_S
    listening = False
    while not listening:
        if process.poll() is not None or time.monotonic() > deadline:
            raise NodeError("the node did not start")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            listening = True
        time.sleep(0.1)
    with store.opened(_url(folder), create=True) as engine:
        yield engine


def _url(folder: Path) -> str:
    return f"sqlite:///{folder / 'dicomnode.sqlite'}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
