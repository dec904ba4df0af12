"""What is printed: rows, ratios, scored rates and the time to the offset."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.ingest.rates import QUIET_S, Figures, Key, senders
from benchmarks.ingest.receivers import FORK, ORTHANC, OURS, PLAIN, WHOLE

SCORED_AT = 4  # associations; the most there are, where this is not measured


def summary(figures: dict[Key, Figures], offset_ms: list[float] | None = None) -> dict[str, Any]:
    """Return rows, ratios, scored rates and the time to the offset, as `--json` prints them."""
    median = {key: float(np.median(row.slices_per_s)) for key, row in figures.items()}
    scored = {
        key: float(np.median(row.scored_per_s)) for key, row in figures.items() if row.scored_per_s
    }
    numbers = {key.associations for key in figures}
    n_scored = SCORED_AT if SCORED_AT in numbers else max(numbers)

    def ratio(ours: float | None, theirs: Key) -> float | None:
        other = median.get(theirs)
        return round(ours / other, 3) if ours and other else None

    def acknowledged(n: int, theirs: str, nagle: bool = False) -> float | None:
        return ratio(median.get(Key(OURS, n, nagle)), Key(theirs, n, nagle))

    return {
        "rows": [
            {
                "receiver": key.receiver,
                "associations": key.associations,
                "nagle": key.nagle,
                "slices_per_s": round(median[key], 2),
                "slices_per_s_least": round(min(row.slices_per_s), 2),
                "cpu_ms_per_slice": round(float(np.median(row.cpu_ms_per_slice)), 3),
                "ack_p50_ms": round(float(np.percentile(row.ack_ms, 50)), 3),
                "ack_p99_ms": round(float(np.percentile(row.ack_ms, 99)), 3),
            }
            for key, row in figures.items()
        ],
        "ratios": {
            **{f"orthanc_{n}": acknowledged(n, ORTHANC) for n in sorted(numbers | {1, 4})},
            **{f"storescp_{n}": acknowledged(n, FORK) for n in sorted(numbers | {1, 4})},
            "nagle_storescp": acknowledged(1, PLAIN, nagle=True),
            "scored_vs_orthanc": ratio(
                scored.get(Key(WHOLE, n_scored, False)), Key(ORTHANC, n_scored, False)
            ),
        },
        "scored": [
            {
                "associations": key.associations,
                "nagle": key.nagle,
                "slices_per_s": round(rate, 2),
                "cpu_ms_per_slice": round(float(np.median(figures[key].cpu_ms_per_slice)), 3),
            }
            for key, rate in scored.items()
        ],
        "offset_ms": None
        if not offset_ms
        else {
            "median": round(float(np.median(offset_ms)), 1),
            "most": round(max(offset_ms), 1),
            "repeats": len(offset_ms),
            "quiet_seconds": QUIET_S,
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print a summary as a table."""
    table = Table(title="CT slices of 512 x 512, acknowledged")
    table.add_column("receiver", no_wrap=True)
    for title in ("assoc.", "Nagle", "slices/s", "CPU ms", "p50 ms", "p99 ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["receiver"],
            str(row["associations"]),
            "on" if row["nagle"] else "off",
            f"{row['slices_per_s']:.0f}",
            f"{row['cpu_ms_per_slice']:.2f}",
            f"{row['ack_p50_ms']:.1f}",
            f"{row['ack_p99_ms']:.1f}",
        )
    console = Console()
    console.print(table)
    for row in result["scored"]:
        console.print(
            f"scored, {senders(row['associations'])}, Nagle {'on' if row['nagle'] else 'off'}: "
            f"{row['slices_per_s']:.0f} slices/s, {row['cpu_ms_per_slice']:.2f} ms CPU"
        )
    for name, ratio in result["ratios"].items():
        console.print(f"{name}: {'not measured' if ratio is None else f'{ratio:.2f}'}")
    if offset := result["offset_ms"]:
        console.print(
            f"last slice acknowledged to offset stored, beyond {offset['quiet_seconds']:.0f} s "
            f"of quiet: {offset['median']:.0f} ms, at most {offset['most']:.0f} ms"
        )
