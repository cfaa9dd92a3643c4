"""Devices by name."""

import pytest
import torch

from resist.errors import UserError
from resist.training.device import pick_device


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="`device='tpu'` is not one of"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no CUDA device"):
            pick_device("cuda")
