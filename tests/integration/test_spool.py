import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dicomnode.errors import ConfigError, SpoolFull
from dicomnode.model import Reason, SpooledEvent, SpooledInstance
from dicomnode.spool import Disk, Spool
from tests.dicom import PATIENT_ID, PATIENT_NAME, ct_dataset, part10

A = "0123456789abcdef"
B = "fedcba9876543210"


@pytest.fixture(params=["journal", "file"])
def durability(request):
    return request.param


@pytest.fixture
def spool(tmp_path, durability):
    spool = Spool(tmp_path / "spool", durability=durability)
    yield spool
    spool.close()


@pytest.fixture
def file_spool(tmp_path):
    return Spool(tmp_path / "spool", durability="file")


def files(spool: Spool) -> list[str]:
    """Return what lies in the folders of files; a journal has its own tests."""
    folders = (spool.path / "incoming", spool.path / "quarantine")
    return sorted(path.name for folder in folders for path in folder.iterdir())


def python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_what_was_put_is_pending(spool):
    before = datetime.now(UTC)
    put = spool.put([b"head", b"body"], A)
    assert spool.pending(10) == [put]
    assert spool.read(put) == b"headbody"
    assert put.association_id == A
    assert timedelta(0) <= put.arrived_at - before < timedelta(seconds=10)


@pytest.mark.parametrize("data", [b"x", bytearray(b"x"), memoryview(b"x"), [b"x"], []])
def test_data_may_come_whole_or_in_parts(spool, data):
    assert spool.read(spool.put(data, A)) == b"".join([b"x"] if data else [])


def test_pending_is_ordered_by_arrival(spool):
    other_process = Spool(spool.path, durability=spool.durability)
    put = [
        spool.put_event(B, "started"),
        spool.put(b"1", A),
        other_process.put(b"2", B),
        spool.put(b"3", A),
        spool.put_event(A, "released"),
        other_process.put_event(B, "aborted"),
    ]
    assert spool.pending(10) == put
    assert spool.pending(2) == put[:2]
    assert [type(entry) for entry in put[:2]] == [SpooledEvent, SpooledInstance]
    assert [entry.kind for entry in put if isinstance(entry, SpooledEvent)] == [
        "started",
        "released",
        "aborted",
    ]


def test_order_holds_when_the_clock_is_set_back(spool, monkeypatch):
    put = []
    for now in (2_000, 1_000, 1_000, 3_000):
        monkeypatch.setattr(time, "time_ns", lambda now=now: now)
        put.append(spool.put(b"", A))
    assert spool.pending(10) == put


def test_foreign_names_are_neither_listed_nor_deleted(spool):
    (spool.path / "journal" / "lost+found").mkdir()
    names = ["README", "1-1-abc.dcm", f"{'1' * 20}-000001-{A}.dcm.bak", f"{'1' * 20}-000001-{A}.x"]
    for name in names:
        (spool.path / "incoming" / name).touch()
    spool.clean()
    assert spool.pending(10) == []
    assert files(spool) == sorted(names)


def test_a_name_holds_nothing_of_the_data_set(spool):
    ds = ct_dataset()
    name = spool.put(part10(ds), A).name
    assert re.fullmatch(rf"\d{{20}}-\d{{6}}-{A}\.dcm", name)
    assert not any(text in name for text in (ds.SOPInstanceUID, PATIENT_NAME, PATIENT_ID))


@pytest.mark.parametrize("association_id", ["", "../../../etc/x", A.upper(), A + "0"])
def test_only_an_association_id_becomes_part_of_a_name(spool, association_id):
    with pytest.raises(ValueError, match="no association id"):
        spool.put(b"", association_id)
    assert files(spool) == []


def test_an_event_has_one_of_three_kinds(spool):
    with pytest.raises(ValueError, match="no kind of event"):
        spool.put_event(A, "../x")


