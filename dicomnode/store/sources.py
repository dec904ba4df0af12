"""A stored Series as DICOM objects refer to it: its header, its Instances, its curve."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, time

from sqlalchemy import select
from sqlalchemy.orm import Session, undefer

from db import schema
from dicomnode.core import admission, region
from dicomnode.core.curve import HeightMap
from dicomnode.core.region import Region
from dicomnode.errors import ObjectError
from dicomnode.model import ScoreCurve
from dicomnode.objects import source
from dicomnode.objects.modules import Origin
from dicomnode.objects.source import Source
from dicomnode.store.rows import sop_classes, to_curve


@dataclass(frozen=True, slots=True)
class KnownSource:
    """A Series with its curve, both as they were at one moment."""

    source: Source
    curve: ScoreCurve
    regions: tuple[Region, ...]  # of the bundle that made the curve
    revision: int  # of the curve
    computed_at: datetime  # the curve
    model_name: str  # of the bundle

    @property
    def origin(self) -> Origin:
        """Of an object about this Series alone."""
        made_at = self.computed_at.astimezone()
        return Origin(self.curve.model, self.model_name, made_at, str(self.revision))

    def origin_with(self, moving: "KnownSource") -> Origin:
        """Of an object about the offset of a moving Series onto this one.

        Of the time of the later curve: from the same two the same offset may be computed again.
        """
        made_at = max(self.computed_at, moving.computed_at).astimezone()
        revision = f"{self.revision}.{moving.revision}"
        return Origin(self.curve.model, self.model_name, made_at, revision)


def source_of(session: Session, series_uid: str) -> KnownSource | None:
    """Return a Series as an object refers to it, None where it has no curve.

    Of a Series that came before schema 0005 no header was kept: Patient ID, Study Date and Time
    and Body Part Examined are known of it, and `Source.unknown` names the rest.

    Raises
    ------
    ObjectError
        If it is not known which SOP Class its Instances have.
    """
    found = session.execute(
        select(schema.Series, schema.Curve, schema.Model.manifest)
        .join(schema.Curve, schema.Curve.series_id == schema.Series.id)
        .join(schema.Model, schema.Model.digest == schema.Curve.model)
        .where(schema.Series.series_uid == series_uid)
        .options(undefer(schema.Series.header))
        .execution_options(populate_existing=True)
    ).one_or_none()
    if found is None:
        return None
    series, row, manifest = found
    curve = to_curve(series_uid, row, HeightMap(**manifest["heights"]))
    known = source.of_texts(
        _texts(series),
        study_uid=series.study_uid,
        series_uid=series_uid,
        instances=source.instances_of(curve, _classes(curve, sop_classes(row))),
        frames_of_reference=row.frames_of_reference,
        z_mm=curve.z_mm.tolist(),
    )
    return KnownSource(
        known,
        curve,
        region.from_manifest(manifest),
        row.revision,
        row.computed_at,
        str(manifest["name"]),
    )


def _texts(series: schema.Series) -> dict[str, str]:
    """Return the texts of a Series, with the patient whose it is to this node."""
    if series.header is None:
        texts = {"PatientID": series.patient_id, "BodyPartExamined": series.body_part_examined}
        if (at := series.study_datetime) is not None:
            texts["StudyDate"] = at.strftime("%Y%m%d")
            if at.time() != time.min:  # midnight: the header told no time
                texts["StudyTime"] = at.strftime("%H%M%S")
        return texts
    texts = dict(series.header)
    issuer = texts.get("IssuerOfPatientID", "")
    # A header that names no issuer may have got one by `default_issuer`: it is not in the images.
    told = texts.get("PatientID", ""), issuer
    if series.patient_id and (told[0] != series.patient_id or issuer not in ("", series.issuer)):
        # Merged with another patient since: the object is to join that one.
        texts |= {"PatientID": series.patient_id, "IssuerOfPatientID": series.issuer}
    return texts


def _classes(curve: ScoreCurve, kept: Iterable[str | None]) -> dict[str, str]:
    """Return SOP Instance UID -> SOP Class UID of the Instances of a curve."""
    found: dict[str, str] = {}
    unknown: dict[str, int] = {}  # SOP Instance UID -> its last Frame
    for uid, frame, kind in zip(curve.sop_instance_uids, curve.frames, kept, strict=True):
        if kind:
            found[uid] = kind
        else:
            unknown[uid] = max(frame, unknown.get(uid, 1))
    classes = set(found.values())
    if len(classes) == 1:
        (inferred,) = classes
    elif not classes and max(unknown.values(), default=1) == 1:
        inferred = admission.CT_IMAGE
    elif unknown:
        raise ObjectError(
            f"the SOP Class of Instances of Series {curve.series_uid} was not kept: it came before "
            "schema 0005, and is to be sent or imported again"
        )
    return found | {uid: inferred for uid in unknown if uid not in found}
