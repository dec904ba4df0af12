"""Where bars and links of a timeline lie."""

from datetime import datetime, timedelta

import pytest

from dicomnode.web.pages import timeline
from dicomnode.web.pages.timeline import GAP, HEIGHT, LEFT, TOP, WIDTH, Covered, draw

T0 = datetime(2024, 1, 1)


def covered(study, days, low=0.0, high=400.0, series=1):
    """Return a Series of a Study so many days after the first; None: without a date."""
    when = None if days is None else T0 + timedelta(days=days)
    return Covered(f"1.{study}", f"1.{study}.{series}", when, low, high)


def test_time_goes_to_the_right_and_height_upwards():
    found = draw([covered(1, 0), covered(2, 100, 100, 300), covered(3, 200)], [("1.2", "1.1")])
    first, second, third = found.columns
    assert second.x - first.x == pytest.approx(third.x - second.x, abs=0.2)
    bar = next(b for b in found.bars if b.of.study_uid == "1.2")
    assert (found.low_mm, found.high_mm) == (-100.0, 500.0)
    assert bar.y == TOP + HEIGHT * 200 / 600
    assert bar.y + bar.height == TOP + HEIGHT * 400 / 600
    assert bar.x + bar.width / 2 == pytest.approx(second.x, abs=0.1)


def test_studies_of_one_week_stand_apart_and_the_picture_grows():
    found = draw([covered(n, n / 24) for n in range(60)], [])
    gaps = [b.x - a.x for a, b in zip(found.columns, found.columns[1:], strict=False)]
    assert min(gaps) >= GAP - 0.1
    assert found.width > LEFT + WIDTH
    assert found.columns[-1].x < found.width


def test_a_study_without_a_date_comes_last_and_one_alone_is_drawn():
    found = draw([covered(1, None), covered(2, 50)], [])
    assert [c.study_uid for c in found.columns] == ["1.2", "1.1"]
    assert len(draw([covered(1, None)], []).columns) == 1


def test_links_lead_from_the_older_to_the_newer_and_only_where_both_are_drawn():
    found = draw([covered(1, 0), covered(2, 300)], [("1.2", "1.1"), ("1.2", "1.9")])
    (link,) = found.links
    xs = [float(word.lstrip("MC")) for word in link.path.split()[::2]]
    assert (link.fixed, link.moving) == ("1.2", "1.1")
    assert xs == sorted(xs)
    assert xs[0] == pytest.approx(found.columns[0].x + timeline.BAR / 2, abs=0.1)


def test_series_of_one_study_stand_side_by_side():
    found = draw([covered(1, 0, series=k) for k in range(3)], [])
    xs = [bar.x for bar in found.bars]
    assert len(set(xs)) == 3 and len(found.columns) == 1


def test_what_lies_outside_is_held_at_the_edge():
    found = draw([covered(1, 0)], [])
    assert found.y(1e6) == TOP and found.y(-1e6) == TOP + HEIGHT
