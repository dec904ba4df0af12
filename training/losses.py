"""The published self-supervised loss, and what is added to it, each term by its name.

Scores are (B, m): B stacks of m equidistant slices, from feet to head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def order(score: Tensor) -> Tensor:
    """Return L_order = -sum log sigmoid(s_{i+1} - s_i), mean over stacks.

    References
    ----------
    Yan et al. 2018, equation 2; Meine and Hering 2019, equation 1.
    """
    return F.softplus(-score.diff(dim=1)).sum(1).mean()


def distance(score: Tensor) -> Tensor:
    """Return L_dist = sum smoothL1(D_{i+1} - D_i) with D_i = s_{i+1} - s_i, mean over stacks.

    References
    ----------
    Yan et al. 2018, equation 3; Meine and Hering 2019, equation 2.
    """
    second = score.diff(dim=1).diff(dim=1)
    return F.smooth_l1_loss(second, torch.zeros_like(second), reduction="none").sum(1).mean()


def millimetres(score: Tensor, z_mm: Tensor, mm_per_score: float) -> Tensor:
    """Return the smooth-l1 error of all pairwise score differences against their distance.

    Beyond the paper: it ties the score to mm, so that slopes agree between patients.

    Parameters
    ----------
    score : (B, m)
    z_mm : (B, m)
        True positions.
    mm_per_score : float
        The unit: one step of the score is this many mm.

    References
    ----------
    After the physical order loss of Schuhegger's bpreg ("h" of its public model), with the
    difference itself in place of its sigmoid.
    """
    ds = score[:, :, None] - score[:, None, :]  # (B, m, m)
    dz = (z_mm[:, :, None] - z_mm[:, None, :]) / mm_per_score
    return F.smooth_l1_loss(ds, dz)


def anchored(score: Tensor, height_mm: Tensor, mm_per_score: float) -> Tensor:
    """Return the smooth-l1 error of scores against heights that landmarks give, NaN: none.

    Beyond the paper: the constant that every other term is blind to.

    Parameters
    ----------
    score : (B, m)
    height_mm : (B, m)
        As `anchors.targets` gives them.
    mm_per_score : float
        The unit: one step of the score is this many mm.
    """
    known = ~torch.isnan(height_mm)
    # Of no slice: a sum over nothing, so that the gradient is 0 and not NaN.
    error = F.smooth_l1_loss(score[known], height_mm[known] / mm_per_score, reduction="sum")
    return error / known.sum().clamp(min=1)


def below(score: Tensor, highest_mm: Tensor, mm_per_score: float) -> Tensor:
    """Return by how much scores exceed the height that they are known to lie below, mean.

    Beyond the paper: limbs carry no landmark, yet are known not to be chest or head.

    Parameters
    ----------
    score : (B, m)
    highest_mm : (B, m)
        Infinity where nothing is known.
    """
    return F.relu(score - highest_mm / mm_per_score).mean()
