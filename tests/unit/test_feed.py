"""Slices come to the device the same from wherever they lie."""

import numpy as np
import pytest
import torch

from training import feed
from training.feed import Feed

N = 10
BYTES = N * 8 * 8


@pytest.fixture
def slices(tmp_path):
    np.save(tmp_path / "slices.npy", np.random.default_rng(0).integers(0, 256, (N, 8, 8), np.uint8))
    return np.load(tmp_path / "slices.npy", mmap_mode="r")


@pytest.mark.parametrize(("room", "resident"), [(None, False), (BYTES - 1, False), (BYTES, True)])
def test_slices_lie_on_the_device_where_they_fit(slices, room, resident, monkeypatch):
    monkeypatch.setattr(feed, "AT_A_TIME", 3)
    fed = Feed(slices, torch.device("cpu"), room_bytes=room)
    assert fed.is_resident == resident
    index = np.array([[9, 0, 3], [3, 2, 1]])
    batch = fed.take(index)
    assert (batch.dtype, batch.shape) == (torch.uint8, (2, 3, 8, 8))
    np.testing.assert_array_equal(batch.numpy(), slices[index])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("room", [None, 0])
def test_a_gpu_takes_the_same_slices_from_its_memory_and_from_ours(slices, room):
    device = torch.device("cuda")
    fed = Feed(slices, device, room_bytes=room)
    assert fed.is_resident == (room is None)
    index = np.array([[9, 0, 3], [3, 2, 1]])
    batches = [fed.take(index) for _ in range(20)]
    for batch in batches:
        assert batch.device.type == "cuda"
        np.testing.assert_array_equal(batch.cpu().numpy(), slices[index])
