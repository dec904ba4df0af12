import json
from dataclasses import replace

import numpy as np
import pytest

from dicomnode.core import region
from dicomnode.core.region import Extent, Limit, Region, Showing, Support
from dicomnode.errors import WeightsError


def at(height_mm: float, sd_mm: float = 10.0) -> Limit:
    return Limit(Support.PROPORTION, height_mm, sd_mm)


UNKNOWN = Limit(Support.UNSUPPORTED)
CHEST = Region("chest", "816094009", "Chest", at(200.0), at(400.0))
LIVER = Region("liver", "10200004", "Liver", at(100.0), at(250.0), part="abdomen")
HEART = Region("heart", "80891009", "Heart", at(240.0), at(340.0), part="chest")
HEAD = Region("head", "69536005", "Head", at(500.0), UNKNOWN)
TABLE = (LIVER, CHEST, HEART, HEAD)


def shares(z_mm, height_mm, regions=TABLE) -> dict[str, float]:
    found = region.coverage(np.asarray(z_mm, float), np.asarray(height_mm, float), regions)
    return {r.name: share for r, share in found}


def test_coverage_is_the_share_of_a_region_that_slices_fill():
    """Slices of 5 mm from 150 to 300 fill 147.5 to 302.5 mm."""
    height_mm = np.arange(150.0, 301.0, 5.0)
    found = shares(height_mm - 1000.0, height_mm)
    assert found == {
        "liver": pytest.approx(102.5 / 150),
        "chest": pytest.approx(102.5 / 200),
        "heart": pytest.approx(62.5 / 100),
    }


def test_a_region_that_the_series_does_not_meet_is_not_covered_and_one_inside_it_is():
    height_mm = np.arange(0.0, 451.0, 2.0)
    assert shares(height_mm, height_mm) == {"liver": 1.0, "chest": 1.0, "heart": 1.0}
    assert shares(height_mm, height_mm + 600.0) == {"liver": 0.0, "chest": 0.0, "heart": 0.0}


def test_a_region_without_a_limit_has_no_share():
    height_mm = np.arange(400.0, 800.0, 5.0)
    assert "head" not in shares(height_mm, height_mm)


def test_missing_slices_count_as_not_covered():
    """Of slices 5 mm apart from 200 to 400, those at 255 to 345 are gone."""
    z_mm = np.r_[200.0:251.0:5.0, 350.0:401.0:5.0]
    np.testing.assert_allclose(region.covered(z_mm, z_mm), [[197.5, 252.5], [347.5, 402.5]])
    assert shares(z_mm, z_mm)["chest"] == pytest.approx((52.5 + 52.5) / 200)


def test_spacing_that_changes_on_the_way_leaves_no_gap():
    z_mm = np.r_[0.0:100.0:1.0, 100.0:301.0:5.0]
    np.testing.assert_allclose(region.covered(z_mm, z_mm), [[-0.5, 302.5]])


def test_a_body_taller_than_the_average_fills_less_body_height():
    """Where 1 mm of the patient is 0.8 mm of body height, a slice of 5 mm fills 4."""
    z_mm = np.arange(0.0, 201.0, 5.0)
    np.testing.assert_allclose(region.covered(z_mm, 0.8 * z_mm), [[-2.0, 162.0]])


def test_coverage_does_not_depend_on_the_direction_of_the_curve():
    height_mm = np.r_[100.0:201.0:5.0, 260.0:321.0:5.0]
    np.testing.assert_allclose(
        region.covered(-height_mm[::-1], height_mm[::-1]), region.covered(height_mm, height_mm)
    )


def test_slices_that_are_read_wrongly_add_nothing():
    z_mm = np.arange(0.0, 301.0, 2.0)
    height_mm = z_mm.copy()
    height_mm[[0, 1, 70]] = 900.0, 850.0, -700.0
    np.testing.assert_allclose(region.covered(z_mm, height_mm), [[3.0, 301.0]])


def test_noise_hardly_changes_coverage():
    rng = np.random.default_rng(0)
    z_mm = np.arange(0.0, 301.0, 2.0)
    ((low, high),) = region.covered(z_mm, z_mm + rng.normal(0, 5, len(z_mm)))
    assert (low, high) == pytest.approx((-1.0, 301.0), abs=8.0)


