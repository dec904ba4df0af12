"""What a weight bundle says of itself, without its network: who only asks need not load torch."""

import json
from pathlib import Path
from typing import Any

from dicomnode.errors import WeightsError

DEFAULT = Path(__file__).parent / "weights"
MANIFEST = "manifest.json"


def read_manifest(folder: Path | None = None) -> dict[str, Any]:
    """Return the manifest of a folder, the default one where none is named; not its network.

    Raises
    ------
    WeightsError
        If there is none.
    """
    folder = folder or DEFAULT
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as exc:
        raise WeightsError(f"no weight bundle in {folder}: {exc}") from exc
    if not isinstance(manifest, dict):
        raise WeightsError(f"{folder / MANIFEST} is no manifest")
    return manifest
