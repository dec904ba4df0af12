"""Landmarks are found where a body was drawn to have them, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest

from dicomnode.core import phantom, preprocess
from dicomnode.core.preprocess import PreprocessSpec
from training import landmarks

SPEC = PreprocessSpec()


def inputs(body, z_mm):
    volume = phantom.volume(body, z_mm, pixel_mm=3.5, matrix=128, noise_hu=12.0, table=True)
    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    return np.stack([preprocess.to_input(v, (3.5, 3.5), identity, SPEC) for v in volume])


@pytest.fixture(scope="module", params=[0, 1])
def body(request):
    patient = replace(phantom.patient(request.param), arms="down")
    marks = phantom.landmarks(patient)
    z_mm = np.arange(marks["femoral_heads"] - 80.0, marks["vertex"] + 30.0, 4.0)
    x = inputs(patient, z_mm)
    shown = np.array([not preprocess.is_empty(one, SPEC) for one in x])
    return marks, x[shown], z_mm[shown]


def test_lung_and_head_are_found_where_they_were_drawn(body):
    marks, x, z_mm = body
    found = landmarks.find(x, z_mm, SPEC)
    # The apex by area lies below the highest tip of the lung, the base above its lowest.
    assert marks["lung_apex"] - 35 <= found["lung_apex"] <= marks["lung_apex"]
    assert marks["lung_base"] - 5 <= found["lung_base"] <= marks["lung_base"] + 45
    assert found["lung_apex"] < found["neck"] < found["lung_apex"] + 140
    assert found["femoral_heads"] == pytest.approx(marks["femoral_heads"], abs=12.0)
    assert found["vertex"] == pytest.approx(marks["vertex"], abs=20.0)


def test_a_moved_scan_has_moved_landmarks(body):
    _, x, z_mm = body
    here, there = landmarks.find(x, z_mm, SPEC), landmarks.find(x, z_mm - 321.0, SPEC)
    assert there == pytest.approx({name: z - 321.0 for name, z in here.items()})


def test_what_is_not_shown_is_not_found(body):
    marks, x, z_mm = body
    low, high = marks["femoral_heads"] + 60, marks["lung_base"] - 30
    abdomen = (z_mm > low) & (z_mm < high)
    assert landmarks.find(x[abdomen], z_mm[abdomen], SPEC) == {}
    middle = (z_mm > marks["lung_base"] + 60) & (z_mm < marks["lung_apex"] - 60)
    assert landmarks.find(x[middle], z_mm[middle], SPEC) == {}
    above = z_mm > marks["lung_base"] + 60
    assert "lung_base" not in landmarks.find(x[above], z_mm[above], SPEC)
