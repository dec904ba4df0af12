"""Data parallel training by stack: one process a device, under torchrun.

Each process draws the same batch and computes the scores of its share of the stacks. The loss is
that of all scores, gathered; its gradient flows into a process's own scores only. Summed over
the processes, the gradients are those of one process up to rounding, whatever the loss: also
where a term looks across stacks, which an average of losses (DistributedDataParallel) changes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from dicomnode.core.network import Regressor
from dicomnode.errors import ConfigError


@contextmanager
def joined(wanted: str) -> Iterator[torch.device]:
    """Give the device of this process; under torchrun, as one of several.

    Parameters
    ----------
    wanted
        "cpu", "cuda", "cuda:N", "mps", or "auto": CUDA where there is one.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield torch.device(wanted)
        return
    device = torch.device(wanted)
    if device.type == "cuda":
        device = torch.device("cuda", distributed.get_node_local_rank())
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def size() -> int:
    """How many processes train."""
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def rank() -> int:
    """Which of them this one is; 0 writes."""
    return distributed.get_rank() if size() > 1 else 0


def share(stacks: int) -> slice:
    """Return which stacks of a batch are this process's.

    Raises
    ------
    ConfigError
        If they cannot be shared evenly.
    """
    if stacks % size():
        raise ConfigError(f"{stacks} stacks cannot be shared evenly by {size()} processes")
    own = stacks // size()
    return slice(rank() * own, (rank() + 1) * own)


def prepare(net: Regressor, device: torch.device) -> Regressor:
    """Return the network with batch statistics over all processes, where it has such.

    Raises
    ------
    ConfigError
        On several CPU processes: torch has them on GPUs only.
    """
    if size() == 1 or not net.config.normalised:
        return net
    if device.type != "cuda":
        raise ConfigError("batch normalisation over several processes needs GPUs: normalised")
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    converted = convert(net)  # its modules; itself it stays
    assert isinstance(converted, Regressor)
    return converted


def gather(own: Tensor) -> Tensor:
    """Return the values of all processes, (B / size, ...) to (B, ...); gradients reach `own`."""
    if size() == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(size())]
    distributed.all_gather(parts, own.detach().contiguous())
    parts[rank()] = own
    return torch.cat(parts)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place."""
    if size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])  # one message in place of one for each
    distributed.all_reduce(flat)
    parts = torch.split(flat, [g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
