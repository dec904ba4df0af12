"""Stacks are equidistant, drawn by share, and varied the same way by the same seed."""

from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from dicomnode.core.network import NetworkConfig
from dicomnode.core.preprocess import PreprocessSpec
from training import sampler
from training.bank import Bank, BankSeries
from training.sampler import Augmentation, Share, StackSampler
from training.train import TrainConfig, load, train

ALL = [Share("*", 1.0)]
SHARES = (Share("b", 2.0), Share("*", 1.0))
STILL = Augmentation(
    scale=0, aspect=0, rotation_degrees=0, shift=0, flip=0, mask=0, noise=0, blur=0,
    value_shift=0, value_scale=0,
)  # fmt: skip


def series(patient: str, start: int = 0, n: int = 20, spacing: float = 5.0, uid: str = "1"):
    return BankSeries(patient, uid, uid, start, tuple(100 + spacing * np.arange(n)))


def bank(patients: list[str], n: int = 20) -> list[BankSeries]:
    return [series(p, i * n, n, uid=f"1.{i}") for i, p in enumerate(patients)]


def draw(members, stacks=500, shares=ALL, m=4, max_gap_mm=1e9, seed=0):
    drawer = StackSampler(members, shares, m=m, max_gap_mm=max_gap_mm)
    return drawer.draw(np.random.default_rng(seed), stacks)


def images(stacks: int = 6, m: int = 3, size: int = 32) -> torch.Tensor:
    """One random image a stack, repeated m times."""
    one = torch.rand(stacks, 1, size, size, generator=torch.Generator().manual_seed(3)) * 255
    return one.expand(stacks, m, size, size).contiguous()


def augment(x, config, seed=0):
    return sampler.augment(x, config, torch.Generator().manual_seed(seed))


def test_a_stack_is_equidistant_and_of_one_series():
    members = [series("a", 0, 20, 5.0), series("b", 20, 31, 2.0), series("c", 51, 8, 7.5)]
    index, z = draw(members, m=8)
    assert index.shape == z.shape == (500, 8)
    steps = np.diff(index, axis=1)
    assert (steps == steps[:, :1]).all()
    assert (steps > 0).all()
    for row, positions in zip(index, z, strict=True):
        (own,) = [s for s in members if s.start <= row[0] < s.stop]
        assert row[-1] < own.stop
        np.testing.assert_allclose(positions, np.array(own.z_mm)[row - own.start])


def test_every_step_and_start_that_fits_is_drawn():
    # 7 slices, 3 a stack: steps 1, 2, 3 with 5, 3, 1 starts.
    index, _ = draw([series("a", n=7)], m=3)
    drawn = {(int(row[0]), int(row[1] - row[0])) for row in index}
    assert drawn == {(start, step) for step in (1, 2, 3) for start in range(7 - 2 * step)}


def test_a_gap_is_not_longer_than_asked():
    _, z = draw([series("a", n=60, spacing=5.0), series("b", 60, 60, 2.0)], max_gap_mm=21)
    assert np.diff(z, axis=1).max() == 20


def test_neighbours_are_drawn_where_every_gap_is_longer_than_asked():
    _, z = draw([series("a", spacing=30.0)], max_gap_mm=21)
    assert (np.diff(z, axis=1) == 30).all()


def test_a_series_of_too_few_slices_is_left_out():
    index, _ = draw([series("a", 0, 3), series("b", 3, 4)], m=4)
    assert index.min() == 3
    with pytest.raises(ValueError, match="at least 4 slices"):
        draw([series("a", 0, 3)], m=4)


def test_the_same_generator_draws_the_same_stacks():
    members = bank(["a", "b", "c"])
    np.testing.assert_array_equal(draw(members, seed=5), draw(members, seed=5))
    assert (draw(members, seed=5)[0] != draw(members, seed=6)[0]).any()


def test_a_share_is_split_over_patients_then_series():
    # a-1 has two series, a-2 one: 0.3 for each of them, and 0.4 for all others.
    members = bank(["a-1", "a-1", "a-2", "b", "c"])
    got = sampler.weights(members, [Share("a-*", 0.6), Share("*", 0.4)])
    np.testing.assert_allclose(got, [0.15, 0.15, 0.3, 0.2, 0.2])


def test_shares_are_relative_to_those_at_hand():
    got = sampler.weights(bank(["a", "b"]), [Share("a", 3), Share("x", 6), Share("b", 1)])
    np.testing.assert_allclose(got, [0.75, 0.25])


def test_the_first_share_that_fits_counts():
    got = sampler.weights(bank(["a-1", "b"]), [Share("a-*", 0.9), Share("*", 0.1)])
    np.testing.assert_allclose(got, [0.9, 0.1])


def test_a_patient_without_a_share_is_an_error():
    with pytest.raises(ValueError, match="'b'"):
        sampler.weights(bank(["a", "b"]), [Share("a", 1.0)])


