"""The file of the full network: it comes back scaled, or is refused."""

import pytest
import torch
from torch import nn

from resist.blocks.chains import choose_chains
from resist.errors import UserError
from resist.models import build
from resist.runs.config import NetworkConfig
from resist.runs.model_file import load_full, save_full
from resist.subnet.scaling import scale_branches
from resist.tasks import network_builder


def saved(tmp_path) -> tuple[nn.Module, object]:
    model = build("preact_small", num_classes=10, width=4).eval()
    chains = choose_chains(model)
    save_full(model, chains, [0.5], tmp_path / "model.safetensors")
    return model, chains


def test_a_saved_network_comes_back_scaled(tmp_path) -> None:
    model, chains = saved(tmp_path)
    with torch.device("meta"):
        again = network_builder(NetworkConfig(model_args=("width=4",)))()
    load_full(again, tmp_path / "model.safetensors").eval()
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(images), again(images))
    scale_branches(model, chains, [0.5])
    assert torch.equal(model(images), again(images))


def test_damaged_and_foreign_weights_are_refused_in_one_line(tmp_path) -> None:
    model, _ = saved(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is damaged") as caught:
            load_full(build("preact_small", num_classes=10, width=4), file)
        assert "\n" not in str(caught.value)
    file.write_bytes(whole)
    with pytest.raises(UserError, match="another network"):
        load_full(build("preact_small", num_classes=11, width=4), file)
    less = build("preact_small", num_classes=10, width=4)
    less.head = nn.Linear(less.head.in_features, 10, bias=False)
    with pytest.raises(UserError, match=r"another network.*'head.bias' differs"):
        load_full(less, file)
    with pytest.raises(UserError, match="the run has not finished"):
        load_full(model, tmp_path / "none")
