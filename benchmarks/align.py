"""How long an alignment takes: curves by every method, many stored curves at once, and FASTA.

- pair: two curves of 600 samples, 1 mm apart, by each method of `dicomnode.core.align`; `pair_ms`
  is that of the last one, the most elaborate
- priors: one curve against 100,000 stored ones (`dicomnode.core.priors`), of which each reaches
  over some of the 128 levels that the one reaches over; to read them from a database is not counted
- fasta: two phantom volumes of 128^3 on the paper's grid, the exact form; simpleitk is the same
  grid visited by ITK's exhaustive optimizer at every voxel, and at every hundredth

Times are medians over repeats, SimpleITK's of one run. Ratios are ours / theirs, below 1 is
better: to the limits that are promised, and to SimpleITK's times.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click
import numpy as np
import SimpleITK
import threadpoolctl
from rich.console import Console
from rich.table import Table

from benchmarks import fasta_itk
from dicomnode import weights
from dicomnode.core import align, fasta, phantom, priors
from dicomnode.model import Method, Quality, ScoreCurve

SAMPLES = 600
STORED, QUICK_STORED = 100_000, 10_000
LEVELS = 128
SIZE, QUICK_SIZE = 128, 40
SAMPLED = 0.01
REPEATS, QUICK_REPEATS = 21, 3
# What is promised, on two cores.
PAIR_MS, PRIORS_S, FASTA_S = 1.0, 0.2, 0.1

T = TypeVar("T")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quick", is_flag=True, help="Small volumes, few repeats: shows that it works.")
def main(as_json: bool, quick: bool) -> None:
    """Measure how long alignments take.

    \b
    Example:  python -m benchmarks.align --json
    """
    result = measure(quick)
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        _print(result)


def measure(quick: bool = False) -> dict[str, Any]:
    """Return what `--json` prints."""
    repeats = QUICK_REPEATS if quick else REPEATS
    rng = np.random.default_rng(1)
    rows = pair_rows(rng, repeats)
    stored = QUICK_STORED if quick else STORED
    priors_s = priors_seconds(rng, stored, repeats)
    _say(f"drawing two phantoms, then SimpleITK{'' if quick else ': a minute or two'}")
    fixed, moving = volumes(QUICK_SIZE if quick else SIZE)
    grid = fasta.paper_grid(fixed, moving)
    fasta_s = _median_s(lambda: fasta.search(fixed, moving, grid), repeats)
    ours = fasta.search(fixed, moving, grid)
    sampled_s, _ = _timed(lambda: fasta_itk.search(fixed, moving, grid, sampled=SAMPLED))
    every_s, theirs = _timed(lambda: fasta_itk.search(fixed, moving, grid))
    pair_ms = rows[-1]["ms"]
    return {
        "pair_ms": pair_ms,
        "priors_100k_s": None if quick else _round(priors_s),
        "fasta_s": _round(fasta_s),
        "fasta_simpleitk_s": _round(every_s),
        "rows": rows,
        "robust_outliers_ms": outliers_ms(rng, repeats),
        "priors": {"curves": stored, "levels": LEVELS, "s": _round(priors_s)},
        "fasta": {
            "shape": list(fixed.hu.shape),
            "grid": [len(grid.z), len(grid.y), len(grid.x)],
            "simpleitk_sampled_s": _round(sampled_s),
            "same_minimum": bool(ours.costs.argmin() == theirs.costs.argmin()),
        },
        "ratios": {
            "pair_limit": _round(pair_ms / PAIR_MS),
            "priors_limit": _round(priors_s * STORED / stored / PRIORS_S),
            "fasta_limit": None if quick else _round(fasta_s / FASTA_S),
            "fasta_simpleitk": _round(fasta_s / every_s),
            "fasta_simpleitk_sampled": _round(fasta_s / sampled_s),
        },
        "threads": {
            "blas": max((p["num_threads"] for p in threadpoolctl.threadpool_info()), default=1),
            "itk": SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads(),
        },
    }


def pair_rows(rng: np.random.Generator, repeats: int) -> list[dict[str, Any]]:
    """Return the time of each method, for two curves that overlap by three quarters."""
    heights = np.arange(0, 1.25 * SAMPLES)
    fixed = _curve(rng, heights[:SAMPLES], 120.0)
    moving = _curve(rng, heights[-SAMPLES:], -310.0)
    rows = []
    covariance = weights.covariance_of(weights.read_manifest())
    for method in Method:
        seconds = _median_s(
            lambda m=method: align.align(fixed, moving, m, covariance), 10 * repeats
        )
        rows.append({"method": str(method), "samples": SAMPLES, "ms": _round(1e3 * seconds)})
    return rows


def outliers_ms(rng: np.random.Generator, repeats: int) -> float:
    """Return the time of robust where some slices are wild, so that it looks twice."""
    heights = np.arange(0, 1.25 * SAMPLES)
    fixed = _curve(rng, heights[:SAMPLES], 120.0)
    moving = _curve(rng, heights[-SAMPLES:], -310.0)
    moving.height_mm[200:240] += 150.0
    covariance = weights.covariance_of(weights.read_manifest())
    call = partial(align.align, fixed, moving, Method.ROBUST, covariance)
    return _round(1e3 * _median_s(call, 10 * repeats))


def priors_seconds(rng: np.random.Generator, stored: int, repeats: int) -> float:
    """Return the time of one curve against the stored ones."""
    one = priors.inverse(_curve(rng, np.arange(-700.0, 700.0), 0.0))
    one[:40] = one[40 + LEVELS :] = np.nan
    assert np.isfinite(one).sum() == LEVELS
    # As `inverse` gives them: z of the levels between two ends, off by some mm, NaN elsewhere.
    low = rng.uniform(-600, 300, stored)
    high = low + rng.uniform(200, 700, stored)
    noise = rng.normal(0, 6, (stored, len(priors.LEVELS_MM))).astype(np.float32)
    many = priors.LEVELS_MM.astype(np.float32) + noise
    many += rng.uniform(-1000, 1000, (stored, 1)).astype(np.float32)
    many[(low[:, None] > priors.LEVELS_MM) | (priors.LEVELS_MM > high[:, None])] = np.nan
    return _median_s(lambda: priors.offsets(one, many), repeats)


def volumes(size: int) -> tuple[fasta.Volume, fasta.Volume]:
    """Return two scans of a phantom, of size^3 voxels each, the second 80 mm higher up."""
    made = []
    for seed, low in ((1, 0.0), (2, 80.0)):
        spacing = (384 / size, 420 / size)
        z_mm = low + spacing[0] * np.arange(size)
        hu = phantom.volume(
            phantom.patient(3), z_mm, pixel_mm=spacing[1], matrix=size, noise_hu=20, seed=seed
        )
        made.append(fasta.Volume(hu.astype(np.float32), (*spacing, spacing[1]), (low, 0.0, 0.0)))
    return made[0], made[1]


def _curve(rng: np.random.Generator, height_mm: Any, offset_mm: float) -> ScoreCurve:
    """Return a curve of one patient: a slow wave that all its scans share, one of its own, noise.

    r is above 0.99, and two of them agree within some 3 mm, as curves of real CT do.
    """
    n = len(height_mm)
    read = height_mm + 15 * np.sin(height_mm / 60)
    read += 3 * np.sin(height_mm / 40 + rng.uniform(0, 6)) + rng.normal(0, 2, n)
    quality = Quality(1.0, 1.0)
    z_mm, score = height_mm + offset_mm, (read / 45).astype(np.float32)
    return ScoreCurve("1.2.3", "bundle", z_mm, score, read, ("",) * n, (1,) * n, quality)


def _median_s(call: Callable[[], object], repeats: int) -> float:
    call()
    return statistics.median(_timed(call)[0] for _ in range(repeats))


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _say(message: str) -> None:
    click.echo(message, err=True)


def _print(result: dict[str, Any]) -> None:
    stored, volume = result["priors"], result["fasta"]
    table = Table("what", "time")
    table.columns[1].justify = "right"
    for row in result["rows"]:
        table.add_row(f"{row['method']}, two curves of {row['samples']}", f"{row['ms']:.3f} ms")
    what = f"one curve against {stored['curves']:,} of {stored['levels']} levels"
    table.add_row(what, f"{stored['s']:.3f} s")
    on = " x ".join(map(str, volume["shape"]))
    table.add_row(f"FASTA, exact, {on}", f"{result['fasta_s']:.3f} s")
    table.add_row("FASTA, SimpleITK, every voxel", f"{result['fasta_simpleitk_s']:.2f} s")
    table.add_row("FASTA, SimpleITK, 1 % of voxels", f"{volume['simpleitk_sampled_s']:.2f} s")
    console = Console()
    console.print(table)
    console.print(f"same minimum as SimpleITK: {volume['same_minimum']}")
    for name, ratio in result["ratios"].items():
        console.print(f"{name}: {'not measured' if ratio is None else f'{ratio:.3g}'}")


if __name__ == "__main__":
    main()
