"""Two bundles side by side: figures worked out by hand, intervals that hold the truth."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dicomnode.core import network
from dicomnode.core.curve import HeightMap
from dicomnode.core.network import NetworkConfig
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import WeightsError
from dicomnode.weights import Bundle
from training import compare
from training.bank import Bank, BankSeries

N = 21  # slices a Series, 10 mm apart: 200 mm


def made_bank(patients: int, *, second: bool = False) -> Bank:
    """Slices whose mean value is their height: 2 a slice, plus 3 a patient.

    With `second` each patient has another Series of the same Study, the same body 20 mm up.
    """
    series, slices = [], []
    for k in range(patients):
        for extra in range(1 + second):
            start = len(slices)
            slices += [np.full((128, 128), 3 * k + 2 * i, np.uint8) for i in range(N)]
            z_mm = tuple(10.0 * i + 20.0 * extra for i in range(N))
            series.append(BankSeries(f"P{k}", f"1.{k}", f"1.{k}.{extra}", start, z_mm))
    return Bank(np.array(slices), tuple(series), PreprocessSpec())


class Mean(network.Regressor):
    """Gives the mean value of a slice as its score, times something, bent or not."""

    def __init__(self, gain: float = 1.0, bend: float = 0.0) -> None:
        super().__init__(NetworkConfig(width=0.1))
        self.gain, self.bend = gain, bend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.float().mean((1, 2, 3))
        return self.gain * mean + self.bend * mean**2


def bundle(name: str, gain: float = 1.0, bend: float = 0.0, mm_per_score: float = 5.0) -> Bundle:
    return Bundle(
        digest=name,
        manifest={"name": name},
        network=Mean(gain, bend).eval(),
        spec=PreprocessSpec(),
        heights=HeightMap(mm_per_score, 0.0, 1.0),
    )


def rows(a: Bundle, b: Bundle, bank: Bank) -> dict[str, dict]:
    result = compare.compare((a, b), bank)
    assert [x["name"] for x in result["bundles"]] == [a.name, b.name]
    assert all(x["ms_per_slice"] > 0 for x in result["bundles"])
    return {row["figure"]: row for row in result["figures"]}


def test_slopes_are_those_of_the_networks():
    """2 a slice of 10 mm, 5 mm a score: 1 mm a mm; and 1.1 times that."""
    row = rows(bundle("a"), bundle("b", gain=1.1), made_bank(3))["mean slope"]
    assert row["values"] == pytest.approx([1.0, 1.1])
    for key in ("difference", "low", "high"):  # all patients alike: every draw gives the same
        assert row[key] == pytest.approx(0.1)
    assert (row["n"], row["patients"]) == (3, 3)


def test_a_bent_curve_correlates_less():
    found = rows(bundle("a"), bundle("b", bend=0.05), made_bank(4))
    mean, least = found["mean Pearson r"], found["least Pearson r"]
    assert mean["values"][0] == pytest.approx(1.0)
    values = np.array([3 * k + 2 * np.arange(N) for k in range(4)], float)
    r = [np.corrcoef(np.arange(N), v + 0.05 * v**2)[0, 1] for v in values]
    assert mean["values"][1] == pytest.approx(np.mean(r), abs=1e-6)
    assert least["values"][1] == pytest.approx(np.min(r), abs=1e-6)
    assert mean["low"] < mean["difference"] < mean["high"] < 0


def test_two_series_of_one_study_should_not_be_moved():
    row = rows(bundle("a"), bundle("b"), made_bank(2, second=True))[
        "l1 within a study, mean error mm"
    ]
    assert row["values"] == [20.0, 20.0]
    assert row["difference"] == 0.0
    assert row["n"] == 2


def test_what_no_patient_gives_is_none():
    row = rows(bundle("a"), bundle("b"), made_bank(2))["l1 within a study, largest error mm"]
    assert row["values"] == [None, None] and row["n"] == 0


def test_phantoms_do_not_count():
    bank = made_bank(2)
    phantom = replace(bank.series[1], patient="phantom-0")
    result = compare.compare(
        (bundle("a"), bundle("b")), replace(bank, series=(bank.series[0], phantom))
    )
    assert (result["patients"], result["slices"]) == (1, N)
    assert result["figures"][0]["low"] is None  # one patient bounds nothing


def test_the_table_has_a_line_for_each_figure():
    result = compare.compare((bundle("a"), bundle("b", gain=1.1)), made_bank(3))
    text = compare.to_markdown(result)
    assert "| | a | b | difference (95 %) | n |" in text
    assert "| mean slope | 1.00 | 1.10 | +0.10 (+0.10 to +0.10) | 3 |" in text
    assert "| l1 within a study, mean error mm | none | none |  | 0 |" in text
    assert len(text.splitlines()) == 4 + len(compare.FIGURES) + 1


def test_a_further_figure_is_a_row():
    figure = compare.Figure(
        "most slices", lambda bank, scores, heights: {"P0": [float(N)]}, lambda v: float(v.max()), 0
    )
    result = compare.compare((bundle("a"), bundle("b")), made_bank(2), figures=(figure,))
    assert f"| most slices | {N} | {N} | +0 | 1 |" in compare.to_markdown(result)


def test_a_bundle_of_other_inputs_is_refused():
    other = replace(bundle("b"), spec=PreprocessSpec(pixel_mm=5.0))
    with pytest.raises(WeightsError, match="b wants other inputs"):
        compare.compare((bundle("a"), other), made_bank(2))
