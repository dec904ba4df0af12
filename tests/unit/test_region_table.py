from itertools import pairwise

import numpy as np
import pytest
from pydicom.sr.codedict import codes

from dicomnode.core import anatomy
from dicomnode.core.region import Region, Support
from training import regions
from training.regions import LandmarkHeight, Point

# A body whose heights are 0.9 of the drawn adult's, from the middle of S1.
SCALE = 0.9
PLACES = regions.reference_heights(regions.REFERENCE)
BODY = {
    name: LandmarkHeight(SCALE * (at_mm - regions.ZERO_MM), 8.0, 20)
    for name, at_mm in PLACES.items()
}
RESIDUAL_MM = 5.0


def table(landmarks=BODY, residual_sd_mm=RESIDUAL_MM) -> dict[str, Region]:
    return {r.name: r for r in regions.region_table(landmarks, residual_sd_mm)}


def only(*names: str) -> dict[str, LandmarkHeight]:
    return {name: BODY[name] for name in names}


@pytest.mark.parametrize("row", regions.CATALOGUE, ids=lambda row: row[0])
def test_every_code_is_in_the_dictionary_of_the_standard_under_its_meaning(row):
    """CID 7151, Segmentation Anatomic Region, has all; CID 4 calls the chest "Thorax"."""
    _, _, value, meaning, *_ = row
    keyword = "".join(word.capitalize() for word in meaning.split())
    code = getattr(codes.CID7151, keyword)
    assert (code.value, code.scheme_designator, code.meaning) == (value, "SCT", meaning)


def test_names_and_codes_are_unique_and_organs_belong_to_a_part_before_them():
    names = [row[0] for row in regions.CATALOGUE]
    assert len(set(names)) == len(names)
    assert len({row[2] for row in regions.CATALOGUE}) == len(names)
    parts: list[str] = []
    for name, part, *_ in regions.CATALOGUE:
        if part:
            assert part == parts[-1], name
        else:
            parts.append(name)
    assert parts == ["thighs", "pelvis", "abdomen", "chest", "neck", "head"]


def test_limits_of_body_parts_ascend_and_meet():
    found = table()
    parts = [found[n] for n in ("pelvis", "abdomen", "chest", "neck", "head")]
    lows = [p.low_mm for p in parts]
    highs = [p.high_mm for p in parts]
    assert lows == sorted(lows) and highs == sorted(highs)
    for below, above in pairwise(parts):
        # The diaphragm's dome reaches into the chest; else one ends where the next begins.
        assert below.high_mm >= above.low_mm
    assert found["thighs"].high_mm == found["pelvis"].low_mm


def test_organs_lie_in_the_neighbourhood_of_their_part():
    """Half of an organ at least, and no further out of its part than two vertebrae."""
    found = table()
    for r in found.values():
        if r.part:
            part = found[r.part]
            common = min(r.high_mm, part.high_mm) - max(r.low_mm, part.low_mm)
            assert common >= 0.5 * (r.high_mm - r.low_mm), r.name
            assert part.low_mm - 72 <= r.low_mm and r.high_mm <= part.high_mm + 72, r.name


def test_a_limit_is_placed_in_proportion_between_landmarks():
    """All landmarks lie at 0.9 of the drawn adult, and so do all limits."""
    for name, _, _, _, low, high in regions.CATALOGUE:
        r = table()[name]
        for point, limit in ((low, r.low), (high, r.high)):
            if limit.support is not Support.UNSUPPORTED:
                expected = SCALE * (point.at_mm - regions.ZERO_MM)
                assert limit.height_mm == pytest.approx(expected, abs=0.06), name


def test_a_limit_that_is_a_landmark_has_its_height_and_spread():
    chest = table({**BODY, "lung_apex": LandmarkHeight(430.0, 12.0, 100)})["chest"]
    assert chest.high.support is Support.LANDMARK
    assert chest.high_mm == 430.0
    # Of the median of 100 patients itself: 1 + pi / 200.
    assert chest.high.sd_mm == pytest.approx(12.0 * np.sqrt(1 + np.pi / 200), abs=0.05)
    assert table()["heart"].high.support is Support.PROPORTION


def test_no_limit_is_known_better_than_the_map_of_scores():
    tight = {n: LandmarkHeight(f.height_mm, 0.0, 10**6) for n, f in BODY.items()}
    for r in table(tight, residual_sd_mm=9.0).values():
        for limit in (r.low, r.high):
            assert limit.sd_mm is None or limit.sd_mm >= 9.0, r.name


def test_what_the_landmarks_do_not_reach_is_unsupported():
    everything = table()
    assert everything["thighs"].low.support is Support.UNSUPPORTED  # limbs are tied to nothing
    chest_only = table(only("lung_base", "lung_apex"))
    assert chest_only["chest"].high.support is Support.LANDMARK
    assert chest_only["head"].high.support is Support.UNSUPPORTED
    assert chest_only["bladder"].low.support is Support.UNSUPPORTED
    assert chest_only["liver"].low.support is Support.PROPORTION


