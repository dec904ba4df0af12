"""Curves and pairs to look at: in a terminal, and as PNG after the paper's Figures 1 and 2."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import plotext

from dicomnode.model import Floats, Offset, ScoreCurve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIXED, MOVING = "#1f6feb", "#d1570c"


def curve_text(z_mm: Floats, height_mm: Floats, *, width: int = 72, height: int = 16) -> str:
    """Return body height over position as a terminal plot."""
    return _text([(z_mm, height_mm, "blue+")], "z, mm", "body height, mm", width, height)


def pair_text(
    fixed: ScoreCurve, moving: ScoreCurve, offset: Offset, *, width: int = 72, height: int = 16
) -> str:
    """Return both curves of a pair on the fixed scan's axis, the moving one shifted."""
    shift = offset.offset_mm or 0.0
    series = [
        (fixed.z_mm, fixed.height_mm, "blue+"),
        (moving.z_mm + shift, moving.height_mm, "orange+"),
    ]
    return _text(series, "z of the fixed scan, mm", "body height, mm", width, height)


def curve_png(curves: Sequence[ScoreCurve], path: Path) -> None:
    """Write body height over position of each curve, with its fitted line, after Figure 1."""
    figure = _figure(7, 5)
    axes = figure.subplots()
    for curve in curves:
        quality = curve.quality
        (points,) = axes.plot(curve.z_mm, curve.height_mm, ".", markersize=4)
        slope, intercept = np.polyfit(curve.z_mm, curve.height_mm, 1)
        axes.plot(
            curve.z_mm,
            slope * curve.z_mm + intercept,
            "-",
            linewidth=0.8,
            color=points.get_color(),
            label=f"{_title(curve.series_uid)}  "
            f"r {quality.pearson_r:.4f}, slope {quality.slope:.2f}",
        )
    axes.set_xlabel("position along the long axis, mm (towards the head)")
    axes.set_ylabel("body height, mm")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def pair_png(fixed: ScoreCurve, moving: ScoreCurve, offset: Offset, path: Path) -> None:
    """Write both curves before and after alignment, after Figure 2."""
    figure = _figure(10, 4.5)
    before, after = figure.subplots(1, 2, sharey=True)
    shift = offset.offset_mm or 0.0
    sigma = "" if offset.sigma_mm is None else f", sigma {offset.sigma_mm:.1f}"
    for axes, dz, title in (
        (before, 0.0, "as scanned"),
        (after, shift, f"{offset.method}: {shift:+.1f} mm{sigma}, {offset.status}"),
    ):
        z_mm = moving.z_mm + dz
        axes.plot(fixed.z_mm, fixed.height_mm, ".-", color=FIXED, markersize=3, label="fixed")
        axes.plot(z_mm, moving.height_mm, ".-", color=MOVING, markersize=3, label="moving")
        low, high = max(fixed.z_mm[0], z_mm[0]), min(fixed.z_mm[-1], z_mm[-1])
        if high > low:
            axes.axvspan(low, high, color="0.5", alpha=0.12, label=f"overlap {high - low:.0f} mm")
        axes.set_title(title)
        axes.set_xlabel("position in the fixed scan, mm")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    before.set_ylabel("body height, mm")
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # half a second that a terminal plot does not need

    return Figure(figsize=(width, height), layout="constrained")


def _title(series_uid: str) -> str:
    # The end of a UID tells Series apart; its head is the same for a whole department.
    return series_uid if len(series_uid) <= 20 else f"...{series_uid[-16:]}"


def _text(
    series: Sequence[tuple[Floats, Floats, str]], x: str, y: str, width: int, height: int
) -> str:
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width, height)
    for z_mm, values, colour in series:
        plotext.plot(z_mm.tolist(), values.tolist(), marker="braille", color=colour)
    plotext.xlabel(x)
    plotext.ylabel(y)
    text: str = plotext.build()
    return text
