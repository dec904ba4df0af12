"""Rejection notes: Key Object Selections by which an archive takes Instances back."""

import warnings

from pydicom.dataset import Dataset

from dicomnode.core import admission
from dicomnode.dicomio import dataset
from dicomnode.errors import CorruptObject
from dicomnode.model import Rejection, SliceHeader

# A hundred thousand references; whatever is larger is none that an archive writes.
MAX_BYTES = 16 << 20
MAX_DEPTH = 32


def of_dataset(ds: Dataset, header: SliceHeader) -> Rejection | None:
    """Return what a Key Object Selection rejects; None where its title is another.

    All that its evidence lists, and what its content items refer to, at any depth.

    Raises
    ------
    CorruptObject
        If it cannot be read to the end: it is then not known what it rejects.

    References
    ----------
    DICOM PS3.3 A.35.4, C.17.6.2 (Key Object Document), PS3.16 TID 2010, CID 7011;
    IHE RAD TF-3 4.66.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's value warnings quote the value
        try:
            code = _title(ds)
            if code not in admission.REJECTIONS:
                return None
            studies, series, found = _evidence(ds)
            found |= _content(ds)
        except CorruptObject:
            raise
        except Exception as exc:  # a broken element surfaces only when it is converted
            raise CorruptObject(f"note cannot be read: {type(exc).__name__}") from exc
    return Rejection(
        sop_instance_uid=header.sop_instance_uid,
        study_uid=header.study_uid,
        code=code,
        instances=_uids(found),
        studies=_uids(studies),
        series=_uids(series),
    )


def _title(ds: Dataset) -> str:
    for name in ds.get("ConceptNameCodeSequence") or []:
        if dataset.text(name, "CodingSchemeDesignator") == "DCM":
            return dataset.text(name, "CodeValue")
    return ""


def _evidence(ds: Dataset) -> tuple[set[str], set[str], set[str]]:
    """Study, Series and SOP Instance UIDs of Current Requested Procedure Evidence."""
    studies: set[str] = set()
    series: set[str] = set()
    found: set[str] = set()
    for study in ds.get("CurrentRequestedProcedureEvidenceSequence") or []:
        studies.add(dataset.text(study, "StudyInstanceUID"))
        for one in study.get("ReferencedSeriesSequence") or []:
            series.add(dataset.text(one, "SeriesInstanceUID"))
            found |= _referenced(one)
    return studies, series, found


def _content(ds: Dataset) -> set[str]:
    """SOP Instance UIDs that content items refer to."""
    found: set[str] = set()
    waiting = [(ds, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise CorruptObject(f"content items nested more than {MAX_DEPTH} deep")
        found |= _referenced(item)
        waiting += [(child, depth + 1) for child in item.get("ContentSequence") or []]
    return found


def _referenced(item: Dataset) -> set[str]:
    references = item.get("ReferencedSOPSequence") or []
    return {dataset.text(reference, "ReferencedSOPInstanceUID") for reference in references}


def _uids(texts: set[str]) -> frozenset[str]:
    return frozenset(filter(admission.is_uid, texts))
