"""How fast a network is trained: the training loop itself, on a bank of random slices.

`steps_per_s` is the median over the reports after the first, which warms up. `share_of_peak` is
what the network's convolutions and dense layer do a second, forward and backward, of what one
bf16 matrix product reached on the same device just before. Needs numpy, torch and click alone.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch

from benchmarks import peak
from dicomnode.core.preprocess import PreprocessSpec
from training import train as training
from training.bank import Bank, BankSeries
from training.train import TrainConfig

CONFIGS = Path(training.__file__).parent / "configs"
# (steps a report, reports); the first report warms up.
STEPS = {"cuda": (25, 5), "cpu": (2, 4)}
QUICK_STEPS, QUICK_STACKS = (1, 3), 2
SERIES, SLICES = 8, 320  # the paper's Series have at least 300 slices


def made_bank(size: int) -> Bank:
    """Return a bank whose slices are noise: nothing is learned, at the same speed."""
    rng = np.random.default_rng(0)
    slices = rng.integers(0, 256, (SERIES * SLICES, size, size), np.uint8)
    z_mm = tuple(float(z) for z in range(SLICES))
    series = tuple(BankSeries(f"P{k}", f"{k}.0", f"{k}.1", k * SLICES, z_mm) for k in range(SERIES))
    return Bank(slices, series, PreprocessSpec())


def measure(config: TrainConfig, device: torch.device, steps: tuple[int, int]) -> dict[str, Any]:
    """Return the figures of one config on one device."""
    peak_flops = peak.gemm_flops(device)
    each, reports = steps
    config = replace(config, steps=each * reports)
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        training.train(
            made_bank(peak.SIZE),
            config,
            Path(folder),
            device=device,
            report=lambda p: rates.append(p.steps_per_s),
            report_every=each,
            save_every=config.steps,
        )
    steps_per_s = median(rates[1:])
    slices = config.stacks * config.m
    flops = peak.network_flops(config.network, training=True) * slices
    return {
        "network": config.network.kind,
        "device": peak.name_of(device),
        "steps_per_s": steps_per_s,
        "share_of_peak": flops * steps_per_s / peak_flops,
        "slices_a_step": slices,
        "bf16": config.bf16,
        "augmented": config.augmentation is not None,
        "gflop_a_step": flops / 1e9,
        "peak_gflop_per_s": peak_flops / 1e9,
    }


@click.command()
@click.option("--config", type=click.Choice(["compact", "paper"]), default="compact")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--quick", is_flag=True, help="A few steps of a small batch.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(config: str, device: str, threads: int | None, quick: bool, as_json: bool) -> None:
    """Measure how fast a network is trained.

    \b
    Example: python -m benchmarks.train --config paper --device cuda --json
    """
    if threads:
        torch.set_num_threads(threads)
    settings = TrainConfig.from_toml(CONFIGS / f"{config}.toml")
    settings = replace(settings, shares=TrainConfig().shares)
    on = peak.device_of(device)
    steps = STEPS.get(on.type, STEPS["cpu"])
    if quick:
        settings, steps = replace(settings, stacks=QUICK_STACKS), QUICK_STEPS
    result = measure(settings, on, steps)
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(
        "{network} on {device}: {steps_per_s:.3g} steps/s of {slices_a_step} slices, "
        "{share_of_peak:.0%} of {peak_gflop_per_s:.0f} GFLOP/s".format(**result)
    )


if __name__ == "__main__":
    main()
