"""The conformance statement says what the code does: its tables are made from it, and tried.

    python -m tests.test_conformance

writes the tables between `<!-- table: NAME -->` and `<!-- end -->` of docs/conformance.md anew.
"""

import gc
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from pydicom.uid import (
    MPEG2MPML,
    UID,
    Comprehensive3DSRStorage,
    CTImageStorage,
    EncapsulatedPDFStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    KeyObjectSelectionDocumentStorage,
    LegacyConvertedEnhancedCTImageStorage,
    SecondaryCaptureImageStorage,
    SpatialRegistrationStorage,
)
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import (
    ModalityPerformedProcedureStep,
    ModalityWorklistInformationFind,
    PatientRootQueryRetrieveInformationModelFind,
    StorageCommitmentPushModel,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from dicomnode.config import Settings
from dicomnode.core import admission
from dicomnode.node import receive
from dicomnode.node.receive import Receiver
from dicomnode.objects import coverage_report
from dicomnode.scp import access, commitment
from dicomnode.scp.contexts import TRANSFER_SYNTAXES, UNCOMPRESSED, is_storage
from dicomnode.scu import find, move
from dicomnode.scu.commitment import FAILURES
from dicomnode.scu.storage import storage_contexts
from tests.e2e.conftest import association

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

ROOT = Path(__file__).parents[1]
STATEMENT = ROOT / "docs" / "conformance.md"
USED = {  # SOP Classes whose Instances the node makes something of
    CTImageStorage: "scored",
    EnhancedCTImageStorage: "scored, each Frame a slice",
    LegacyConvertedEnhancedCTImageStorage: "scored, each Frame a slice",
    KeyObjectSelectionDocumentStorage: "read, where its title is that of a rejection note",
}
KEPT = (  # some of the others
    UID("1.3.12.2.1107.5.9.1"),  # Siemens CSA Non-Image: private
    UID("1.2.840.10008.5.1.4.1.1.5"),  # Nuclear Medicine, of 1993: retired
    SecondaryCaptureImageStorage,
    EncapsulatedPDFStorage,
)
OURS = (SpatialRegistrationStorage, Comprehensive3DSRStorage)
NOT_OFFERED = (
    PatientRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
    StudyRootQueryRetrieveInformationModelGet,
    ModalityWorklistInformationFind,
    ModalityPerformedProcedureStep,
)
# What PS3.4 Annex B and Annex J call the statuses that we return.
STORE_STATUSES = {
    receive.SUCCESS: ("Success", "the Instance is on stable storage; it may not yet be read"),
    receive.OUT_OF_RESOURCES: (
        "Refused: Out of Resources",
        "the disk is short, the spool is gone, or the data set has more than 1 GiB: nothing was "
        "kept, send it again later",
    ),
    receive.CANNOT_UNDERSTAND: (
        "Error: Cannot Understand",
        "anything else: nothing was kept; the log says why",
    ),
}
REPORT_STATUSES = {
    commitment.SUCCESS: ("Success", "the report is on stable storage"),
    commitment.NO_SUCH_EVENT_TYPE: ("No such Event Type", "an Event Type ID but 1 and 2"),
    commitment.INVALID_ARGUMENT_VALUE: ("Invalid argument value", "it names no transaction"),
    commitment.NO_SUCH_SOP_CLASS: ("No such SOP Class", "another Affected SOP Class"),
    commitment.RESOURCE_LIMITATION: ("Resource limitation", "the disk is short"),
}
REJECTIONS = (
    access.CALLED_AE_TITLE,
    access.CALLING_AE_TITLE,
    access.OTHER_ADDRESS,
    access.OTHER_CERTIFICATE,
    access.TOO_MANY,
    access.TOO_MANY_OF_PEER,
    access.DISK_SHORT,
    access.NOT_JUDGED,
)


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table of Markdown."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def hexadecimal(statuses: dict[int, tuple[str, str]]) -> list[tuple[str, ...]]:
    return [(f"{status:04X}", *said) for status, said in statuses.items()]


def requested(*contexts: PresentationContext) -> list[tuple[str, ...]]:
    """Return rows of what we propose as an SCU."""
    return [
        (
            context.abstract_syntax.name,
            str(context.abstract_syntax),
            ", ".join(UID(s).name for s in context.transfer_syntax),
        )
        for context in contexts
    ]


def tables() -> dict[str, str]:
    """Return the tables of the statement that are facts of the code."""
    kept = [(uid.name, uid, use) for uid, use in USED.items()]
    kept.append(("any other Storage SOP Class", "see below", "kept in no form: counted as ignored"))
    contexts = [c for uid in OURS for c in storage_contexts([(uid, ExplicitVRLittleEndian)])]
    private = (
        coverage_report.COVERAGE,
        coverage_report.EXTENT,
        coverage_report.SPREAD,
        coverage_report.LOWEST,
        coverage_report.HIGHEST,
    )
    return {
        "storage": table(("SOP Class", "UID", "what becomes of it"), kept),
        "syntaxes": table(("transfer syntax", "UID"), ((s.name, s) for s in TRANSFER_SYNTAXES)),
        "store statuses": table(("status", "meaning", "when"), hexadecimal(STORE_STATUSES)),
        "report statuses": table(("status", "meaning", "when"), hexadecimal(REPORT_STATUSES)),
        "rejections": table(
            ("result", "source", "reason", "when"),
            ((r.result, r.source, r.reason, r.why) for r in REJECTIONS),
        ),
        "stored": table(("SOP Class", "UID", "transfer syntaxes proposed"), requested(*contexts)),
        "asked": table(
            ("SOP Class", "UID", "transfer syntaxes proposed"),
            requested(find.find_context(), move.move_context()),
        ),
        "failures": table(
            ("Failure Reason", "shown as"), ((f"{k:04X}", v) for k, v in FAILURES.items())
        ),
        "rejection notes": table(
            ("code", "scheme", "meaning"),
            ((code, "DCM", meaning) for code, meaning in admission.REJECTIONS.items()),
        ),
        "private codes": table(
            ("code", "scheme", "meaning"),
            ((c.value, c.scheme_designator, c.meaning) for c in private),
        ),
    }


MARKED = re.compile(r"(<!-- table: ([\w ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def written(text: str) -> str:
    """Return the statement with its tables made anew."""
    made = tables()
    return MARKED.sub(lambda m: f"{m[1]}{made[m[2]]}\n{m[4]}", text)


def test_the_tables_of_the_statement_are_those_of_the_code():
    text = STATEMENT.read_text()
    assert {m[2] for m in MARKED.finditer(text)} == tables().keys()
    assert text == written(text), "python -m tests.test_conformance writes them anew"


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    folder = tmp_path_factory.mktemp("receiver")
    settings = Settings(
        node={"port": 0, "peers": [{"ae_title": "TEST", "host": "127.0.0.1", "port": 104}]},
        spool={"path": folder / "spool", "reserve_bytes": 0},
    )
    receiver = Receiver(settings)
    receiver.start()
    yield receiver
    receiver.stop()
    gc.collect()


def accepted(receiver: Receiver, *contexts: tuple[str, list[str]]) -> list[tuple[str, str]]:
    """Return abstract and transfer syntax of each context that is accepted."""
    with association(receiver.port, (Verification, [ImplicitVRLittleEndian]), *contexts) as assoc:
        assert assoc.is_established
        return [
            (str(c.abstract_syntax), str(c.transfer_syntax[0]))
            for c in assoc.accepted_contexts
            if c.abstract_syntax != Verification
        ]


def test_verification_is_accepted_in_each_transfer_syntax_of_the_statement(receiver):
    for syntax in UNCOMPRESSED:
        with association(receiver.port, (Verification, [syntax])) as assoc:
            assert [c.transfer_syntax[0] for c in assoc.accepted_contexts] == [syntax]
            assert assoc.send_c_echo().Status == 0x0000


@pytest.mark.parametrize("sop_class_uid", [*USED, *KEPT, *OURS], ids=lambda uid: uid.name)
def test_storage_is_accepted_in_each_transfer_syntax_of_the_statement(receiver, sop_class_uid):
    offered = [(sop_class_uid, [syntax]) for syntax in TRANSFER_SYNTAXES]
    assert accepted(receiver, *offered) == [(sop_class_uid, s) for s in TRANSFER_SYNTAXES]
    assert accepted(receiver, (sop_class_uid, [MPEG2MPML])) == []


def test_every_storage_sop_class_of_the_standard_is_accepted(receiver):
    standard = [uid for uid in map(UID, all_uids()) if is_storage(uid)]
    assert len(standard) > 150
    for k in range(0, len(standard), 100):
        part = standard[k : k + 100]
        offered = [(uid, [ExplicitVRLittleEndian]) for uid in part]
        assert [uid for uid, _ in accepted(receiver, *offered)] == part


def all_uids() -> list[str]:
    """Return every SOP Class that pydicom knows for storage."""
    from pydicom._uid_dict import UID_dictionary

    return [
        uid
        for uid, (name, kind, *_) in UID_dictionary.items()
        if kind == "SOP Class" and "Storage" in name and "Commitment" not in name
        if uid.startswith("1.2.840.10008.5.1.4.1.1.")
    ]


@pytest.mark.parametrize("sop_class_uid", NOT_OFFERED, ids=lambda uid: uid.name)
def test_a_service_that_the_statement_does_not_offer_is_not_accepted(receiver, sop_class_uid):
    assert accepted(receiver, (sop_class_uid, [ImplicitVRLittleEndian])) == []


def test_storage_commitment_is_not_given(receiver):
    # To a peer as SCU of it; a peer as SCP reports to us: tests/integration/test_commitment.py
    assert accepted(receiver, (StorageCommitmentPushModel, [ImplicitVRLittleEndian])) == []


def test_the_statement_has_the_parts_that_ps3_2_asks_for():
    heads = re.findall(r"^#+ (.*)$", STATEMENT.read_text(), re.MULTILINE)
    for part in (
        "Overview", "Introduction", "Networking", "Implementation model", "AE specifications",
        "Association policies", "Network interfaces", "Configuration", "Media interchange",
        "Character sets", "Security", "Annexes",
    ):  # fmt: skip
        assert any(part in head for head in heads), part


if __name__ == "__main__":
    STATEMENT.write_text(written(STATEMENT.read_text()))
