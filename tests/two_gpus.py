"""Two GPUs as torch's generators see them, on a machine without."""

from typing import Any

import pytest
import torch


class Gpus:
    """Two GPUs, of which the process uses the second, while the first is the current one.

    Attributes:
        seeds: The seed of each; 0 at first.
        in_use: Whether CUDA is initialized.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, in_use: bool = True) -> None:
        self.seeds, self.in_use = [0, 0], in_use

        class Generator:
            def __init__(self, index: int, seeds: list[int]) -> None:
                self.index, self.seeds = index, seeds

            def manual_seed(self, seed: int) -> None:
                self.seeds[self.index] = seed

        def set_state(state: int, device: Any) -> None:
            self.seeds[torch.device(device).index or 0] = state

        def get_state(device: Any) -> int:
            return self.seeds[torch.device(device).index or 0]

        monkeypatch.setattr(torch.cuda, "default_generators", tuple(Generator(n, self.seeds) for n in range(2)))
        monkeypatch.setattr(torch.cuda, "get_rng_state", get_state)
        monkeypatch.setattr(torch.cuda, "set_rng_state", set_state)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: self.in_use)