def test_series_are_drawn_by_their_share():
    members = bank(["a", "b", "b", "c"])
    index, _ = draw(members, 4000, [Share("a", 0.5), Share("*", 0.5)])
    count = Counter((index[:, 0] // 20).tolist())
    # 0.5, then 0.25 for each of two patients; four standard deviations of 4000 draws.
    for k, share in enumerate([0.5, 0.125, 0.125, 0.25]):
        assert count[k] / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)


def test_the_ends_of_a_series_can_be_drawn_more_often():
    members = [series("a", n=101)]
    at_an_end = {}
    for ends in (0.0, 0.5):
        drawer = StackSampler(members, ALL, m=3, max_gap_mm=50.0, ends=ends)
        index, _ = drawer.draw(np.random.default_rng(0), 2000)
        assert index.min() >= 0 and index.max() <= 100
        at_an_end[ends] = float(((index[:, 0] == 0) | (index[:, -1] == 100)).mean())
    # Evenly, 2 of some 90 places; four standard deviations of 2000 draws.
    assert at_an_end[0.0] == pytest.approx(0.022, abs=0.02)
    assert at_an_end[0.5] == pytest.approx(0.511, abs=0.045)


def test_the_same_seed_varies_the_same_way():
    x = images()
    torch.testing.assert_close(
        augment(x, Augmentation(), 7), augment(x, Augmentation(), 7), rtol=0, atol=0
    )
    assert (augment(x, Augmentation(), 7) != augment(x, Augmentation(), 8)).any()


def test_the_seed_of_another_generator_does_not_matter():
    x = images()
    torch.manual_seed(0)
    one = augment(x, Augmentation())
    torch.manual_seed(1)
    torch.testing.assert_close(one, augment(x, Augmentation()), rtol=0, atol=0)


def test_what_is_varied_stays_within_8_bits():
    x = images()
    kept = x.clone()
    got = augment(x, Augmentation(value_shift=200, value_scale=1, noise=100))
    assert got.shape == x.shape
    assert got.min() >= 0
    assert got.max() <= 255
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


def test_an_augmentation_of_nothing_changes_nothing():
    torch.testing.assert_close(augment(images(), STILL), images(), rtol=0, atol=1e-2)


def test_the_slices_of_a_stack_are_varied_alike_noise_aside():
    got = augment(images(), Augmentation(noise=0))
    torch.testing.assert_close(got, got[:, :1].expand_as(got), rtol=0, atol=0)
    assert (got[0, 0] != got[1, 0]).any()


def test_noise_is_drawn_for_each_slice():
    got = augment(images(), replace(STILL, noise=10))
    assert (got[:, 0] != got[:, 1]).any()


def test_a_flip_is_left_against_right():
    got = augment(images(), replace(STILL, flip=1))
    torch.testing.assert_close(got, images().flip(3), rtol=0, atol=1e-2)


def test_a_mask_leaves_air_around_a_smaller_field():
    got = augment(torch.full((40, 2, 64, 64), 200.0), replace(STILL, mask=1))
    assert set(got.unique().tolist()) == {0.0, 200.0}
    inside = got == 200
    assert (inside[:, 0] == inside[:, 1]).all()
    # Half axes are 0.4 to 0.9 of the image's: a circle of 0.4 still covers an eighth of it.
    assert (inside[:, 0].float().mean((1, 2)) > 0.1).all()
    assert not inside.all((1, 2, 3)).any()


def test_air_is_not_shifted_by_contrast_or_level():
    got = augment(torch.zeros(20, 2, 16, 16), replace(STILL, value_shift=50, value_scale=0.5))
    assert not got.any()


def test_augmentation_runs_where_its_input_lies():
    # "meta" stands for any device but the CPU; generators there have no state to give.
    x = torch.zeros(2, 8, 16, 16, device="meta")
    got = sampler.augment(x, Augmentation(), None)
    assert got.device == x.device
    assert got.shape == x.shape


def config(**changes) -> TrainConfig:
    return TrainConfig(
        network=NetworkConfig(width=0.1), steps=3, stacks=8, m=4, warmup=1, bf16=False,
        min_slices=4, **changes,
    )  # fmt: skip


@pytest.fixture
def bank_without_b() -> Bank:
    """A bank whose patient "b" must not be drawn: its slices are not there."""
    slices = np.random.default_rng(0).integers(0, 256, (24, 32, 32), np.uint8)
    members = (series("a", 0, 12), series("b", 10**6, 12), series("c", 12, 12))
    return Bank(slices, members, PreprocessSpec(size=32))


def test_no_slice_of_a_patient_held_out_is_drawn_in_training(bank_without_b, tmp_path):
    # 24 stacks, of which "b" has two in three: left in, it is not missed.
    train(bank_without_b, config(held_out=("b",), shares=SHARES), tmp_path)
    _, trained, steps = load(tmp_path)
    assert (trained.held_out, steps) == (("b",), 3)


def test_a_patient_not_held_out_is_drawn_in_training(bank_without_b, tmp_path):
    with pytest.raises(IndexError):
        train(bank_without_b, config(shares=SHARES), tmp_path)


def test_a_config_survives_its_checkpoint():
    full = config(held_out=("b",), shares=SHARES, augmentation=Augmentation(noise=1.0))
    assert TrainConfig.from_dict(asdict(full)) == full
    assert TrainConfig.from_dict(asdict(config())) == config()
