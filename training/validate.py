"""Scores a bank, and tells while a network is trained how it reads patients it does not see."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from dicomnode.core import curve
from dicomnode.model import Floats
from training.bank import Bank, BankSeries

# Shorter Series hardly tell a slope.
MIN_EXTENT_MM = 150.0


def score_bank(
    net: nn.Module,
    bank: Bank,
    *,
    series: Iterable[BankSeries] | None = None,
    batch: int = 64,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Floats]:
    """Return Series Instance UID -> scores, feet to head, of the bank's Series, or of some.

    The network is in `eval()`, on whatever device.
    """
    device = next(net.parameters()).device
    scores = {}
    for s in bank.series if series is None else series:
        x = torch.from_numpy(np.array(bank.inputs(s)))[:, None]
        with torch.inference_mode():
            out = torch.cat([net(part.to(device)) for part in torch.split(x, batch)])
        scores[s.series_uid] = out.double().cpu().numpy()
        progress(len(x))
    return scores


def figures(
    net: nn.Module, bank: Bank, patients: Iterable[str], mm_per_score: float
) -> dict[str, float]:
    """Return mean Pearson r, mean slope and its sd over the patients' Series of some length.

    Slopes are learned mm a true mm by the unit of the loss. Empty where no Series is long enough.
    """
    wanted = set(patients)
    series = [
        s for s in bank.series if s.patient in wanted and s.z_mm[-1] - s.z_mm[0] >= MIN_EXTENT_MM
    ]
    if not series:
        return {}
    scores = score_bank(net, bank, series=series)
    r, slope = [], []
    for s in series:
        z_mm, height_mm = np.asarray(s.z_mm), scores[s.series_uid] * mm_per_score
        r.append(curve.pearson_r(z_mm, height_mm))
        slope.append(curve.robust_slope(z_mm, height_mm))
    return {
        "mean_r": float(np.mean(r)),
        "mean_slope": float(np.mean(slope)),
        "sd_slope": float(np.std(slope)),
    }