def test_without_landmarks_nothing_is_claimed():
    few = {n: LandmarkHeight(f.height_mm, 8.0, regions.MIN_PATIENTS - 1) for n, f in BODY.items()}
    for landmarks in ({}, few, {"shoulders": LandmarkHeight(400.0, 5.0, 50)}):
        for r in table(landmarks).values():
            assert (r.low.support, r.high.support) == (Support.UNSUPPORTED,) * 2


def test_doubt_grows_with_the_distance_to_landmarks():
    near, far = table(), table(only("lung_base", "lung_apex"))
    for name in ("kidneys", "larynx"):
        assert far[name].low.sd_mm > near[name].low.sd_mm, name
    body = regions.body_map(only("femoral_heads", "lung_apex"), RESIDUAL_MM)
    assert body is not None
    middle = np.mean([PLACES["femoral_heads"], PLACES["lung_apex"]])
    assert body.distance(float(middle)) == pytest.approx(
        (PLACES["lung_apex"] - PLACES["femoral_heads"]) / 4
    )
    assert body.distance(PLACES["lung_apex"]) == 0.0
    assert body.distance(PLACES["lung_apex"] + 40.0) == 40.0


def test_landmarks_that_disagree_with_proportion_widen_all_limits():
    bent = {**BODY, "lung_base": LandmarkHeight(BODY["lung_base"].height_mm + 40, 8.0, 20)}
    straight, crooked = (regions.body_map(b, RESIDUAL_MM) for b in (BODY, bent))
    assert straight is not None and crooked is not None
    assert straight.rate == regions.LEAST_RATE < crooked.rate
    assert table(bent)["kidneys"].low.sd_mm > table()["kidneys"].low.sd_mm


def test_landmarks_out_of_order_are_left_out_by_those_of_fewer_patients():
    wrong = {**BODY, "iliac_crest": LandmarkHeight(300.0, 8.0, 4)}
    body = regions.body_map(wrong, RESIDUAL_MM)
    assert body is not None and "iliac_crest" not in body.names
    assert (np.diff(body.height_mm) > 0).all()
    assert table(wrong)["pelvis"].high.support is Support.PROPORTION


def test_zero_is_the_middle_of_the_first_sacral_vertebra():
    height_mm, sd_mm = regions.zero(BODY, RESIDUAL_MM)
    assert height_mm == pytest.approx(0.0, abs=1e-9)
    moved = {n: LandmarkHeight(f.height_mm + 123.0, 8.0, 20) for n, f in BODY.items()}
    assert regions.zero(moved, RESIDUAL_MM)[0] == pytest.approx(123.0)
    far_mm, far_sd_mm = regions.zero(only("lung_base", "lung_apex"), RESIDUAL_MM)
    assert far_mm == pytest.approx(0.0, abs=1e-9)
    assert far_sd_mm > sd_mm + 10
    with pytest.raises(ValueError, match="no landmark of femoral_heads"):
        regions.zero({}, RESIDUAL_MM)


def test_a_landmark_counts_each_patient_once():
    values = {"a": [10.0, 30.0], "b": [24.0], "c": [30.0], "d": [500.0], "e": [22.0]}
    found = regions.robust_height(values)
    # Of 20, 24, 30, 500, 22: median 24; deviations 4, 0, 6, 476, 2, whose median is 4.
    assert (found.height_mm, found.patients) == (24.0, 5)
    assert found.sd_mm == pytest.approx(1.4826 * 4)


def test_published_vertebrae_ascend_like_those_of_the_drawn_adult():
    """The score of bpreg is no mm, but both tables agree where they overlap."""
    scores = [regions.BPREG[v] for v in regions.BPREG]
    assert scores == sorted(scores)
    middles = [np.mean(regions.VERTEBRAE[v]) for v in regions.BPREG]
    assert np.corrcoef(scores, middles)[0, 1] > 0.999
    assert regions.VERTEBRAE["L5"][0] == 0.0
    for name in ("iliac_crest", "lung_base", "diaphragm_dome"):
        assert PLACES.get(name, 0) - regions.REFERENCE.get(name, 0) == pytest.approx(0, abs=2)
    assert PLACES["lung_apex"] - anatomy.LANDMARKS["lung_apex"] == pytest.approx(-15, abs=1)


def test_soft_organs_are_less_well_placed_than_bones():
    found = {row[0]: row[4] for row in regions.CATALOGUE}
    assert isinstance(found["kidneys"], Point)
    assert found["kidneys"].spread_mm > 20 > 0 == found["lumbar spine"].spread_mm
