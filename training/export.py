"""A trained run as a weight bundle that the node loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dicomnode import weights
from dicomnode.core import network
from dicomnode.core.curve import HeightMap
from dicomnode.core.region import Region
from training import train
from training.bank import Bank


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
) -> str:
    """Write the averaged weights of a run, batch normalisation folded, and return the digest."""
    net, config, step = train.load(run)
    settings: dict[str, Any] = {
        "steps": step,
        "seed": config.seed,
        "stacks": config.stacks,
        "m": config.m,
        "loss": {
            "order": config.order,
            "distance": config.distance,
            "millimetres": config.millimetres,
        },
        "patients": len({s.patient for s in bank.series} - set(config.held_out)),
        "series": sum(s.patient not in config.held_out for s in bank.series),
        "slices": sum(len(s.z_mm) for s in bank.series if s.patient not in config.held_out),
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
    )