def test_folders_are_for_their_owner_alone(spool):
    spool.put(b"", A)
    with spool.lease():
        for path in [spool.path, *spool.path.rglob("*")]:
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == 0o700 if path.is_dir() else mode & 0o077 == 0 or not path.stat().st_size


def test_a_spool_that_cannot_be_made_is_a_setting_to_correct(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"spool\.path"):
        Spool(tmp_path / "file" / "spool")


def test_remove_may_be_repeated(spool):
    entry = spool.put(b"", A)
    spool.remove(entry)
    spool.remove(entry)
    assert spool.pending(10) == []


def test_quarantine_keeps_the_bytes_and_tells_why(spool):
    entry = spool.put(b"bytes", A)
    aside = spool.quarantine(entry, Reason.NOT_DICOM)
    assert spool.pending(10) == []
    assert aside == spool.path / "quarantine" / f"{Path(entry.name).stem}-not_dicom.dcm"
    assert aside.read_bytes() == b"bytes"


def test_quarantine_may_be_repeated(spool):
    entry = spool.put(b"bytes", A)
    aside = spool.quarantine(entry, Reason.CORRUPT)
    assert spool.quarantine(entry, Reason.CORRUPT) == aside


def test_what_is_nowhere_cannot_be_quarantined(spool):
    entry = spool.put(b"bytes", A)
    spool.remove(entry)
    with pytest.raises(SpoolFull):
        spool.quarantine(entry, Reason.CORRUPT)


@pytest.mark.parametrize("before", ["journal", "file"])
def test_what_was_written_under_another_setting_is_drained(tmp_path, before):
    after = {"journal": "file", "file": "journal"}[before]
    old = Spool(tmp_path, durability=before)
    put = [old.put(b"1", A), old.put_event(A, "released")]
    old.close()
    spool = Spool(tmp_path, durability=after)
    put += [spool.put(b"2", B), spool.put(b"3", B)]
    assert spool.pending(3) == put[:3]
    assert spool.pending(10) == put
    assert [bytes(spool.read(put[i])) for i in (0, 2)] == [b"1", b"2"]
    spool.remove(*put[:2])
    spool.quarantine(put[2], Reason.CORRUPT)
    assert [spool.waits(entry) for entry in put] == [False] * 3 + [True]
    assert spool.pending(10) == put[3:]


# Durability


