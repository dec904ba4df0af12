"""What a device can do at best, and what a network asks of it: the two sides of a share of peak."""

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from dicomnode.core import network
from dicomnode.core.network import NetworkConfig

# Rows of square matrices: large enough to be bound by arithmetic, done in a fraction of a second.
GEMM_ROWS = {"cuda": 8192, "cpu": 2048}
REPEATS = 10
SIZE = 128  # rows and columns of an input


def gemm_flops(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, *, repeats: int = REPEATS
) -> float:
    """Return the FLOP/s of a matrix product, the best of some."""
    n = GEMM_ROWS.get(device.type, 4096)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = fastest(lambda: torch.mm(a, b, out=out), device, repeats=repeats)
    return 2 * n**3 / seconds


def network_flops(config: NetworkConfig, *, training: bool = False) -> int:
    """Return the FLOPs of one slice, forward, or forward and backward.

    A multiplication and an addition are two. Convolutions and the dense layer are counted, by
    torch's own counter; activations and pooling are not.
    """
    net = network.build(config)
    x = torch.zeros(1, 1, SIZE, SIZE)
    with FlopCounterMode(display=False) as counter:
        score = net(x)
        if training:
            score.sum().backward()
    return int(counter.get_total_flops())


def fastest(
    work: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int = 2
) -> float:
    """Return the seconds of one call, the least of `repeats`."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_of(wanted: str) -> torch.device:
    """Return the device of an option; "auto" is CUDA where there is one."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def name_of(device: torch.device) -> str:
    """Return the device as a reader of the figures knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return str(device)
