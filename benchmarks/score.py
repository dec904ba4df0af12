"""How fast slices are scored: both networks, in two precisions, by batches of several sizes.

From network inputs that are on the device, and from HU that are: 512 x 512 int16, which it makes
the inputs of first. `ms_per_slice` is the least of some passes. `share_of_peak` is what the
network's convolutions and dense layer do a second, of what one matrix product in that precision
reached on the same device just before. bfloat16 is as the node has it: the first convolution
and the head are in float32.

`preprocess_ms` is of one thread: one uncompressed slice of 512 x 512, from the bytes of its file
to the network's input. It is null, and `preprocess_skipped` says why, where pydicom is missing:
everything else needs numpy, torch and click alone.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from io import BytesIO
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks import peak
from dicomnode.core import batches, network, preprocess
from dicomnode.core.network import NetworkConfig
from dicomnode.device import captured
from dicomnode.model import PatientKey

NETWORKS = ("vgg16", "compact")
DTYPES = (torch.float32, torch.bfloat16)
BATCHES = {"cuda": (1, 16, 256, 1024), "cpu": (1, 16, 64)}
REPEATS, QUICK_REPEATS, QUICK_BATCHES = 5, 1, (1, 4)
PREPROCESSED = 20  # slices


def measure(
    device: torch.device, sizes: tuple[int, ...], *, repeats: int, compiled: bool = False
) -> list[dict[str, Any]]:
    """Return a row for each network, precision, source and batch."""
    rows = []
    for dtype in DTYPES:
        peak_flops = peak.gemm_flops(device, dtype)
        for kind in NETWORKS:
            config = NetworkConfig(kind=kind)
            flops = peak.network_flops(config)
            net = network.build(config).eval()
            if dtype != torch.float32:
                net = network.narrowed(net, dtype)
            net = net.to(device)
            works = {"inputs": (net, inputs), "hu": (partial(_from_hu, net), images_hu)}
            for source, (work, made) in works.items():
                for batch in sizes:
                    x = made(batch).to(device)
                    with torch.inference_mode():
                        fast, how = _fast(work, x, compiled)
                        seconds = peak.fastest(partial(fast, x), device, repeats=repeats, warm_up=1)
                    rows.append(
                        {
                            "network": kind,
                            "device": peak.name_of(device),
                            "dtype": str(dtype).removeprefix("torch."),
                            "source": source,
                            "batch": batch,
                            "how": how,
                            "ms_per_slice": 1e3 * seconds / batch,
                            "share_of_peak": flops * batch / seconds / peak_flops,
                        }
                    )
    return rows


def inputs(batch: int) -> Tensor:
    """Return network inputs, (batch, 1, size, size) uint8."""
    return torch.randint(0, 256, (batch, 1, peak.SIZE, peak.SIZE), dtype=torch.uint8)


def images_hu(batch: int) -> Tensor:
    """Return bodies of 512 x 512, (batch, 512, 512) int16 HU."""
    y, x = np.mgrid[-1:1:512j, -1:1:512j]
    body = np.where((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1, 40, -1000).astype(np.int16)
    return torch.from_numpy(body).expand(batch, -1, -1).contiguous()


def _from_hu(net: network.Regressor, images_hu: Tensor) -> Tensor:
    x = batches.to_inputs(images_hu, (0.8, 0.8), preprocess.PreprocessSpec())
    score: Tensor = net(x[:, None])
    return score


def _fast(
    work: Callable[[Tensor], Tensor], x: Tensor, compiled: bool
) -> tuple[Callable[[Tensor], Tensor], str]:
    """Return the work as it is fastest on the device of its input, and what was done for it."""
    if compiled:
        try:
            quick = torch.compile(work, mode="max-autotune")
            quick(x)
            return quick, "compiled"
        except Exception as exc:  # no compiler, no Triton, no kernel: each has its own
            click.echo(f"not compiled: {type(exc).__name__}", err=True)
    if x.is_cuda:
        graph = captured(work, x)
        if graph is not work:
            return graph, "captured"
    return work, "eager"


def preprocess_ms(repeats: int) -> float:
    """Return the milliseconds from a file's bytes to the network's input, the least of some.

    Raises
    ------
    ImportError
        If pydicom is missing.
    """
    from dicomnode import dicomio

    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:512j, -1:1:512j]
    body = np.where((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1, 40, -1000)
    ds = dicomio.ct_dataset(
        (body + rng.normal(0, 15, body.shape)).astype(np.int16),
        patient=PatientKey("MADE"),
        study_uid="1.2.1",
        series_uid="1.2.1.1",
        sop_instance_uid="1.2.1.1.1",
        instance_number=1,
        image_position=(-200.0, -200.0, 0.0),
        pixel_mm=0.8,
        spacing_mm=1.0,
        study_datetime=datetime(2026, 1, 5),
        frame_of_reference_uid="1.2.1.2",
    )
    file = BytesIO()
    ds.save_as(file, enforce_file_format=True)
    spec, data = preprocess.PreprocessSpec(), file.getvalue()
    if dicomio.decode(BytesIO(data), spec)[0].input is None:
        raise RuntimeError("the slice made for the measurement gives no input")
    cpu = torch.device("cpu")
    return 1e3 * peak.fastest(lambda: dicomio.decode(BytesIO(data), spec), cpu, repeats=repeats)


@click.command()
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--compile", "compiled", is_flag=True, help="By torch.compile, which takes minutes.")
@click.option("--quick", is_flag=True, help="Small batches, once.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(device: str, threads: int | None, compiled: bool, quick: bool, as_json: bool) -> None:
    """Measure how fast slices are scored.

    \b
    Example: python -m benchmarks.score --device cuda --json
    """
    if threads:
        torch.set_num_threads(threads)
    on = peak.device_of(device)
    sizes = QUICK_BATCHES if quick else BATCHES.get(on.type, BATCHES["cpu"])
    repeats = QUICK_REPEATS if quick else REPEATS
    rows = measure(on, sizes, repeats=repeats, compiled=compiled)
    result: dict[str, Any] = {"rows": rows, "preprocess_ms": None}
    try:
        result["preprocess_ms"] = preprocess_ms(PREPROCESSED)
    except ImportError as exc:
        result["preprocess_skipped"] = str(exc)
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo("network  dtype     from   batch  how       ms a slice  of peak")
    line = (
        "{network:8} {dtype:9} {source:6} {batch:5d}  {how:8} {ms_per_slice:11.4f} "
        "{share_of_peak:8.0%}"
    )
    for row in rows:
        click.echo(line.format(**row))
    made = result["preprocess_ms"]
    skipped = result.get("preprocess_skipped")
    click.echo(f"on {rows[0]['device']}; a slice's input: {skipped or f'{made:.2f} ms'}")


if __name__ == "__main__":
    main()