@pytest.mark.parametrize("heights", [[10.0, 15.0], [10.0, 10.0]])
def test_two_slices_are_a_curve(heights):
    ((low, high),) = region.covered(np.array([0.0, 5.0]), np.array(heights))
    assert low < min(heights) and high > max(heights)


def test_a_series_shows_the_parts_it_covers_by_half_or_else_organs():
    assert region.shown([(CHEST, 0.5), (HEART, 1.0), (LIVER, 0.49)]) == ["chest"]
    assert region.shown([(CHEST, 0.4), (HEART, 1.0), (LIVER, 0.7)]) == ["heart", "liver"]
    assert region.shown([(CHEST, 0.2), (HEART, 0.2)]) == []


def test_a_region_is_found_by_name_or_code():
    assert region.lookup(TABLE, "heart") is HEART
    assert region.lookup(TABLE, " Heart") is HEART
    assert region.lookup(TABLE, "80891009") is HEART
    assert region.lookup(TABLE, "knee") is None


def test_a_table_survives_its_manifest():
    manifest = json.loads(json.dumps({"regions": [r.to_dict() for r in TABLE]}))
    assert region.from_manifest(manifest) == TABLE


def test_a_bundle_without_the_key_has_no_regions():
    assert region.from_manifest({"heights": {}}) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_mm": 400.0}, "low_mm 400.0 is not below high_mm 400.0"),
        ({"low_mm": "200"}, "low_mm is '200', not a number"),
        ({"high_sd_mm": True}, "high_sd_mm is True"),
        ({"high_mm": float("nan")}, "not finite"),
        ({"low_sd_mm": -1.0}, "negative sd"),
        ({"low_sd_mm": None}, "proportion with 1 of height and sd"),
        ({"low_support": "unsupported"}, "unsupported with 2"),
        ({"low_support": "guess"}, "'guess' is not a valid Support"),
        ({"scheme": "FMA"}, "scheme 'FMA', expected SCT"),
        ({"code": "T-D3000"}, "'T-D3000' is no SNOMED CT identifier"),
        ({"code": 816094009}, "code is 816094009, not text"),
        ({"name": ""}, "without name"),
        ({"name": "liver"}, "its name or code is there already"),
        ({"code": "10200004"}, "its name or code is there already"),
    ],
)
def test_a_bad_row_is_refused_and_named(change, message):
    rows = [LIVER.to_dict(), {**CHEST.to_dict(), **change}]
    with pytest.raises(WeightsError, match=r"regions\[1\]") as raised:
        region.from_manifest({"regions": rows})
    assert message in str(raised.value)


def test_a_row_that_lacks_a_value_and_a_table_that_is_none_are_refused():
    row = CHEST.to_dict()
    del row["high_support"]
    with pytest.raises(WeightsError, match=r"regions\[0\] \(chest\): no high_support"):
        region.from_manifest({"regions": [row]})
    with pytest.raises(WeightsError, match="a list is expected, not dict"):
        region.from_manifest({"regions": {"chest": row}})
    with pytest.raises(WeightsError, match=r"regions\[0\]: a region is expected"):
        region.from_manifest({"regions": ["chest"]})


def test_a_region_is_not_upside_down():
    with pytest.raises(ValueError, match="not below"):
        replace(CHEST, low=at(500.0))


def showing(z_mm, height_mm, regions=TABLE) -> dict[str, Showing]:
    found = region.showing(np.asarray(z_mm, float), np.asarray(height_mm, float), regions)
    return {s.region.name: s for s in found}


def ends(z_mm, height_mm, wanted: Region = CHEST) -> tuple[int, int] | None:
    found = showing(z_mm, height_mm, [wanted]).get(wanted.name)
    return (found.first, found.last) if found else None


def test_the_outermost_slices_of_a_region_are_those_within_its_limits():
    height_mm = np.arange(100.0, 500.0, 10.0)
    assert ends(height_mm - 1000.0, height_mm) == (10, 30)
    # A falling curve: the header is wrong, and z still grows with the index.
    assert ends(height_mm, height_mm[::-1]) == (9, 29)


