"""Gives batches of a bank's inputs on the training device, from wherever the bank fits."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Of the memory that is free, what the bank may take: the network's activations need the rest
# (VGG-16 on 256 slices in bf16: 8 GB).
SHARE_OF_FREE = 0.5
AT_A_TIME = 4096  # slices copied to the device at once: 64 MB


class Feed:
    """A bank's slices as a training device reads them.

    On a GPU they lie in its memory where they fit there. Otherwise each batch is read from the
    memory-mapped file, through pinned memory that a GPU copies from while it computes.
    """

    def __init__(
        self,
        slices: npt.NDArray[np.uint8],
        device: torch.device,
        *,
        room_bytes: int | None = None,
    ) -> None:
        """Take (N, H, W) slices; `room_bytes` of device memory, by default what is free."""
        self._slices, self._device = slices, device
        self._resident: Tensor | None = None
        if room_bytes is None:
            room_bytes = 0
            if device.type == "cuda":
                room_bytes = int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE)
        if 0 < slices.nbytes <= room_bytes:
            self._resident = torch.empty(slices.shape, dtype=torch.uint8, device=device)
            for start in range(0, len(slices), AT_A_TIME):
                part = np.array(slices[start : start + AT_A_TIME])  # off the read-only map
                self._resident[start : start + len(part)] = torch.from_numpy(part)

    @property
    def is_resident(self) -> bool:
        """Whether the device's memory holds all slices."""
        return self._resident is not None

    def take(self, index: npt.NDArray[np.int64]) -> Tensor:
        """Return the slices of an index of any shape, (*index.shape, H, W) uint8, on the device."""
        if self._resident is not None:
            return self._resident[torch.from_numpy(index).to(self._device)]
        batch = torch.from_numpy(self._slices[index])
        if self._device.type == "cuda":
            # The allocator of pinned memory reuses it only once the copy is over.
            return batch.pin_memory().to(self._device, non_blocking=True)
        return batch.to(self._device)
