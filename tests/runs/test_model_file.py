"""The file of the full network: it comes back scaled, or is refused."""

import pytest
import torch
from torch import nn

from resist.blocks.chains import choose_chains
from resist.errors import UserError
from resist.models import build
from resist.runs.config import NetworkConfig
from resist.runs.model_file import load_full, save_full
from resist.runs.tensor_file import write_tensors
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


def test_a_file_of_the_format_before_is_read(tmp_path) -> None:
    """It names the first and last child of a chain, and one scale."""
    model, _ = saved(tmp_path)
    images, file = torch.randn(2, 3, 16, 16), tmp_path / "model.safetensors"
    expected = load_full(build("preact_small", num_classes=10, width=4), file).eval()(images)
    chain = {"container": "layer3", "first": 1, "last": 8, "scale": 0.5}
    write_tensors(file, model.state_dict(), "resist full network 3", {"chains": [chain]})
    again = load_full(build("preact_small", num_classes=10, width=4), file).eval()
    assert torch.equal(again(images), expected)
    for metadata, problem in (
        ({"chains": [{**chain, "last": 9}]}, "has no scales; it is damaged"),
        ({"chains": [{"container": "layer3"}]}, "has no scales; it is damaged"),
    ):
        write_tensors(file, model.state_dict(), "resist full network 3", metadata)
        with pytest.raises(UserError, match=problem):
            load_full(again, file)
    write_tensors(file, model.state_dict(), "resist full network 2", {"chains": [chain]})
    with pytest.raises(UserError, match="has the format 'resist full network 2', not 'resist full network 4'; train"):
        load_full(again, file)


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