def test_file_then_rename_then_directory_reach_the_disk(file_spool, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(fd):
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}"))))
        fsync(fd)

    def recording_replace(source, target):
        calls.append(("replace", Path(source), Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    for put in (lambda: file_spool.put(b"x", A), lambda: file_spool.put_event(A, "released")):
        calls.clear()
        final = file_spool.path / "incoming" / put().name
        part = final.with_name(f".{final.name}.part")
        assert calls == [("fsync", part), ("replace", part, final), ("fsync", final.parent)]


def test_new_folders_reach_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    Spool(tmp_path / "new" / "spool")
    assert synced == [str(tmp_path), f"{tmp_path}/new", *[f"{tmp_path}/new/spool"] * 3]


KILLED_BEFORE_RENAME = """
import os, signal, sys
from pathlib import Path
from dicomnode.spool import Spool
os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
Spool(Path(sys.argv[1]), durability="file").put(b"half", "0" * 16)
"""


def test_what_a_killed_process_left_is_cleaned(file_spool):
    kept = file_spool.put(b"kept", A)
    assert python(KILLED_BEFORE_RENAME, file_spool.path).returncode == -signal.SIGKILL
    assert len(files(file_spool)) == 2
    assert file_spool.pending(10) == [kept]
    file_spool.clean()
    assert files(file_spool) == [kept.name]


def test_what_a_living_process_is_writing_is_left_alone(file_spool, monkeypatch):
    replace = os.replace

    def clean_and_replace(source, target):
        Spool(file_spool.path).clean()
        replace(source, target)

    monkeypatch.setattr(os, "replace", clean_and_replace)
    assert file_spool.read(file_spool.put(b"x", A)) == b"x"


# A disk that takes no more


def test_the_reserve_is_kept_free(tmp_path, durability):
    spool = Spool(tmp_path, 1 << 62, durability)
    with pytest.raises(SpoolFull, match=r"1 bytes more .* less than \d+ bytes free"):
        spool.put(b"x", A)
    assert files(spool) == []
    assert spool.pending(1) == []


def test_an_event_may_go_into_the_reserve(tmp_path, durability):
    spool = Spool(tmp_path, 1 << 62, durability)
    put = spool.put_event(A, "released")
    assert spool.pending(10) == [put]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"no file system can be mounted here: {exc}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


class Hopeful(Disk):
    """Finds room, as when another process takes it between the look and the writing."""

    def free_bytes(self, path: Path) -> int:
        return 1 << 40


def test_a_full_disk_is_refused_and_leaves_nothing_half_written(small_disk, durability):
    spool = Spool(small_disk, durability=durability, disk=Hopeful())
    put = []
    with pytest.raises(SpoolFull, match="No space left on device") as caught:
        for _ in range(20):
            put.append(spool.put(bytes(100_000), A))
    assert isinstance(caught.value.__cause__, OSError)
    assert len(put) in range(8, 11)
    assert spool.pending(20) == put
    assert durability == "journal" or files(spool) == [entry.name for entry in put]

    spool.remove(*put)
    spool.put(bytes(100_000), A)
    spool.close()


def test_a_full_disk_is_noticed_before_writing(small_disk, durability):
    spool = Spool(small_disk, durability=durability)
    with pytest.raises(SpoolFull, match="free"):
        spool.put(bytes(2_000_000), A)


FILE_SIZE_LIMIT = """
import resource, sys
from pathlib import Path
from dicomnode.errors import SpoolFull
from dicomnode.spool import Spool
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    Spool(Path(sys.argv[1]), durability=sys.argv[2]).put(bytes(100_000), "0" * 16)
except SpoolFull as exc:
    print(exc.__cause__.errno)
"""


def test_a_write_that_fails_is_refused_and_leaves_nothing(spool):
    result = python(FILE_SIZE_LIMIT, spool.path, spool.durability)
    assert result.stdout == f"{errno.EFBIG}\n", result.stderr
    assert files(spool) == []
    assert spool.pending(1) == []


@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fails_to_sync_is_refused(spool, monkeypatch, number, call):
    def sync(fd):
        raise OSError(number, os.strerror(number))

    if (spool.durability, call) == ("file", "fdatasync"):
        return  # it makes no such call
    monkeypatch.setattr(os, call, sync)
    with pytest.raises(SpoolFull):
        spool.put(b"x", A)
    assert files(spool) == []
    assert spool.pending(1) == []


@pytest.mark.parametrize("had_some", [False, True])
@pytest.mark.parametrize("is_moved", [False, True])
def test_a_spool_that_is_gone_takes_nothing_either(spool, had_some, is_moved):
    if had_some:
        spool.put(b"x", A)
    folder = spool.path / {"journal": "journal", "file": "incoming"}[spool.durability]
    if is_moved:
        folder.rename(spool.path / "elsewhere")
    else:
        shutil.rmtree(folder)
    with pytest.raises(SpoolFull, match="No such file"):
        spool.put(b"x", A)


# The lease


def test_one_worker_at_a_time(spool):
    with spool.lease():
        with (
            pytest.raises(ConfigError, match=r"spool\.path: another worker"),
            Spool(spool.path).lease(),
        ):
            pass
    with spool.lease():
        pass


KILLED_WITH_LEASE = """
import os, signal, sys
from pathlib import Path
from dicomnode.spool import Spool
with Spool(Path(sys.argv[1])).lease():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_lease_of_a_killed_worker_is_free(spool):
    assert python(KILLED_WITH_LEASE, spool.path).returncode == -signal.SIGKILL
    with spool.lease():
        pass
