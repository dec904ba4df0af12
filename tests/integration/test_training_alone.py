"""Training by itself: without the node's libraries, killed, and in two processes."""

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dicomnode.core import network
from dicomnode.core.network import NetworkConfig
from dicomnode.core.preprocess import PreprocessSpec
from tests.alone import ALONE, call
from training import bank
from training.bank import BankSeries

TINY = NetworkConfig(width=0.25)
CONFIG = """
steps = 6
stacks = 4
m = 4
warmup = 2
lr = 3e-3
ema = 0.9
millimetres = 1.0
bf16 = {bf16}
held_out = ["P2"]
[network]
width = 0.25
[augmentation]
"""

# Dies within the writing of its second checkpoint.
KILLED = """
import os, signal, sys, torch
from training import train

save, saved = torch.save, []

def save_and_die(values, file):
    save(values, file)
    saved.append(1)
    if len(saved) == 2:
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_and_die
train.main(sys.argv[1:])
"""

# The whole of training in double precision.
DOUBLE = """
import sys, torch
torch.set_default_dtype(torch.float64)
from training import train
train.main(sys.argv[1:])
"""

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)

GRADIENTS = """
import torch
from training import losses, parallel

def loss_of(net, x, z_mm):
    score = parallel.gather(net(x[own]).squeeze(-1))
    assert score.shape == (6, 4)
    return losses.order(score) + losses.millimetres(score, z_mm, 1.0) + score.logsumexp((0, 1))

def gradients():
    net.zero_grad()
    loss_of(net, x, z_mm).backward()
    parallel.sum_gradients(net.parameters())
    return [p.grad.clone() for p in net.parameters()]

torch.manual_seed(0)
net = torch.nn.Linear(5, 1).double()
x, z_mm = torch.randn(6, 4, 5).double(), torch.rand(6, 4).double().cumsum(1)
own = slice(None)
alone = gradients()
with parallel.joined("cpu"):
    assert parallel.size() == 2
    own = parallel.share(6)
    assert own == slice(3 * parallel.rank(), 3 * parallel.rank() + 3)
    torch.testing.assert_close(gradients(), alone)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A bank of three patients, as `fill` writes it, and configs."""
    root = tmp_path_factory.mktemp("alone")
    rng = np.random.default_rng(0)
    n = 40
    y, x = np.mgrid[-64:64, -64:64]
    discs = [150 * (np.hypot(x, y) < 15 + k) for k in range(n)] * 3  # wider towards the head
    noise = rng.integers(0, 100, (3 * n, 128, 128))
    np.save(root / "slices.npy", (discs + noise).astype(np.uint8))
    z_mm = tuple(5.0 * np.arange(n))
    series = [BankSeries(f"P{k}", f"1.{k}.0", f"1.{k}", k * n, z_mm) for k in range(3)]
    values = {
        "slices": "slices.npy",
        "spec": PreprocessSpec().to_dict(),
        "series": [asdict(s) for s in series],
    }
    (root / bank.BANK).write_text(json.dumps(values))
    for name, bf16 in (("fp32", "false"), ("bf16", "true")):
        (root / f"{name}.toml").write_text(CONFIG.format(bf16=bf16))
    still = CONFIG.format(bf16="false").replace("[augmentation]", "")
    (root / "still.toml").write_text(still)
    return root


def arguments(folder: Path, run: Path, config: str = "fp32") -> list[object]:
    files = ["--bank", folder, "--config", folder / f"{config}.toml", "--run-folder", run]
    return [*files, "--device", "cpu", "--save-every", "2"]


def log(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("steps_per_s") > 0
    return lines


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state.values()])


