"""A DICOM node that scores CT slices by body height and aligns timepoints.

Plain functions over paths and values; everything else may change.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from dicomnode.model import Method, Offset, OffsetStatus, Quality, Refusal, ScoreCurve

if TYPE_CHECKING:
    import SimpleITK
    from sqlalchemy import Engine

__all__ = [
    "Method",
    "Offset",
    "OffsetStatus",
    "Quality",
    "Refusal",
    "ScoreCurve",
    "align",
    "open_store",
    "score_series",
    "to_sitk_transform",
]


def score_series(
    *paths: str | Path, model: str | Path | None = None, device: str = "auto"
) -> list[ScoreCurve | Refusal]:
    """Return the curve of every CT Series in files or folders, or the reason why it has none.

    Parameters
    ----------
    paths
        DICOM files, or folders of them at any depth.
    model
        Folder of a weight bundle; the default one where none is named.
    device
        "auto", "cpu", "cuda", "cuda:N" or "mps".

    Raises
    ------
    WeightsError
        If the bundle or the device is not there.
    """
    from dicomnode import device as devices
    from dicomnode import files, weights
    from dicomnode.node.score import Scorer

    bundle, on = weights.load(Path(model) if model else None), weights.pick_device(device)
    scorer = Scorer(bundle, on, batch=64, dtype=devices.pick_dtype("auto", bundle, on))
    return [s.outcome for s in files.score([Path(p) for p in paths], scorer).series]


def align(
    fixed: ScoreCurve | Sequence[ScoreCurve | Refusal],
    moving: ScoreCurve | Sequence[ScoreCurve | Refusal],
    method: Method | str = Method.ROBUST,
    *,
    model: str | Path | None = None,
) -> Offset | None:
    """Return the offset of moving onto fixed, the best pair of several; None of no pair.

    `z_fixed = z_moving + offset_mm` for the same anatomy. Takes what `score_series` gives:
    Series without a curve are passed over. The robust method needs to know how the bundle
    errs: `model` is the folder of the one that scored the curves, the default one where none
    is named.

    Raises
    ------
    ValueError
        If another bundle scored the curves.
    """
    from dicomnode import files, weights

    curves = _curves(fixed), _curves(moving)
    covariance = None
    if Method(method) is Method.ROBUST:
        manifest = weights.read_manifest(Path(model) if model else None)
        covariance = weights.covariance_of(manifest)
        digest = weights.digest(manifest)
        if any(c.model != digest for side in curves for c in side):
            raise ValueError("the curves are of another bundle: name its folder by `model`")
    best = files.best_offset(*curves, Method(method), covariance)
    return None if best is None else best[2]


def open_store(url: str) -> "AbstractContextManager[Engine]":
    """Give the engine of a node's database, for `dicomnode.store` and `dicomnode.query`.

    Raises
    ------
    ConfigError
        If the URL is wrong, or its schema is not the one of this version.
    """
    from dicomnode import store

    return store.opened(url)


def to_sitk_transform(offset: Offset) -> "SimpleITK.TranslationTransform":
    """Return the offset as ITK wants it: from fixed to moving points."""
    from dicomnode.objects import transform

    return transform.to_sitk_transform(offset)


def _curves(given: ScoreCurve | Sequence[ScoreCurve | Refusal]) -> list[ScoreCurve]:
    members = [given] if isinstance(given, ScoreCurve) else given
    return [c for c in members if isinstance(c, ScoreCurve)]