def test_a_region_cut_off_by_the_series_ends_with_it():
    height_mm = np.arange(300.0, 600.0, 10.0)
    assert ends(height_mm, height_mm) == (0, 10)


def test_a_region_between_two_slices_is_in_the_nearest_one():
    height_mm = np.arange(404.0, 600.0, 10.0)
    thin = Region("thin", "1", "Thin", at(450.0), at(452.0))
    assert ends(height_mm, height_mm, thin) == (5, 5)


def test_a_region_not_shown_has_no_slices():
    height_mm = np.arange(410.0, 600.0, 10.0)
    assert ends(height_mm, height_mm) is None
    z_mm = np.r_[0.0:191.0:10.0, 410.0:601.0:10.0]  # the chest is what is missing
    assert ends(z_mm, z_mm) is None


@pytest.mark.parametrize("wrong", [2, 30])
def test_a_slice_read_wrongly_is_no_end_of_a_region(wrong):
    z_mm = np.arange(150.0, 700.0, 10.0)
    height_mm = z_mm.copy()
    height_mm[wrong] = 310.0  # metal; it shows no chest, and slices are still counted with it
    assert ends(z_mm, height_mm) == (5, 25)


@pytest.mark.parametrize(
    ("low_mm", "high_mm", "extent"),
    [
        (190.0, 410.0, "complete"),  # the chest is 200 to 400 mm, each end with an sd of 10
        (191.0, 410.0, "indeterminate"),
        (190.0, 409.0, "indeterminate"),
        (210.0, 390.0, "indeterminate"),
        (212.0, 500.0, "partial"),
        (0.0, 388.0, "partial"),
    ],
)
def test_a_region_is_complete_or_partial_where_its_ends_leave_no_doubt(low_mm, high_mm, extent):
    height_mm = np.linspace(low_mm, high_mm, 1000)
    found = showing(height_mm, height_mm, [CHEST])["chest"]
    assert found.extent == extent
    assert found.share == pytest.approx(shares(height_mm, height_mm)["chest"])


def test_missing_slices_make_a_region_partial():
    z_mm = np.r_[0.0:251.0:5.0, 350.0:601.0:5.0]
    assert showing(z_mm, z_mm)["chest"].extent is Extent.PARTIAL


def test_an_organ_that_varies_by_more_than_its_size_is_judged_by_its_middle():
    organ = Region("organ", "1", "Organ", at(290.0, 20.0), at(310.0, 20.0))
    for low_mm, high_mm, extent in (
        (200.0, 400.0, "complete"),
        (289.0, 400.0, "indeterminate"),
        (200.0, 305.0, "indeterminate"),
    ):
        height_mm = np.linspace(low_mm, high_mm, 1000)
        assert showing(height_mm, height_mm, [organ])["organ"].extent == extent
    z_mm = np.r_[0.0:296.0:1.0, 304.0:600.0:1.0]
    assert showing(z_mm, z_mm, [organ])["organ"].extent is Extent.PARTIAL


def test_less_than_the_ends_vary_by_shows_no_region():
    for high_mm, shown in ((209.0, False), (212.0, True)):
        height_mm = np.linspace(0.0, high_mm, 1000)
        assert shares(height_mm, height_mm)["chest"] > 0
        assert ("chest" in showing(height_mm, height_mm)) is shown


def test_a_region_with_one_known_limit_is_shown_from_there():
    height_mm = np.arange(400.0, 800.0, 10.0)
    head = showing(height_mm, height_mm)["head"]
    assert (head.share, head.extent) == (None, Extent.INDETERMINATE)
    assert (head.first, head.last) == (10, 39)
    assert "head" not in showing(height_mm - 300.0, height_mm - 300.0)
    nowhere = Region("nowhere", "1", "Nowhere", UNKNOWN, UNKNOWN)
    assert showing(height_mm, height_mm, [nowhere]) == {}


def test_a_region_around_height_zero_is_one_like_others():
    height_mm = np.arange(-200.0, 200.0, 10.0)
    around = Region("around", "1", "Around", at(-50.0), at(50.0))
    assert showing(height_mm, height_mm, [around])["around"].extent is Extent.COMPLETE
