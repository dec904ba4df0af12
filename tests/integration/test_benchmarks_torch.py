"""The benchmarks of training and scoring: their figures, and that they need little."""

import json

import pytest
import torch

from benchmarks import peak
from dicomnode.core.network import NetworkConfig
from tests.alone import ALONE, call


def test_flops_are_those_counted_by_hand():
    """Convolutions of 3 x 3, and the dense layer; two for each multiply and add."""
    sizes = (128, 128, 64, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8)
    channels = (1, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    pairs = zip(channels[:-1], channels[1:], sizes, strict=True)
    by_hand = sum(2 * 9 * a * b * n * n for a, b, n in pairs) + 2 * 512
    assert peak.network_flops(NetworkConfig("vgg16")) == by_hand
    # Backward: as much again for weights and for inputs, but for the first layer's input.
    first = 2 * 9 * 64 * 128 * 128
    assert peak.network_flops(NetworkConfig("vgg16"), training=True) == 3 * by_hand - first


def test_a_matrix_product_is_timed(monkeypatch):
    monkeypatch.setitem(peak.GEMM_ROWS, "cpu", 256)
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e8 < peak.gemm_flops(torch.device("cpu"), dtype, repeats=3) < 1e15


@pytest.fixture(scope="module")
def trained() -> dict:
    done = call("-c", ALONE, "benchmarks.train", "--quick", "--json", "--device", "cpu")
    return json.loads(done.stdout)


def test_the_benchmark_of_training_needs_only_numpy_torch_and_click(trained):
    assert trained.keys() >= {"network", "device", "steps_per_s", "share_of_peak"}
    assert trained["network"] == "compact"
    assert trained["slices_a_step"] == 16
    assert trained["steps_per_s"] > 0


def test_a_share_of_peak_is_flops_by_time(trained):
    flops = 16 * peak.network_flops(NetworkConfig("compact"), training=True)
    share = flops * trained["steps_per_s"] / (1e9 * trained["peak_gflop_per_s"])
    assert trained["share_of_peak"] == pytest.approx(share)
    assert trained["gflop_a_step"] == pytest.approx(flops / 1e9)


def test_the_benchmark_of_scoring_needs_only_numpy_torch_and_click():
    done = call("-c", ALONE, "benchmarks.score", "--quick", "--json", "--device", "cpu")
    result = json.loads(done.stdout)
    assert {(r["network"], r["dtype"], r["source"], r["batch"]) for r in result["rows"]} == {
        (network, dtype, source, batch)
        for network in ("vgg16", "compact")
        for dtype in ("float32", "bfloat16")
        for source in ("inputs", "hu")
        for batch in (1, 4)
    }
    for row in result["rows"]:
        assert row["ms_per_slice"] > 0 and row["share_of_peak"] > 0
        assert row["how"] == "eager"
    assert result["preprocess_ms"] is None
    assert "pydicom" in result["preprocess_skipped"]


def test_preprocessing_is_timed_where_it_can_be():
    done = call("-c", "from benchmarks import score; print(score.preprocess_ms(2))")
    assert 0 < float(done.stdout) < 10_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["train", "score"])
def test_the_benchmarks_run_on_a_gpu(name):
    done = call("-c", ALONE, f"benchmarks.{name}", "--quick", "--json", "--device", "cuda")
    assert "cpu" not in done.stdout