def state(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory) -> Path:
    """A run that nothing else was installed for, in one go."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    call("-c", ALONE, "training.train", *arguments(folder, run))
    return run


def test_training_needs_only_numpy_torch_and_click(unbroken):
    lines = log(unbroken)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["loss"].keys() == {"order", "distance", "millimetres"}
        assert line["validation"].keys() == {"mean_r", "mean_slope", "sd_slope"}
        assert -1 <= line["validation"]["mean_r"] <= 1
    assert state(unbroken)["step"] == 6


def test_without_tensorboard_its_option_says_what_to_install(folder, tmp_path):
    command = ["-c", ALONE, "training.train", *arguments(folder, tmp_path), "--tensorboard"]
    assert "dicomnode-ssbr[training]" in call(*command, status=1).stderr


def test_a_run_that_was_killed_goes_on_bit_for_bit(folder, unbroken, tmp_path):
    call("-c", KILLED, *arguments(folder, tmp_path), status=-signal.SIGKILL)
    assert state(tmp_path)["step"] == 2
    call("-m", "training", "train", *arguments(folder, tmp_path))
    a, b = state(tmp_path), state(unbroken)
    for part in ("network", "average"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert log(tmp_path) == log(unbroken)


def test_two_processes_train_as_one_does(folder, unbroken, tmp_path):
    """Sharded by stack, over gloo: the same losses, and weights, up to rounding."""
    call(*TORCHRUN, "-m", "training.train", *arguments(folder, tmp_path))
    one, two = log(unbroken), log(tmp_path)
    assert [line["step"] for line in two] == [2, 4, 6]
    for a, b in zip(one, two, strict=True):
        allowed = 1e-4 * sum(a["loss"].values())
        assert b["loss"] == pytest.approx(a["loss"], rel=0, abs=allowed)
        assert b["lr"] == a["lr"]
    assert abs(one[0]["loss"]["millimetres"] / one[-1]["loss"]["millimetres"] - 1) > 0.01


def test_two_processes_come_to_the_same_weights(folder, tmp_path):
    """In double precision: Adam turns the rounding of a gradient near 0 into a whole step."""
    (tmp_path / "double.py").write_text(DOUBLE)
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, how in zip(runs, ((), TORCHRUN), strict=True):
        call(*how, tmp_path / "double.py", *arguments(folder, run, "still"))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    start = flat(network.build(TINY).state_dict())
    torch.set_default_dtype(torch.float32)
    one, two = (flat(state(run)["network"]) for run in runs)
    assert one.dtype == torch.float64
    moved = (one - start).norm()
    assert 0.1 < moved < 10
    assert (one - two).norm() < 1e-4 * moved


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    """In double precision, and for a loss that looks across stacks."""
    (tmp_path / "program.py").write_text(GRADIENTS)
    done = call(*TORCHRUN, tmp_path / "program.py")  # which asserts, in both processes
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("stacks = 3\n", "3 stacks cannot be shared evenly by 2 processes"),
        ("[network]\nnormalised = true\n", "needs GPUs: normalised"),
    ],
)
def test_what_two_processes_cannot_do_is_refused(folder, tmp_path, config, message):
    (tmp_path / "config.toml").write_text(f"steps = 2\nm = 4\n{config}")
    command = ["-m", "training.train", "--device", "cpu"]
    files = [
        "--bank",
        folder,
        "--config",
        tmp_path / "config.toml",
        "--run-folder",
        tmp_path / "run",
    ]
    done = call(*TORCHRUN, *command, *files, status=1)
    assert message in done.stderr


def test_events_are_written_for_tensorboard(folder, tmp_path):
    pytest.importorskip("tensorboard")
    call("-m", "training", "train", *arguments(folder, tmp_path, "bf16"), "--tensorboard")
    program = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]).Reload()
for tag in events.Tags()["scalars"]:
    print(tag, *(e.step for e in events.Scalars(tag)))
"""
    told = call("-c", program, tmp_path / "tensorboard").stdout.splitlines()
    loss = ["loss/distance", "loss/millimetres", "loss/order"]
    validation = ["validation/mean_r", "validation/mean_slope", "validation/sd_slope"]
    names = [*loss, "lr", "steps_per_s", *validation]
    assert sorted(told) == [f"{name} 2 4 6" for name in names]


def test_a_wrong_config_is_told_in_one_line(folder, tmp_path):
    (tmp_path / "config.toml").write_text("stpes = 2\n")
    files = ["--bank", folder, "--config", tmp_path / "config.toml", "--run", tmp_path / "run"]
    done = call("-m", "training.train", *files, status=1)
    assert done.stderr == f"Error: {tmp_path / 'config.toml'}: unknown key stpes\n"
