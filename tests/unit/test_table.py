"""Table 1: which pairs are made, how they are cropped, what is counted."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dicomnode.core import curve, fasta
from dicomnode.model import ScoreCurve
from tests.unit.test_robust import COVARIANCE
from training import protocol, table
from training.pairs import Pair
from training.protocol import (
    OVERLAPS,
    Kind,
    KnownPair,
    ProtocolConfig,
    Source,
)
from training.table import Answer, Bootstrap, Result

CONFIG = ProtocolConfig()


def source(patient: str, uid: str, frame: str = "", mm: float = 300.0, low: float = 0.0) -> Source:
    z_mm = tuple((low + np.arange(0, mm + 1, 3.0)).tolist())
    return Source(patient, f"{uid}.0", uid, frame, z_mm)


def archive() -> list[Source]:
    trunk = [source(f"LIDC-{i}", f"1.1.{i}") for i in range(10)]
    head = [source(f"OpenKBP-{i}", f"1.2.{i}") for i in range(40)]
    return [*trunk, *head, source("STS_1", "1.3.1"), source("LIDC-0", "1.1.100")]


def of(kind: Kind, planned: list[protocol.Planned]) -> list[protocol.Planned]:
    return [p for p in planned if p.kind is kind]


# Which pairs


def test_as_many_pairs_as_the_paper_spread_evenly():
    planned = of(Kind.FOLLOW_UP, protocol.plan(archive(), CONFIG))
    assert len(planned) == 277
    by_region = Counter(p.region for p in planned)
    assert by_region == {"trunk": 60, "head-neck": 217}  # 6 each of 10 patients, then the others
    counts = Counter(p.patient for p in planned)
    assert {counts[p] for p in counts if p.startswith("LIDC")} == {6}
    assert {counts[p] for p in counts if p.startswith("OpenKBP")} == {5, 6}
    assert "STS_1" not in counts


def test_heads_do_not_drown_the_trunk_where_there_is_room():
    planned = of(Kind.FOLLOW_UP, protocol.plan(archive(), replace(CONFIG, pairs=100)))
    assert Counter(p.region for p in planned) == {"trunk": 50, "head-neck": 50}
    assert set(Counter(p.patient for p in planned).values()) <= {1, 2, 5}


def test_the_series_of_a_patient_take_turns():
    planned = of(Kind.FOLLOW_UP, protocol.plan(archive(), CONFIG))
    assert Counter(p.fixed for p in planned if p.patient == "LIDC-0") == {"1.1.0": 3, "1.1.100": 3}
    assert all(p.fixed == p.moving for p in planned)


def test_the_same_archive_gives_the_same_pairs_whatever_its_order():
    assert protocol.plan(archive()[::-1], CONFIG) == protocol.plan(archive(), CONFIG)


def test_stress_pairs_fill_every_bin_of_overlap_alike():
    planned = of(Kind.STRESS, protocol.plan(archive(), CONFIG))
    for region in ("trunk", "head-neck"):
        bins = Counter(p.group for p in planned if p.region == region)
        assert set(bins) == set(OVERLAPS)
        assert max(bins.values()) - min(bins.values()) <= 1


def test_short_volumes_are_not_cropped_twice_and_tiny_ones_not_at_all():
    sources = [source("LIDC-1", "1.1", mm=100.0), source("LIDC-2", "1.2", mm=50.0)]
    planned = protocol.plan(sources, CONFIG)
    assert Counter(p.kind for p in planned) == {Kind.FOLLOW_UP: 6}
    assert {p.patient for p in planned} == {"LIDC-1"}


def test_one_frame_of_reference_makes_pairs_in_both_directions():
    kernels = [source("LIDC-1", "1.1", "1.9"), source("LIDC-1", "1.2", "1.9")]
    other = [source("LIDC-1", "1.3", "1.8"), source("LIDC-2", "1.4", "1.9"), source("LIDC-3", "1")]
    apart = source("LIDC-1", "1.5", "1.9", low=500.0)
    planned = protocol.plan([*kernels, *other, apart], CONFIG)
    whole = {(p.fixed, p.moving) for p in of(Kind.SAME_FRAME, planned)}
    assert whole == {("1.1", "1.2"), ("1.2", "1.1")}
    assert len(of(Kind.SAME_FRAME_CROPPED, planned)) == 2 * CONFIG.crops
    assert {p.truth_mm for p in planned} == {0.0}


def test_a_known_pair_is_made_where_both_its_series_are_there():
    known = KnownPair("1.1.3", "1.1.4", -215.0, 10.0)
    config = replace(CONFIG, known=(known, KnownPair("1.1.3", "9.9", 1.0, 1.0)))
    (made,) = of(Kind.KNOWN, protocol.plan(archive(), config))
    assert (made.fixed, made.moving, made.truth_mm, made.tolerance_mm) == (
        "1.1.3",
        "1.1.4",
        -215.0,
        10.0,
    )


def test_each_pair_is_drawn_by_itself():
    planned = protocol.plan(archive(), CONFIG)
    drawn = [protocol.random(p, CONFIG).integers(2**60) for p in planned]
    assert len(set(drawn)) == len(planned)
    assert protocol.random(planned[3], CONFIG).integers(2**60) == drawn[3]
    assert protocol.random(planned[3], replace(CONFIG, seed=1)).integers(2**60) != drawn[3]


# How they are cropped


def test_a_crop_is_the_papers():
    rng = np.random.default_rng(0)
    crops = np.array([protocol.paper_crop(300, CONFIG, rng) for _ in range(8_000)])
    first, count = crops.T
    assert (first.min(), first.max()) == (0, 200)
    assert first.mean() == pytest.approx(100, abs=2)
    assert count.min() == 20
    assert (first + count).max() == 300
    late = first > 190  # 100 slices remain: from 20 to all of them, uniformly
    assert count[late].max() <= 110 and count[late].mean() == pytest.approx(62, abs=3)


@pytest.mark.parametrize("slices", [20, 60, 100])
def test_a_short_volume_is_cropped_from_its_first_slice(slices):
    rng = np.random.default_rng(0)
    crops = np.array([protocol.paper_crop(slices, CONFIG, rng) for _ in range(500)])
    assert set(crops[:, 0]) == {0}
    assert (crops[:, 1].min(), crops[:, 1].max()) == (20, slices)


@pytest.mark.parametrize("group", OVERLAPS)
@pytest.mark.parametrize("extent_mm", [150.0, 400.0])
def test_stress_crops_overlap_as_they_should(group, extent_mm):
    rng = np.random.default_rng(1)
    for _ in range(10):
        a, b = protocol.stress_crops((-70.0, extent_mm - 70), group, CONFIG, rng)
        assert protocol.group_of(protocol.overlap(a, b)) == group
        for low, high in (a, b):
            assert -70 <= low < high <= extent_mm - 70 and 60 <= high - low <= 250


@pytest.mark.parametrize(
    ("b", "share"),
    [
        ((0.0, 100.0), 1.0),
        ((20.0, 50.0), 1.0),  # one within the other
        ((-50.0, 25.0), 1 / 3),
        ((75.0, 500.0), 0.25),
        ((100.0, 150.0), 0.0),
        ((400.0, 500.0), 0.0),
    ],
)
def test_overlap_is_a_share_of_the_shorter_scan(b, share):
    assert protocol.overlap((0.0, 100.0), b) == pytest.approx(share)
    assert protocol.overlap(b, (0.0, 100.0)) == pytest.approx(share)


def test_bins_of_overlap():
    shares = (0.0, 0.001, 0.25, 0.2501, 0.75, 0.7501, 1.0)
    bins = ["none", "0-25 %", "0-25 %", "25-75 %", "25-75 %", "more", "more"]
    assert [protocol.group_of(s) for s in shares] == bins


def test_categories_of_error():
    errors = (0.0, 10.0, -10.0, 10.01, -25.0, 25.1, 75.0, -75.1, 900.0)
    assert [protocol.category(e) for e in errors] == [1, 1, 1, 2, 2, 3, 3, 4, 4]


# What is counted


def result(error_mm: float | None, **values: Any) -> Result:
    defaults: dict[str, Any] = {
        "method": "l1",
        "kind": Kind.FOLLOW_UP,
        "patient": "LIDC-1",
        "region": "trunk",
        "number": 0,
        "unseen": True,
        "overlap": 1.0,
        "truth_mm": -40.0,
        "tolerance_mm": 0.0,
        "offset_mm": None if error_mm is None else -40.0 + error_mm,
        "sigma_mm": None,
        "status": "refused" if error_mm is None else "ok",
        "seconds": 0.002,
    }
    return Result(**(defaults | values))


def test_shares_of_categories_count_refusals_as_none_of_them():
    errors = (3.0, -12.0, 8.0, 30.0, None)
    figures = table.figures([result(e, patient=f"P{i}") for i, e in enumerate(errors)])
    l1 = figures["follow_up"]["all"]["methods"]["l1"]
    shares = [l1[f"category_{c}"][0] for c in (1, 2, 3, 4)]
    assert shares == pytest.approx([0.4, 0.2, 0.2, 0.0])
    assert l1["refused"] == 1
    assert l1["median_mm"][0] == 8.0  # the second of 3, 8, 12, 30
    assert l1["p95_mm"][0] == 30.0
    assert l1["status"] == {"ok": 4, "refused": 1}


def test_patients_are_resampled_not_pairs():
    """One bad patient of 10, however many pairs it has: its share comes and goes as a whole."""
    results = [
        result(50.0 if i == 0 else 1.0, patient=f"P{i}", number=k)
        for i in range(10)
        for k in range(20)
    ]
    bootstrap = Bootstrap((r.patient for r in results), 4000)
    share = bootstrap.share(results, np.array([abs(r.error_mm) > 10 for r in results]))
    assert share[0] == pytest.approx(0.1)
    # Binomial of 10 patients: sd sqrt(0.1 * 0.9 / 10); of 200 pairs it would be 0.021.
    assert share[1:].std() == pytest.approx(0.095, abs=0.005)
    assert set(np.round(share * 10, 6)) <= set(range(11))


def test_a_quantile_of_resamples_is_that_of_the_repeated_values():
    rng = np.random.default_rng(0)
    results = [result(float(e), patient=f"P{i % 7}") for i, e in enumerate(rng.normal(0, 9, 40))]
    values = np.array([r.error_mm for r in results])
    values[3] = np.nan
    bootstrap = Bootstrap((r.patient for r in results), 50)
    for q in (0.5, 0.95):
        for weights, found in zip(
            bootstrap.weights(results), bootstrap.quantile(results, values, q), strict=True
        ):
            repeated = np.repeat(values, weights)
            repeated = repeated[~np.isnan(repeated)]
            assert found == np.quantile(repeated, q, method="inverted_cdf")


def test_differences_are_paired():
    """Where a method is better by 2 mm on each pair, the interval of the difference is 2 mm."""
    errors = np.random.default_rng(0).uniform(12, 90, 30)
    results = [result(float(e), patient=f"P{i}") for i, e in enumerate(errors)]
    better = [replace(r, method="robust", offset_mm=(r.offset_mm or 0) - 2.0) for r in results]
    group = table.figures([*results, *better])["follow_up"]["all"]
    assert group["minus_l1"]["robust"]["median_mm"] == pytest.approx([-2.0, -2.0, -2.0])
    low, high = group["methods"]["l1"]["median_mm"][1:]
    assert high - low > 5


def test_regions_are_told_apart_and_together():
    results = [result(1.0), result(20.0, region="head-neck", patient="OpenKBP-1")]
    groups = table.figures(results)["follow_up"]
    assert {k: g["pairs"] for k, g in groups.items()} == {"all": 2, "trunk": 1, "head-neck": 1}
    assert groups["head-neck"]["methods"]["l1"]["category_2"][0] == 1.0


def test_stress_pairs_are_told_by_their_true_overlap():
    overlaps = (0.0, 0.1, 0.5, 0.9, 1.0)
    results = [result(4.0, kind=Kind.STRESS, overlap=o) for o in overlaps]
    groups = table.figures(results)["stress"]["all"]
    assert [groups[g]["pairs"] for g in OVERLAPS] == [1, 1, 1, 2]


def test_sigma_is_calibrated_by_other_patients():
    """Sigma is half of what it should be: a factor of 2 learnt on others sets it right."""
    rng = np.random.default_rng(2)
    results = [
        result(float(rng.normal(0, 10)), patient=f"P{i % 60}", sigma_mm=5.0, method="robust")
        for i in range(1800)
    ]
    found = table.calibration(results, Bootstrap((r.patient for r in results), 400))["robust"]
    assert found["as_given"][0] == pytest.approx(0.59, abs=0.03)  # erf(0.8225 / sqrt 2)
    assert found["split"][0] == pytest.approx(0.90, abs=0.02)
    assert found["factors"] == pytest.approx([2.0] * len(found["factors"]), abs=0.15)
    assert found["split"][1] < 0.9 < found["split"][2]


def test_no_patient_calibrates_itself():
    """The factor of a patient is the same whatever its own errors are."""
    patients = [f"P{i % 10}" for i in range(100)]
    ratio = np.random.default_rng(0).exponential(1.0, 100)
    mine = np.array([p == "P4" for p in patients])
    before = table.split_factors(patients, ratio)
    after = table.split_factors(patients, np.where(mine, 1000.0, ratio))
    np.testing.assert_array_equal(before[mine], after[mine])
    assert (before[~mine] != after[~mine]).any()


def test_weights_that_saw_one_patient_are_told():
    assert table.figures([result(1.0)])["weights_never_saw_the_patients"] is True
    told = [result(1.0), result(1.0, unseen=None)]
    assert table.figures(told)["weights_never_saw_the_patients"] is None
    assert "may have seen" in table.to_markdown(table.figures(told))
    told.append(result(1.0, unseen=False))
    assert table.figures(told)["weights_never_saw_the_patients"] is False
    assert "**saw**" in table.to_markdown(table.figures(told))


def line(z_mm: np.ndarray) -> ScoreCurve:
    n = len(z_mm)
    uids = tuple(str(i) for i in range(n))
    score = (z_mm / 10).astype(np.float32)
    return ScoreCurve("", "m", z_mm, score, z_mm, uids, (1,) * n, curve.quality(z_mm, z_mm))


def pair(truth_mm: float = 25.0) -> Pair:
    fixed = np.arange(0.0, 200.0, 2.0)
    moving = np.arange(50.0, 120.0)

    def volumes() -> tuple[fasta.Volume, fasta.Volume]:
        rng = np.random.default_rng(0)
        image = rng.normal(0, 300, (100, 8, 8)).astype(np.float32)
        part = image[25:60]
        return (
            fasta.Volume(image, (2.0, 4.0, 4.0), (0.0, 0.0, 0.0)),
            fasta.Volume(part, (2.0, 4.0, 4.0), (50.0 - truth_mm, 0.0, 0.0)),
        )

    return Pair(
        kind=Kind.FOLLOW_UP,
        patient="P",
        region="trunk",
        number=0,
        fixed=line(fixed),
        moving=replace(line(moving), z_mm=moving - truth_mm),
        truth_mm=truth_mm,
        tolerance_mm=0.0,
        overlap=1.0,
        unseen=True,
        drawn={},
        volumes=volumes,
    )


def test_the_methods_of_the_package_answer():
    results = table.measure([pair()], table.methods(covariances={"P": COVARIANCE}))
    assert {r.method for r in results} == {"fast", "l1", "robust", "FASTA"}
    for r in results:
        # FASTA steps by the reach of its grid over 71; 2 mm slices.
        assert r.error_mm == pytest.approx(0.0, abs=2.0 if r.method == "FASTA" else 0.5), r.method
        assert 0 < r.seconds < 5


def test_a_method_is_a_plug_in():
    def odd(p: Pair) -> Answer:
        return Answer(p.truth_mm + 30.0, 20.0, "ok", 0.5)

    seen: list[int] = []
    (found,) = table.measure([pair()], {"odd": odd}, seen.append)
    assert (found.method, found.error_mm, found.sigma_mm) == ("odd", pytest.approx(30.0), 20.0)
    assert seen == [1]
    with pytest.raises(KeyError):
        table.methods(["odd"])


@pytest.fixture
def results() -> Iterator[list[Result]]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(12):
        for kind in Kind:
            for method in ("fast", "l1", "robust"):
                made.append(
                    result(
                        float(rng.normal(0, 20)),
                        method=method,
                        kind=kind,
                        patient=f"P{i}",
                        region=("trunk", "head-neck")[i % 2],
                        overlap=float(rng.choice([0.0, 0.2, 0.5, 1.0])),
                        sigma_mm=15.0 if method == "robust" else None,
                    )
                )
    made.append(result(None, method="robust", patient="P3", region="head-neck"))
    yield made


def test_tables_are_well_formed(results):
    text = table.to_markdown(table.figures(results, draws=50))
    blocks = [b.splitlines() for b in text.split("\n\n") if b.lstrip().startswith("|")]
    assert len(blocks) >= 8
    for block in blocks:
        assert len({row.count("|") for row in block}) == 1, block[0]
    assert "the paper's l1, by its readers | 72.6 | 23.1 | 3.6 | 0.7" in text
    assert "| none |" in text and "| more |" in text


def test_errors_are_drawn(tmp_path, results):
    table.plot(results, tmp_path / "table1.png")
    assert (tmp_path / "table1.png").read_bytes().startswith(b"\x89PNG")
