"""The training loop, top to bottom; resumes exactly from its checkpoint."""

import json
import os
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicomnode.core import network
from dicomnode.core.network import NetworkConfig
from training import losses
from training.bank import Bank
from training.sampler import Augmentation, Share, StackSampler, augment


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that decides a run; saved with its checkpoint."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    steps: int = 4000
    stacks: int = 32  # a batch
    m: int = 8  # slices a stack
    max_gap_mm: float = 60.0
    lr: float = 1e-3
    weight_decay: float = 1e-2
    warmup: int = 100
    order: float = 1.0
    distance: float = 1.0
    millimetres: float = 0.0
    mm_per_score: float = 10.0
    ema: float = 0.0  # decay of the averaged weights; 0 keeps the last ones
    bf16: bool = True
    seed: int = 0
    min_slices: int = 8
    augmentation: Augmentation | None = None
    shares: tuple[Share, ...] = (Share("*", 1.0),)
    held_out: tuple[str, ...] = ()  # patients kept out of training

    @classmethod
    def from_toml(cls, path: Path) -> "TrainConfig":
        """Return the config of a file; a key it does not know is an error."""
        return cls.from_dict(tomllib.loads(path.read_text()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Return the config that `asdict` or a TOML file gave."""
        values = dict(values)
        if "network" in values:
            values["network"] = NetworkConfig(**values["network"])
        if values.get("augmentation") is not None:
            values["augmentation"] = Augmentation(**values["augmentation"])
        if "shares" in values:
            values["shares"] = tuple(Share(**s) for s in values["shares"])
        if "held_out" in values:
            values["held_out"] = tuple(values["held_out"])
        return cls(**values)


@dataclass(slots=True)
class Progress:
    """What the loop tells its caller every few steps."""

    step: int
    loss: dict[str, float] = field(default_factory=dict)
    steps_per_s: float = 0.0


def train(
    bank: Bank,
    config: TrainConfig,
    folder: Path,
    *,
    device: str = "cpu",
    report: Callable[[Progress], None] = lambda p: None,
    save_every: int = 250,
) -> network.Regressor:
    """Return the trained network, in `eval()`; checkpoints to `folder/checkpoint.pt`.

    Started again on the same folder it goes on where it stopped, with the same draws.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    series = [
        s
        for s in bank.series
        if s.patient not in config.held_out and len(s.z_mm) >= config.min_slices
    ]
    sampler = StackSampler(series, list(config.shares), m=config.m, max_gap_mm=config.max_gap_mm)
    net = network.build(config.network).to(device).train()
    average = network.build(config.network).to(device).eval()
    average.load_state_dict(net.state_dict())
    optimiser = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    path = folder / "checkpoint.pt"
    first = 0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if TrainConfig.from_dict(saved["config"]) != config:
            raise ValueError(f"{path} was trained by another config; use another folder")
        net.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        first = saved["step"]
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))

    slices = torch.from_numpy(np.array(bank.slices)).to(device)  # all in memory: 16 kB a slice
    started, since = time.perf_counter(), first
    for step in range(first, config.steps):
        # Seeded by the step, so that a resumed run draws what an unbroken one would have drawn.
        rng = np.random.default_rng((config.seed, step))
        generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
        index, z = sampler.draw(rng, config.stacks)
        x = slices[torch.from_numpy(index).to(device)].float()  # (B, m, 128, 128)
        if config.augmentation is not None:
            x = augment(x, config.augmentation, generator)
        x = x.flatten(0, 1)[:, None].contiguous(memory_format=torch.channels_last)
        for group in optimiser.param_groups:
            group["lr"] = config.lr * _schedule(step, config)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.bf16):
            score = net(x)
        score = score.float().view(config.stacks, config.m)
        terms = {
            "order": config.order * losses.order(score),
            "distance": config.distance * losses.distance(score),
        }
        if config.millimetres:
            z_mm = torch.from_numpy(z).to(device)
            terms["millimetres"] = config.millimetres * losses.millimetres(
                score, z_mm, config.mm_per_score
            )
        loss = torch.stack(list(terms.values())).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        _update_average(average, net, min(config.ema, (step + 1) / (step + 10)))
        done = step + 1
        if done % 50 == 0 or done == config.steps:
            rate = (done - since) / (time.perf_counter() - started)
            report(Progress(done, {k: float(v.detach()) for k, v in terms.items()}, rate))
        if done % save_every == 0 or done == config.steps:
            _save(
                path,
                {
                    "config": asdict(config),
                    "step": done,
                    "network": net.state_dict(),
                    "average": average.state_dict(),
                    "optimiser": optimiser.state_dict(),
                },
            )
    return average.eval()


def load(folder: Path) -> tuple[network.Regressor, TrainConfig, int]:
    """Return (averaged network in `eval()`, config, steps done) of a run's folder."""
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    config = TrainConfig.from_dict(saved["config"])
    net = network.build(config.network)
    net.load_state_dict(saved["average"])
    return net.eval(), config, saved["step"]


def _schedule(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine to 1 %."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * done)))


@torch.no_grad()
def _update_average(average: torch.nn.Module, net: torch.nn.Module, decay: float) -> None:
    for a, b in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        if a.is_floating_point():
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)


def _save(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(".part")
    torch.save(values, partial)
    os.replace(partial, path)
