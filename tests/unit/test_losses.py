"""Each term of the loss against its formula, worked by hand."""

import math

import pytest
import torch

from training import losses


def minus_log_sigmoid(x: float) -> float:
    return -math.log(1 / (1 + math.exp(-x)))


def test_order_by_hand():
    # s_{i+1} - s_i: 1 and 2, then -1 and 0; mean over the two stacks.
    score = torch.tensor([[0.0, 1.0, 3.0], [5.0, 4.0, 4.0]])
    first = minus_log_sigmoid(1) + minus_log_sigmoid(2)
    second = minus_log_sigmoid(-1) + math.log(2)
    assert losses.order(score).item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_anchored_by_hand():
    # 10 mm a step: errors of 0.5 and 3 steps; smooth-l1 with beta 1; NaN counts for nothing.
    score = torch.tensor([[1.5, 7.0], [100.0, -2.0]])
    height = torch.tensor([[10.0, 40.0], [float("nan"), float("nan")]])
    expected = (0.5 * 0.5**2 + (3 - 0.5)) / 2
    assert losses.anchored(score, height, 10.0).item() == pytest.approx(expected)


def test_anchored_of_no_landmark_has_no_gradient():
    score = torch.ones(2, 3, requires_grad=True)
    losses.anchored(score, torch.full((2, 3), float("nan")), 10.0).backward()
    assert score.grad is not None and (score.grad == 0).all()


def test_below_by_hand():
    score = torch.tensor([[-60.0, -40.0], [5.0, 6.0]])
    highest = torch.tensor([[-460.0, -460.0], [float("inf"), float("inf")]])
    assert losses.below(score, highest, 10.0).item() == pytest.approx(6.0 / 4)


def test_order_of_equal_scores_is_log_2_a_pair():
    assert losses.order(torch.zeros(4, 8)).item() == pytest.approx(7 * math.log(2), rel=1e-5)


def test_order_stays_finite_far_from_order():
    score = torch.tensor([[0.0, -1000.0], [0.0, 1000.0]], requires_grad=True)
    loss = losses.order(score)
    loss.backward()
    assert loss.item() == pytest.approx(500)  # (1000 + 0) / 2
    assert torch.isfinite(score.grad).all()


def test_order_asks_for_scores_that_grow_towards_the_head():
    rising = torch.arange(8.0)[None]
    assert losses.order(rising) < losses.order(rising.flip(1))


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        # D = 1, 2, 0.5; D' = 1, -1.5: 0.5 * 1^2 (or 1 - 0.5) and 1.5 - 0.5
        ([0.0, 1.0, 3.0, 3.5], 0.5 + 1.0),
        ([0.0, 1.0, 2.4], 0.5 * 0.4**2),
        ([0.0, 1.0, -2.0], 4 - 0.5),
        ([3.0, 5.0, 7.0, 9.0], 0.0),
    ],
)
def test_distance_by_hand(score, expected):
    assert losses.distance(torch.tensor([score])).item() == pytest.approx(expected, abs=1e-6)


def test_distance_is_the_mean_over_stacks():
    score = torch.tensor([[0.0, 1.0, -2.0], [0.0, 1.0, 2.0]])
    assert losses.distance(score).item() == pytest.approx(3.5 / 2)


def test_millimetres_by_hand():
    # All pairs of two: differences 0, 1, -1, 0 against 0, 2, -2, 0 units of 10 mm.
    loss = losses.millimetres(torch.tensor([[0.0, 1.0]]), torch.tensor([[50.0, 70.0]]), 10.0)
    assert loss.item() == pytest.approx((0 + 0.5 + 0.5 + 0) / 4)


def test_millimetres_of_true_positions_is_nothing():
    z = torch.tensor([[0.0, 5.0, 30.0], [100.0, 110.0, 120.0]])
    assert losses.millimetres(z / 10 + 7, z, 10.0).item() == pytest.approx(0, abs=1e-9)


def test_no_term_depends_on_where_zero_is():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(4, 8, generator=generator)
    z = torch.arange(8.0).expand(4, 8) * 5
    for term in (losses.order, losses.distance, lambda s: losses.millimetres(s, z, 10.0)):
        torch.testing.assert_close(term(score + 50), term(score), rtol=1e-3, atol=1e-4)
