"""The weights that score a patient: of a bundle, of a run, or of the fold that never saw it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dicomnode import weights
from dicomnode.core.curve import HeightMap
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import WeightsError
from dicomnode.model import Scores
from training import train

Inputs = npt.NDArray[np.uint8]
BATCH = 16  # larger ones are no faster on a CPU


@dataclass(frozen=True, slots=True)
class Reader:
    """Weights that score the scans of a patient."""

    model: str  # digest of a bundle, or of a run's checkpoint
    spec: PreprocessSpec
    heights: HeightMap
    score: Callable[[Inputs], Scores]  # (N, size, size) uint8 -> (N,) float32
    unseen: bool | None  # whether they never saw the patient; None where they do not tell


# A patient's name -> the weights to score it by; called in the processes that score.
Readers = Callable[[str], Reader]


@dataclass(frozen=True, slots=True)
class Folds:
    """Patient -> folder of the run or bundle that scores it; `default` scores all others.

    A run that was trained on the patient is an error: the table would flatter it.
    """

    folders: Mapping[str, Path] = field(default_factory=dict)
    default: Path | None = None  # None: the bundle that comes with the package
    spec: PreprocessSpec = field(default_factory=PreprocessSpec)  # of runs; bundles have their own

    @classmethod
    def from_json(cls, path: Path, spec: PreprocessSpec) -> "Folds":
        """Return the folds of a file `{"patient": "runs/fold-k"}`, paths relative to it."""
        folders = {k: path.parent / v for k, v in json.loads(path.read_text()).items()}
        return cls(folders, spec=spec)

    def __call__(self, patient: str) -> Reader:
        """Return the weights that score a patient.

        Raises
        ------
        WeightsError
            If its fold was trained on it, or the folds do not name it.
        """
        if self.folders and patient not in self.folders:
            raise WeightsError(f"no fold for patient {patient}")
        folder = self.folders.get(patient, self.default)
        if folder is not None and not (folder / weights.MANIFEST).exists():
            reader, held_out = _run(folder, self.spec)
            unseen = patient in held_out
            if self.folders and not unseen:
                raise WeightsError(f"{folder} was trained on patient {patient}")
            return replace(reader, unseen=unseen)
        return _bundle(folder)


@lru_cache(maxsize=8)
def _run(folder: Path, spec: PreprocessSpec) -> tuple[Reader, tuple[str, ...]]:
    net, config, step = train.load(folder)
    if step < config.steps:
        raise ValueError(f"{folder} is not trained to its end: {step} of {config.steps} steps")
    path = folder / "heights.json"
    # The unit that the loss asked for, where the run is not calibrated.
    heights = HeightMap(config.mm_per_score, 0.0, 0.0)
    if path.exists():
        heights = HeightMap(**json.loads(path.read_text()))
    model = hashlib.sha256((folder / "checkpoint.pt").read_bytes()).hexdigest()
    return Reader(model, spec, heights, _scorer(net), None), config.held_out


@lru_cache(maxsize=8)
def _bundle(folder: Path | None) -> Reader:
    bundle = weights.load(folder)
    return Reader(bundle.digest, bundle.spec, bundle.heights, _scorer(bundle.network), None)


def _scorer(net: torch.nn.Module) -> Callable[[Inputs], Scores]:
    def score(inputs: Inputs) -> Scores:
        x = torch.from_numpy(inputs)[:, None]
        with torch.inference_mode():
            parts = [net(part) for part in torch.split(x, BATCH)]
        return np.asarray(torch.cat(parts).float().numpy())

    return score
