"""Several arrays in one copy."""

from __future__ import annotations

import numpy as np
import torch

from lorastack.model.backends.triton.packed import Packed
from tests.helpers.fake_device import LateDevice

CPU = torch.device("cpu")
FIELDS = {
    "small": (torch.int32, (3,)),
    "wide": (torch.int64, (2, 2)),
    "last": (torch.int32, (8,)),
}


def test_one_copy_brings_all_arrays() -> None:
    device = LateDevice()
    packed = Packed(FIELDS, CPU, device)
    packed.host["small"][:] = [1, 2, 3]
    packed.host["wide"][:] = np.array([[1 << 40, -1], [5, 6]])
    packed.host["last"][:] = range(8)
    packed.upload(last=8)
    assert not packed.device["small"].any()
    device.run()
    assert packed.device["small"].tolist() == [1, 2, 3]
    assert packed.device["wide"].tolist() == [[1 << 40, -1], [5, 6]]
    assert packed.device["last"].tolist() == list(range(8))
    assert device.log == ["upload"]
    assert all(each.data_ptr() % 16 == 0 for each in packed.device.values())


def test_only_what_counts_of_the_last_array_is_copied() -> None:
    device = LateDevice()
    packed = Packed(FIELDS, CPU, device)
    packed.host["small"][:] = 7
    packed.host["last"][:] = 7
    packed.upload(last=3)
    device.run()
    assert packed.device["small"].tolist() == [7, 7, 7]
    assert packed.device["last"].tolist() == [7, 7, 7, 0, 0, 0, 0, 0]


def test_a_download_comes_behind_what_was_enqueued() -> None:
    device = LateDevice()
    packed = Packed(FIELDS, CPU, device)
    device.enqueue(lambda: packed.device["wide"].fill_(9))
    packed.download(last=8)
    assert packed.host["wide"].tolist() == [[0, 0], [0, 0]]
    device.wait()
    assert packed.host["wide"].tolist() == [[9, 9], [9, 9]]
