"""What all processes of a run must have in common."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resist.errors import UserError
from resist.models import build
from resist.models.pretrained import to_timm
from resist.planning.generations import difference
from resist.runs.config import NetworkConfig, OptimizationConfig, RunConfig, TrainConfig
from resist.tasks import open_task
from resist.training.common import common_values, network_values
from resist.training.train import open_data


def test_other_initial_weights_and_networks_are_differences(tmp_path: Path) -> None:
    shape, name = ("depths=1,1,3,1", "width=2"), "preact_resnet101_imagenet"
    torch.manual_seed(1)  # the run has seed 0
    weights = to_timm(build(name, num_classes=10, depths=(1, 1, 3, 1), width=2).state_dict())
    torch.save(weights, tmp_path / "w.pth")
    plain = TrainConfig(network=NetworkConfig(model=name, model_args=shape))
    started = replace(plain, network=replace(plain.network, init_from=f"timm:{tmp_path / 'w.pth'}"))
    seeded = replace(plain, run=RunConfig(seed=1))
    own, other, another = (network_values(config, open_task(config.network)) for config in (plain, started, seeded))
    assert network_values(plain, open_task(plain.network)) == own
    for values in (other, another):
        assert difference(own, values).startswith("digest of the initial weights (`init_from`) is ")
    wider = replace(plain, network=replace(plain.network, model_args=("depths=1,1,4,1", "width=2")))
    assert difference(own, network_values(wider, open_task(wider.network))).startswith("digest of the network is ")


def test_an_elastic_run_that_resumes_keeps_its_initial_weights_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "round-000001").mkdir(parents=True)
    shape, name = ("depths=1,1,3,1", "width=2"), "preact_resnet101_imagenet"
    torch.save(to_timm(build(name, num_classes=10, depths=(1, 1, 3, 1), width=2).state_dict()), tmp_path / "w.pth")
    network = NetworkConfig(model=name, model_args=shape, init_from=f"timm:{tmp_path / 'w.pth'}")
    config = TrainConfig(network=network, run=RunConfig(resume=tmp_path))
    elastic = replace(config, machine=replace(config.machine, elastic="1:4"))
    assert (len(open_data(elastic).notes), len(open_data(config).notes)) == (1, 0)
    (tmp_path / "w.pth").unlink()
    assert open_data(elastic).notes == ()


def test_the_libraries_and_the_file_of_a_network_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    task = open_task(NetworkConfig())
    config = TrainConfig(
        NetworkConfig(model="transformers:vit.json"), optimization=OptimizationConfig(optimizer="timm:lamb")
    )
    Path("vit.json").write_text(json.dumps({"model_type": "vit", "hidden_act": "gelu"}))
    own = common_values(config, task)
    assert {"resist", "data set", "transformers", "timm"} <= own.keys()
    Path("vit.json").write_text(json.dumps({"model_type": "vit", "hidden_act": "relu"}))
    other = common_values(config, task)
    assert [name for name, value in own.items() if other[name] != value] == ["digest of vit.json"]
    Path("vit.json").unlink()
    with pytest.raises(UserError, match=r"vit\.json cannot be read: No such file"):
        common_values(config, task)
