"""A trained run as a weight bundle that the node loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dicomnode import weights
from dicomnode.core import network
from dicomnode.core.curve import HeightMap
from dicomnode.core.region import Region
from dicomnode.core.robust import Covariance
from training import train
from training.bank import PHANTOM_PREFIX, Bank


def bundle(
    run: Path,
    bank: Bank,
    heights: HeightMap,
    *,
    name: str,
    out: Path,
    zero: str,
    commit: str,
    regions: Sequence[Region] = (),
    covariance: Covariance | None = None,
) -> str:
    """Write the averaged weights of a run, batch normalisation folded, and return the digest."""
    net, config, step = train.load(run)
    every = train.trained_on(bank, config)
    trained = [s for s in every if not s.patient.startswith(PHANTOM_PREFIX)]
    settings: dict[str, Any] = {
        "steps": step,
        "seed": config.seed,
        "stacks": config.stacks,
        "m": config.m,
        "loss": {
            "order": config.order,
            "distance": config.distance,
            "millimetres": config.millimetres,
            "anchored": config.anchored,
            "below": config.below,
        },
        "patients": len({s.patient for s in trained}),
        "series": len(trained),
        "slices": sum(len(s.z_mm) for s in trained),
        "phantoms": len(every) - len(trained),
        "bank_sha256": bank.digest(),
        "height_zero": zero,
        "commit": commit,
    }
    return weights.save(
        out,
        network.fold(net),
        name=name,
        spec=bank.spec,
        heights=heights,
        training=settings,
        regions=regions,
        covariance=covariance,
    )
