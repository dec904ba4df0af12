"""What PS3.3 demands of an object, by tables that others made; and what a reader makes of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.valuerep import validate_value

# The module and attribute tables of the whole standard, as highdicom ships them: a private path
# of an exact version (constraints.txt).
_STANDARD = Path(highdicom.__file__).parent / "_standard"


def table(name: str) -> Any:
    """Return one of highdicom's tables of the standard."""
    return json.loads((_STANDARD / f"{name}.json").read_text())


MODULES = table("module_attribute_map")
IODS = table("iod_module_map")
SOP_CLASSES = table("sop_class_iod_map")


def faults(ds: Dataset, skipped: frozenset[str] = frozenset()) -> list[str]:
    """Return what is missing of type 1 and 2 in mandatory modules, and what is in none.

    Attributes inside sequences count where their sequence has items. `skipped` modules are those
    whose macros make no sense without their conditions; their attributes are allowed all the same.
    """
    found: list[str] = []
    known: set[str] = set()
    for module in IODS[SOP_CLASSES[ds.SOPClassUID]]:
        attributes = MODULES[module["key"]]
        known |= {a["keyword"] for a in attributes if not a["path"]}
        if module["usage"] != "M" or module["key"] in skipped:
            continue
        for attribute in attributes:
            keyword, kind = attribute["keyword"], attribute["type"]
            if kind not in ("1", "2"):
                continue
            for item in _at(ds, attribute["path"]):
                where = f"{module['key']}: {'/'.join([*attribute['path'], keyword])}"
                if keyword not in item:
                    found.append(f"{where} is missing")
                elif kind == "1" and item[keyword].is_empty:
                    found.append(f"{where} is empty")
    return found + [f"{e.keyword} is in no module" for e in ds if e.keyword not in known]


def bad_values(ds: Dataset) -> list[str]:
    """Return the keywords of values that their VR forbids (PS3.5 section 6.2)."""
    return [
        element.keyword
        for element in ds.iterall()
        if element.VR not in ("SQ", "OB", "OW", "US", "UL", "FD")
        for value in (element.value if element.VM > 1 else [element.value])
        if not _is_valid(element.VR, value)
    ]


def _is_valid(vr: str, value: Any) -> bool:
    """Whether a value is one of its VR."""
    try:
        validate_value(vr, str(value) if value is not None else "", config.RAISE)
    except ValueError:
        return False
    return True


def _at(ds: Dataset, path: list[str]) -> Iterator[Dataset]:
    if not path:
        yield ds
        return
    for item in ds.get(path[0]) or []:
        yield from _at(item, path[1:])


def referenced(ds: Dataset) -> set[str]:
    """SOP Instance UIDs that an object refers to, outside of its lists of all references."""
    lists = (
        "ReferencedSeriesSequence",
        "StudiesContainingOtherReferencedInstancesSequence",
        "CurrentRequestedProcedureEvidenceSequence",
    )
    uids = set()
    for element in ds:
        if element.VR == "SQ" and element.keyword not in lists:
            for item in element.value:
                uids |= referenced(item)
        elif element.keyword == "ReferencedSOPInstanceUID":
            uids.add(str(element.value))
    return uids


def common_instance_reference(ds: Dataset) -> dict[tuple[str, str], list[str]]:
    """(Study, Series) -> SOP Instance UIDs of the Common Instance Reference module, C.12.2.

    dciodvfy does not look at it.
    """
    studies = [(ds.StudyInstanceUID, ds.get("ReferencedSeriesSequence") or [])]
    for study in ds.get("StudiesContainingOtherReferencedInstancesSequence") or []:
        assert study.StudyInstanceUID != ds.StudyInstanceUID, "an other Study is this one"
        studies.append((study.StudyInstanceUID, study.ReferencedSeriesSequence))
    assert len({uid for uid, _ in studies}) == len(studies), "a Study is listed twice"
    found: dict[tuple[str, str], list[str]] = {}
    for study_uid, series in studies:
        for item in series:
            key = (str(study_uid), str(item.SeriesInstanceUID))
            assert key not in found, "a Series is listed twice"
            sequence = item.ReferencedInstanceSequence
            found[key] = [str(i.ReferencedSOPInstanceUID) for i in sequence]
    return found


def registered(ds: Dataset, sop_instance_uid: str, point: Any) -> np.ndarray:
    """Return a point of an image in the Frame of Reference of a Spatial Registration object.

    PS3.3 C.20.2.1.1: (Ax, Ay, Az, 1)^T = M (Bx, By, Bz, 1)^T, where B is in the Frame of
    Reference of the item, A in that of the object, M is stored row by row, and of several
    matrices the first is applied first.
    """
    (item,) = (
        item
        for item in ds.RegistrationSequence
        if sop_instance_uid in {i.ReferencedSOPInstanceUID for i in item.ReferencedImageSequence}
    )
    (registration,) = item.MatrixRegistrationSequence
    b = np.array([*point, 1.0])
    for matrix in registration.MatrixSequence:
        b = np.array(matrix.FrameOfReferenceTransformationMatrix, float).reshape(4, 4) @ b
    return b[:3]
