"""The training loop, top to bottom; resumes exactly from its checkpoint.

    python -m training.train --bank bank --config training/configs/compact.toml --run runs/1
    torchrun --nproc-per-node 2 -m training.train --bank ... --config ... --run-folder ...

Needs numpy, torch and click alone, so that it runs where nothing else is installed.
"""

import ctypes
import dataclasses
import fnmatch
import json
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch

from dicomnode.core import network
from dicomnode.core.network import NetworkConfig
from dicomnode.errors import ConfigError, NodeError
from training import anchors, losses, parallel, validate
from training import bank as banks
from training.bank import Bank, BankSeries
from training.durable import Journal, replacing
from training.feed import Feed
from training.sampler import Augmentation, Share, StackSampler, augment

T = TypeVar("T")

_PATH = click.Path(path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that decides a run; saved with its checkpoint."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    steps: int = 4000
    stacks: int = 32  # a batch
    m: int = 8  # slices a stack
    max_gap_mm: float = 60.0
    ends: float = 0.0  # probability of a stack that begins or ends with its Series
    lr: float = 1e-3
    weight_decay: float = 1e-2
    warmup: int = 100
    order: float = 1.0
    distance: float = 1.0
    millimetres: float = 0.0
    anchored: float = 0.0
    below: float = 0.0
    mm_per_score: float = 10.0
    ema: float = 0.0  # decay of the averaged weights; 0 keeps the last ones
    bf16: bool = True
    seed: int = 0
    min_slices: int = 8
    augmentation: Augmentation | None = None
    shares: tuple[Share, ...] = (Share("*", 1.0),)
    exclude: tuple[str, ...] = ()  # patterns of patients that are never trained on
    held_out: tuple[str, ...] = ()  # patients kept out of training

    @classmethod
    def from_toml(cls, path: Path) -> "TrainConfig":
        """Return the config of a file.

        Raises
        ------
        ConfigError
            If it has a key that is not known, or is no TOML.
        """
        try:
            return cls.from_dict(tomllib.loads(path.read_text()))
        except (ConfigError, tomllib.TOMLDecodeError) as exc:
            raise ConfigError(f"{path}: {exc}") from exc

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Return the config that `asdict` or a TOML file gave.

        Raises
        ------
        ConfigError
            If it has a key that is not known.
        """
        values = dict(values)
        if "network" in values:
            values["network"] = _known(NetworkConfig, values["network"], "network.")
        if values.get("augmentation") is not None:
            values["augmentation"] = _known(Augmentation, values["augmentation"], "augmentation.")
        if "shares" in values:
            values["shares"] = tuple(_known(Share, s, "shares.") for s in values["shares"])
        for key in ("held_out", "exclude"):
            if key in values:
                values[key] = tuple(values[key])
        return _known(cls, values)


@dataclass(slots=True)
class Progress:
    """What the loop tells its caller every few steps."""

    step: int
    loss: dict[str, float] = field(default_factory=dict)
    lr: float = 0.0
    steps_per_s: float = 0.0  # since it was last told
    validation: dict[str, float] = field(default_factory=dict)  # on held-out patients, if any


def train(
    bank: Bank,
    config: TrainConfig,
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    report: Callable[[Progress], None] = lambda p: None,
    report_every: int = 50,
    save_every: int = 250,
    tensorboard: bool = False,
) -> network.Regressor:
    """Return the trained network, averaged, in `eval()`; writes to `folder`.

    `checkpoint.pt`, from which it goes on where it stopped, with the same draws; `config.json`;
    `log.jsonl`, a line for each report; `tensorboard/`, if asked for. Of several processes
    under torchrun each trains on its share of the stacks, and the first one writes.

    Raises
    ------
    ConfigError
        If the folder holds a run of another config or bank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(device)
    if device.type == "cpu":
        _keep_pages()
    torch.backends.cudnn.benchmark = True  # the fastest convolutions for batches all alike
    torch.manual_seed(config.seed)
    series = trained_on(bank, config)
    sampler = StackSampler(
        series,
        list(config.shares),
        m=config.m,
        max_gap_mm=config.max_gap_mm,
        ends=config.ends,
    )
    mine = parallel.share(config.stacks)
    net = parallel.prepare(network.build(config.network).to(device), device).train()
    average = network.build(config.network).to(device).eval()
    average.load_state_dict(net.state_dict())
    optimiser = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    first = _resume(folder, bank, config, device, net, average, optimiser)
    log = _Log(folder, config, first, tensorboard) if parallel.rank() == 0 else None
    feed = Feed(bank.slices, device)
    height_mm = torch.from_numpy(anchors.targets(bank, series)).to(device)  # (N,)
    highest_mm = torch.from_numpy(anchors.ceilings(bank, series, config.shares)).to(device)

    started, since = time.perf_counter(), first
    for step in range(first, config.steps):
        # Seeded by the step, so that a resumed run draws what an unbroken one would have drawn.
        rng = np.random.default_rng((config.seed, step))
        generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
        index, z = sampler.draw(rng, config.stacks)
        x = net.reduce(feed.take(index))  # (B, m, 64, 64) of compact, 128 of VGG-16
        if config.augmentation is not None:
            # Of the whole batch, so that a stack is varied alike however many processes train.
            x = augment(x, config.augmentation, generator)
        x = x[mine].flatten(0, 1)[:, None].contiguous(memory_format=torch.channels_last)
        lr = config.lr * _schedule(step, config)
        for group in optimiser.param_groups:
            group["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            score = net.regress(x)
        score = parallel.gather(score.float().view(-1, config.m))  # (B, m), of all processes
        terms = {
            "order": config.order * losses.order(score),
            "distance": config.distance * losses.distance(score),
        }
        if config.millimetres:
            z_mm = torch.from_numpy(z).to(device)
            terms["millimetres"] = config.millimetres * losses.millimetres(
                score, z_mm, config.mm_per_score
            )
        at = torch.from_numpy(index).to(device)
        if config.anchored:
            terms["anchored"] = config.anchored * losses.anchored(
                score, height_mm[at], config.mm_per_score
            )
        if config.below:
            terms["below"] = config.below * losses.below(score, highest_mm[at], config.mm_per_score)
        loss = torch.stack(list(terms.values())).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        parallel.sum_gradients(net.parameters())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        _update_average(average, net, min(config.ema, (step + 1) / (step + 10)))

        done = step + 1
        if log is None:
            continue
        saving = done % save_every == 0 or done == config.steps
        if saving or done % report_every == 0:
            values = {k: float(v.detach()) for k, v in terms.items()}  # waits for the device
            rate = (done - since) / (time.perf_counter() - started)
            progress = Progress(done, values, lr, rate)
            if saving:
                progress.validation = validate.figures(
                    average, bank, config.held_out, config.mm_per_score
                )
                _save(
                    folder / "checkpoint.pt",
                    {
                        "config": asdict(config),
                        "bank": bank.listing_digest(),
                        "step": done,
                        "network": net.state_dict(),
                        "average": average.state_dict(),
                        "optimiser": optimiser.state_dict(),
                    },
                )
            log.write(progress)
            report(progress)
            started, since = time.perf_counter(), done
    return average.eval()


def trained_on(bank: Bank, config: TrainConfig) -> list[BankSeries]:
    """Return the Series of a bank that a config trains on."""
    return [
        s
        for s in bank.series
        if s.patient not in config.held_out
        and len(s.z_mm) >= config.min_slices
        and not any(fnmatch.fnmatch(s.patient, pattern) for pattern in config.exclude)
    ]


def load(folder: Path) -> tuple[network.Regressor, TrainConfig, int]:
    """Return (averaged network in `eval()`, config, steps done) of a run's folder."""
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    config = TrainConfig.from_dict(saved["config"])
    net = network.build(config.network)
    net.load_state_dict(saved["average"])
    return net.eval(), config, saved["step"]


@click.command("train", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--bank", required=True, type=_FOLDER, help="Folder of a slice bank.")
@click.option(
    "--run",
    "--run-folder",  # torchrun takes --run for one of its own
    "run",
    required=True,
    type=_PATH,
    help="Folder of the training run.",
)
@click.option("--config", required=True, type=_FILE, help="TOML file of the run.")
@click.option("--held-out", multiple=True, help="A patient to keep out of training.")
@click.option("--steps", type=click.IntRange(1), help="In place of the config's.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, mps.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--tensorboard", is_flag=True, help="Write events to RUN/tensorboard, too.")
@click.option("--save-every", default=250, show_default=True, help="Steps.")
def main(
    bank: Path,
    run: Path,
    config: Path,
    held_out: tuple[str, ...],
    steps: int | None,
    device: str,
    threads: int | None,
    tensorboard: bool,
    save_every: int,
) -> None:
    """Train, or go on where a run stopped.

    \b
    Example: python -m training.train --bank bank --config compact.toml --run runs/1
    On several GPUs: torchrun --nproc-per-node 8 -m training.train ... --run-folder runs/1
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        settings = TrainConfig.from_toml(config)
        settings = replace(settings, held_out=held_out or settings.held_out)
        settings = replace(settings, steps=steps or settings.steps)
        with parallel.joined(device) as own, _told(settings.steps) as report:
            train(
                banks.load(bank),
                settings,
                run,
                device=own,
                report=report,
                save_every=save_every,
                tensorboard=tensorboard,
            )
    except (NodeError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc


class _Log:
    """What was reported, as JSON lines and for TensorBoard; what a resumed run repeats is cut."""

    def __init__(self, folder: Path, config: TrainConfig, first: int, tensorboard: bool) -> None:
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
        self.journal = Journal(folder / "log.jsonl")
        self.journal.replace([line for line in self.journal.read() if line["step"] <= first])
        self.writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as exc:
                raise ConfigError(
                    "--tensorboard needs TensorBoard: pip install 'dicomnode-ssbr[training]'"
                ) from exc
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=first + 1)

    def write(self, progress: Progress) -> None:
        """Add one report."""
        self.journal.append(asdict(progress))
        if self.writer is None:
            return
        scalars = {"lr": progress.lr, "steps_per_s": progress.steps_per_s}
        scalars |= {f"loss/{name}": value for name, value in progress.loss.items()}
        scalars |= {f"validation/{name}": value for name, value in progress.validation.items()}
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, progress.step)
        self.writer.flush()


@contextmanager
def _told(steps: int) -> Iterator[Callable[[Progress], None]]:
    """Give a report to stderr: a bar where a terminal is attached, otherwise lines."""
    if not sys.stderr.isatty():
        yield lambda p: click.echo(line(p), err=True)
        return
    with click.progressbar(length=steps, file=sys.stderr, label="training") as bar:

        def report(progress: Progress) -> None:
            bar.label = line(progress)
            bar.update(progress.step - bar.pos)

        yield report


def line(progress: Progress) -> str:
    """Return a report in words."""
    values = {**progress.loss, **progress.validation}
    words = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
    return f"step {progress.step}  {words}  {progress.steps_per_s:.2f} steps/s"


def _known(kind: type[T], values: dict[str, Any], where: str = "") -> T:
    """An instance of a dataclass; a key it does not have is an error."""
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - names):
        raise ConfigError(f"unknown key {where}{unknown[0]}")
    return kind(**values)


def _resume(
    folder: Path,
    bank: Bank,
    config: TrainConfig,
    device: torch.device,
    net: torch.nn.Module,
    average: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
) -> int:
    """Load what a run left, and return its steps; 0 of a new one."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    saved = torch.load(path, map_location=device, weights_only=True)
    if TrainConfig.from_dict(saved["config"]) != config:
        raise ConfigError(f"{path} was trained by another config; use another folder")
    if saved["bank"] != bank.listing_digest():
        raise ConfigError(f"{path} was trained on another bank; use another folder")
    net.load_state_dict(saved["network"])
    average.load_state_dict(saved["average"])
    optimiser.load_state_dict(saved["optimiser"])
    return int(saved["step"])


def _keep_pages() -> None:
    """Let the C library keep freed memory.

    glibc maps and unmaps each large tensor: 120,000 page faults a second, and 2.1 steps/s of
    the compact network against 2.7 without them (2 cores).
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h


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
    with replacing(path) as file:
        torch.save(values, file)


if __name__ == "__main__":
    main()
