"""What a device is given and gives back: scores that depend on neither neighbours nor dtype."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dicomnode import device, dicomio, weights
from dicomnode.core import network, phantom, preprocess
from dicomnode.core.network import NetworkConfig
from dicomnode.core.preprocess import Input
from dicomnode.device import Runner
from dicomnode.weights import Bundle

CPU = torch.device("cpu")
CT = Path(__file__).parents[3] / "shared" / "ct"
DTYPES = (torch.float32, torch.bfloat16)

on_every_device = pytest.mark.parametrize(
    "on",
    [
        CPU,
        pytest.param(
            torch.device("cuda"),
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
    ids=str,
)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return weights.load()


@pytest.fixture(scope="module")
def inputs() -> list[Input]:
    """A drawn patient, pelvis to head, every 16 mm."""
    body = phantom.patient(7)
    marks = phantom.landmarks(body)
    z_mm = np.arange(marks["symphysis"], marks["skull_base"], 16.0)
    images_hu = phantom.volume(body, z_mm, pixel_mm=3.5, matrix=128, seed=7)
    axial = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    spec = preprocess.PreprocessSpec()
    return [preprocess.to_input(image, (3.5, 3.5), axial, spec) for image in images_hu]


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 33])
def test_a_score_is_the_same_bits_in_every_batch(bundle, inputs, on, dtype, size):
    """A slice that is scored again after a crash has other neighbours."""
    run = Runner(bundle, on, dtype, 64)
    together = run(inputs)
    parts = [run(inputs[i : i + size]) for i in range(0, len(inputs), size)]
    turned = run(inputs[::-1])[::-1]
    if on.type == "cpu":
        np.testing.assert_array_equal(np.concatenate(parts), together)
        np.testing.assert_array_equal(turned, together)
    else:  # its libraries may choose other kernels for batches of other sizes
        np.testing.assert_allclose(np.concatenate(parts), together, atol=0.02)
        np.testing.assert_allclose(turned, together, atol=0.02)


@on_every_device
def test_half_the_bits_give_the_same_heights(bundle, inputs, on):
    wide, narrow = (Runner(bundle, on, dtype, 16)(inputs) for dtype in DTYPES)
    apart_mm = bundle.heights(narrow) - bundle.heights(wide)
    assert np.abs(apart_mm).max() < 1.5
    assert np.sqrt((apart_mm**2).mean()) < 0.3
    assert (apart_mm != 0).any()


@pytest.mark.skipif(not CT.exists(), reason=f"no real CT in {CT}")
@pytest.mark.parametrize("patient", ["LIDC-IDRI-0001", "ACRIN-FLT-Breast_001", "HNC-0522c0002"])
def test_half_the_bits_give_the_same_heights_of_real_ct(bundle, patient):
    files = sorted(path for path in (CT / patient).rglob("*") if path.is_file())
    decoded = [dicomio.decode(path, bundle.spec)[0].input for path in files[::4]]
    real = [x for x in decoded if x is not None]
    assert len(real) > 20
    wide, narrow = (Runner(bundle, CPU, dtype, 16)(real) for dtype in DTYPES)
    apart_mm = bundle.heights(narrow) - bundle.heights(wide)
    assert abs(apart_mm.mean()) < 0.2
    assert apart_mm.std() < 0.3
    assert np.abs(apart_mm).max() < 2.0


@on_every_device
def test_every_device_gives_the_scores_of_the_cpu(bundle, inputs, on):
    expected = Runner(bundle, CPU, torch.float32, 16)(inputs)
    for dtype, atol in ((torch.float32, 0.02), (torch.bfloat16, 0.15)):
        for most in (4, 64):
            np.testing.assert_allclose(Runner(bundle, on, dtype, most)(inputs), expected, atol=atol)


@on_every_device
@in_every_dtype
def test_what_lies_in_memory_from_the_last_batch_makes_no_difference(bundle, inputs, on, dtype):
    run = Runner(bundle, on, dtype, 16)
    before = run(inputs[:1])
    run(inputs)
    np.testing.assert_array_equal(run(inputs[:1]), before)
    assert run([]).shape == (0,) and before.dtype == np.float32


@pytest.mark.parametrize("kind", ["compact", "vgg16"])
def test_a_narrowed_network_keeps_its_ends_wide(kind):
    net = network.build(NetworkConfig(kind, width=0.25)).eval()
    narrow = network.narrowed(net)
    dtypes = [m.weight.dtype for m in narrow.basis if isinstance(m, torch.nn.Conv2d)]
    assert dtypes[0] == narrow.head.weight.dtype == torch.float32
    assert set(dtypes[1:]) == {torch.bfloat16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}, "the network itself is left"
    x = torch.randint(0, 256, (3, 1, 128, 128), dtype=torch.uint8)
    with torch.inference_mode():
        wide, score = net(x), narrow(x)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, wide, rtol=0.05, atol=0.05)


@on_every_device
def test_what_cannot_be_captured_runs_as_it_is(on, caplog):
    def work(x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())  # the host wants to know: no graph holds that

    x = torch.ones(4, device=on)
    assert device.captured(work, x)(x).tolist() == [4.0] * 4
    assert "kernels not captured" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_work_gives_what_the_work_does():
    x = torch.arange(8.0, device="cuda").reshape(2, 4)
    twice = device.captured(lambda x: 2 * x, torch.zeros_like(x))
    assert torch.equal(twice(x), 2 * x)
    first = twice(x)
    twice(x + 1)
    assert torch.equal(first, 2 * x), "a result is its caller's own"


# Which dtype


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_a_dtype_that_is_named_is_taken(bundle, wanted):
    assert device.pick_dtype(wanted, bundle, CPU) == getattr(torch, wanted)


@pytest.fixture
def amx(monkeypatch):
    """A CPU made for bfloat16, whatever this one is made for."""
    monkeypatch.setattr(device, "_cpu_capabilities", lambda: {"amx_bf16": True})


def test_half_the_bits_are_taken_where_they_pay(bundle, amx):
    assert device.pick_dtype("auto", bundle, CPU) == torch.bfloat16


def test_all_bits_are_taken_where_half_do_not_pay(bundle, monkeypatch):
    for capabilities in ({}, {"amx_bf16": False, "avx512_bf16": True}):
        monkeypatch.setattr(device, "_cpu_capabilities", lambda c=capabilities: c)
        assert device.pick_dtype("auto", bundle, CPU) == torch.float32


def test_half_the_bits_are_not_taken_where_scores_differ(bundle, amx):
    coarse = replace(bundle, heights=replace(bundle.heights, mm_per_score=1e4))
    assert device.pick_dtype("auto", coarse, CPU) == torch.float32


def test_a_device_without_half_the_bits_takes_all(bundle, amx, monkeypatch, caplog):
    def refuse(net: network.Regressor, dtype: torch.dtype) -> network.Regressor:
        def forward(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not implemented for 'BFloat16'")

        broken = network.build(net.config)
        broken.forward = forward
        return broken

    monkeypatch.setattr(network, "narrowed", refuse)
    assert device.pick_dtype("auto", bundle, CPU) == torch.float32
    assert "bfloat16 not used" in caplog.text
