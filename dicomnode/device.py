"""A network on its device: the dtype it works in, and inputs brought to it in batches.

One code path: on CUDA the copies overlap the work, and the many small kernels of a batch are
captured once and replayed; the CPU runs the same batches as they come.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dicomnode.core import network, phantom, preprocess
from dicomnode.core.preprocess import Input, PreprocessSpec
from dicomnode.model import Scores

if TYPE_CHECKING:  # benchmarks use what is here without it
    from dicomnode.weights import Bundle

logger = logging.getLogger(__name__)

# A batch is filled up to a multiple of it. The score of a slice is then the same bits whatever
# stands beside it; batches of odd sizes end in other kernels, which round otherwise (by 1e-5 in
# float32, 1e-2 in bfloat16).
LANES = 4
# Slices a pass on the CPU, whose caches hold what it makes: 0.40 ms a slice in bfloat16, where
# passes of 64 take 0.50.
CPU_PASS = 16
# What "auto" asks of bfloat16, beside units made for it: heights of a drawn body differ by no more.
SAME_MM = 2.0
PROBES = 16


def pick_dtype(wanted: str, bundle: "Bundle", device: torch.device) -> torch.dtype:
    """Return the dtype of a setting: "float32", "bfloat16", or what "auto" finds best.

    That is bfloat16 where the device multiplies matrices in it (AMX: a quarter of the time; a CPU
    without is slower by it) and says the same. Never a matter of time measured: a worker that
    starts again has to score as the one before it did.
    """
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    if not _multiplies_bfloat16(device):
        return torch.float32
    wide, narrow = (
        Runner(bundle, device, dtype, PROBES, capture=False)
        for dtype in (torch.float32, torch.bfloat16)
    )
    inputs = probes(bundle.spec)
    try:
        apart_mm = np.abs(wide(inputs) - narrow(inputs)).max() * bundle.heights.mm_per_score
    except RuntimeError as exc:  # a device that knows no bfloat16 after all
        logger.warning("bfloat16 not used", extra={"reason": str(exc).splitlines()[0]})
        return torch.float32
    return torch.bfloat16 if apart_mm <= SAME_MM else torch.float32


def described(device: torch.device, dtype: torch.dtype) -> str:
    """Return a device as people know it, and the dtype it works in."""
    name = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    return ", ".join([str(device), *name, str(dtype).removeprefix("torch.")])


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":  # compute capability 8.0, Ampere, brought it
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(_cpu_capabilities().get("amx_bf16"))
    return False


def _cpu_capabilities() -> dict[str, object]:
    ask = getattr(torch.cpu, "get_capabilities", dict)  # an older torch does not tell
    return dict(ask())


class Runner:
    """A bundle's network on a device, in one dtype; for one thread at a time.

    Parameters
    ----------
    most : int
        Inputs on the device at a time.
    capture : bool
        Whether a CUDA device replays a graph of its kernels in place of starting each.
    """

    def __init__(
        self,
        bundle: "Bundle",
        device: torch.device,
        dtype: torch.dtype,
        most: int,
        *,
        capture: bool = True,
    ) -> None:
        net = bundle.network
        if dtype != torch.float32:
            net = network.narrowed(net, dtype)
        self.device, self.dtype = device, dtype
        self._network = net.to(device)
        self._on_cuda = device.type == "cuda"
        self._pass = filled(most if self._on_cuda else min(most, CPU_PASS))
        self._size = bundle.spec.size
        self._slots: list[_Slot] = []
        self._graphs: dict[int, Callable[[Tensor], Tensor]] | None = (
            {} if self._on_cuda and capture else None
        )

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[Input]) -> Scores:
        """Return the score of each input, (size, size) uint8 -> (N,) float32.

        Raises
        ------
        RuntimeError
            If the device gives no answer.
        """
        if not inputs:
            return np.empty(0, np.float32)
        with torch.cuda.device(self.device) if self._on_cuda else contextlib.nullcontext():
            scores = [
                self._start(k, inputs[start : start + self._pass])
                for k, start in enumerate(range(0, len(inputs), self._pass))
            ]
            return torch.cat(scores).cpu().numpy()

    def _start(self, k: int, part: Sequence[Input]) -> Tensor:
        """Ask for the scores of one part: (len(part),) float32, on the device, soon."""
        if not self._slots:  # two on CUDA: one is filled and copied while the other is worked on
            shape = (self._pass, 1, self._size, self._size)
            self._slots = [_Slot(shape, self.device) for _ in range(2 if self._on_cuda else 1)]
        slot = self._slots[k % len(self._slots)]
        x = slot.fill(part, filled(len(part)))
        score: Tensor = self._replay(x) if self._graphs is not None else self._network(x)
        slot.leave()
        return score[: len(part)]

    def _replay(self, x: Tensor) -> Tensor:
        assert self._graphs is not None
        if len(x) not in self._graphs:
            self._graphs[len(x)] = captured(self._network, x)
        return self._graphs[len(x)](x)


def captured(work: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the same work on a CUDA device, for inputs of one shape: its kernels as one graph.

    Where they cannot be captured, the work itself, and a warning.

    References
    ----------
    "CUDA Graphs" in the notes on CUDA semantics of torch's documentation.
    """
    x = example.clone()
    try:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose and allocate before they are captured
            for _ in range(3):
                work(x)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work(x)
    except (RuntimeError, AssertionError) as exc:  # the latter without a CUDA device
        logger.warning("kernels not captured", extra={"reason": str(exc).splitlines()[0]})
        return work

    def replay(inputs: Tensor) -> Tensor:
        x.copy_(inputs)
        graph.replay()
        return result.clone()

    return replay


class _Slot:
    """Memory for one batch, here and on the device, and the copy between them."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._here = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._on_cuda)
        if self._on_cuda:
            self._there = torch.zeros(shape, dtype=torch.uint8, device=device)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
            self._copied, self._left = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]  # torch's own

    def fill(self, part: Sequence[Input], count: int) -> Tensor:
        """Return the inputs as the device takes them, (count, 1, size, size) uint8.

        What is beyond them is left from before: it makes no difference.
        """
        if self._on_cuda:
            self._copied.synchronize()  # the last copy has read what is overwritten now
        np.stack(part, out=self._here.numpy()[: len(part), 0])
        if not self._on_cuda:
            return self._here[:count].to(self._device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._left)  # the last batch is done with
            self._there[:count].copy_(self._here[:count], non_blocking=True)
            self._copied.record()
        torch.cuda.current_stream().wait_event(self._copied)
        return self._there[:count]

    def leave(self) -> None:
        """Note that all work on the batch has been asked for."""
        if self._on_cuda:
            self._left.record()


def filled(count: int) -> int:
    """Return how many slices a batch of `count` is filled up to."""
    return -(-count // LANES) * LANES


def probes(spec: PreprocessSpec) -> list[Input]:
    """Return inputs of a drawn trunk."""
    body = phantom.patient(0)
    marks = phantom.landmarks(body)
    z_mm = np.linspace(marks["iliac_crest"], marks["lung_apex"], PROBES)
    images_hu = phantom.volume(body, z_mm, pixel_mm=3.5, matrix=128)
    axial = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    return [preprocess.to_input(image, (3.5, 3.5), axial, spec) for image in images_hu]
