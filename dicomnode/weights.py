"""The weight bundle: a folder of `weights.safetensors`, `manifest.json` and a model card.

The digest of the manifest, which holds the digest of the weights, names the bundle
wherever a score is stored.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from dicomnode.core import network, region
from dicomnode.core.curve import HeightMap
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.core.region import Region
from dicomnode.core.robust import Covariance
from dicomnode.errors import WeightsError
from dicomnode.manifest import DEFAULT as DEFAULT
from dicomnode.manifest import MANIFEST as MANIFEST
from dicomnode.manifest import read_manifest as read_manifest

FORMAT = 1
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A network ready to score, and all that gives its scores a meaning."""

    digest: str
    manifest: dict[str, Any]
    network: network.Regressor  # in eval(), on the CPU
    spec: PreprocessSpec
    heights: HeightMap
    covariance: Covariance | None = None  # None: the robust method refuses
    regions: tuple[Region, ...] = ()

    @property
    def name(self) -> str:
        """The bundle's name, for people; the digest is what identifies it."""
        return str(self.manifest["name"])


def load(folder: Path | None = None) -> Bundle:
    """Return the bundle of a folder, the default one where none is named.

    Raises
    ------
    WeightsError
        If a file is missing or altered, or the bundle was made for another input.
    """
    folder = folder or DEFAULT
    manifest = read_manifest(folder)
    try:
        data = (folder / WEIGHTS).read_bytes()
    except OSError as exc:
        raise WeightsError(f"no weight bundle in {folder}: {exc}") from exc
    try:
        if manifest["format"] != FORMAT:
            raise WeightsError(f"{folder} has format {manifest['format']}, expected {FORMAT}")
        if hashlib.sha256(data).hexdigest() != manifest["weights_sha256"]:
            raise WeightsError(f"{folder / WEIGHTS} is not the file its manifest names")
        net = network.build(network.NetworkConfig(**manifest["network"]))
        net.load_state_dict(load_tensors(data))
        return Bundle(
            digest=digest(manifest),
            manifest=manifest,
            network=net.eval().requires_grad_(False),
            spec=PreprocessSpec.from_dict(manifest["preprocess"]),
            heights=heights_of(manifest),
            covariance=covariance_of(manifest),
            regions=_regions(folder, manifest),
        )
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as exc:
        raise WeightsError(f"{folder}: the manifest does not describe a bundle: {exc}") from exc


def save(
    folder: Path,
    net: network.Regressor,
    *,
    name: str,
    spec: PreprocessSpec,
    heights: HeightMap,
    training: dict[str, Any],
    covariance: Covariance | None = None,
    regions: Sequence[Region] = (),
) -> str:
    """Write a bundle and return its digest. `training` says what the weights came from."""
    if net.config.normalised:
        raise ValueError("fold batch normalisation before a network is saved")
    folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors({k: v.detach().contiguous().cpu() for k, v in net.state_dict().items()})
    manifest = {
        "format": FORMAT,
        "name": name,
        "network": net.config.to_dict(),
        "preprocess": spec.to_dict(),
        "heights": asdict(heights),
        "covariance": covariance.to_dict() if covariance else None,
        region.KEY: [r.to_dict() for r in regions],
        "training": training,
        "weights_sha256": hashlib.sha256(data).hexdigest(),
    }
    for file, content in (
        (WEIGHTS, data),
        (MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode()),
    ):
        partial = folder / f".{file}.part"
        partial.write_bytes(content)
        os.replace(partial, folder / file)
    return digest(manifest)


def digest(manifest: dict[str, Any]) -> str:
    """Return the bundle's digest: SHA-256 of its manifest in canonical form."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def heights_of(manifest: dict[str, Any]) -> HeightMap:
    """Return the map of scores to body heights that a manifest carries."""
    return HeightMap(**manifest["heights"])


def covariance_of(manifest: dict[str, Any]) -> Covariance | None:
    """Return what a manifest says of the curves' errors, None where it says nothing.

    Raises
    ------
    WeightsError
        If it is not what this version understands.
    """
    values = manifest.get("covariance")
    return None if values is None else Covariance.from_dict(values)


def _regions(folder: Path, manifest: dict[str, Any]) -> tuple[Region, ...]:
    try:
        return region.from_manifest(manifest)
    except WeightsError as exc:
        raise WeightsError(f"{folder / MANIFEST}: {exc}") from exc


def pick_device(wanted: str) -> torch.device:
    """Return the device of a setting: "auto" is CUDA, then MPS, where there is one.

    Raises
    ------
    WeightsError
        If a device is asked for that this machine lacks.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise WeightsError(f"score.device: no device {wanted!r} on this machine") from exc
    return device
