"""A job under `torch.set_default_device` and `torch.set_default_dtype`: the meta device breaks all that follows it."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resist.data import Images, Sampler
from resist.job import Job
from resist.planning.strategy import local_sgd, resist, switch
from resist.planning.wire import Wire
from resist.runs.library import load_checkpoint, save_checkpoint
from resist.sync import codecs
from saving import Counting


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.linear(self.norm(x)))


def residual_line() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(*[Residual() for _ in range(4)]), nn.Linear(4, 5))


@pytest.fixture
def on_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def weights_after(folder: Path) -> dict[str, Tensor]:
    """Check, train, save and load in both ways, train, assemble."""
    generator = torch.Generator().manual_seed(0)
    batch, labels = torch.randn(8, 3, generator=generator, device="cpu"), torch.arange(8, device="cpu") % 5
    parts = resist(2, 1, min_depth=2, optimizer_state="average")
    strategy = switch(local_sgd(2, 1), parts, at_round=1)
    job = Job(residual_line, strategy, chains="1", replicate=True, example=batch)
    optimizers = [Counting(worker.model.parameters(), lr=0.01) for worker in job.workers]
    with torch.device("cpu"):  # torch's own, which counts on the default device
        averages = [AveragedModel(worker.model) for worker in job.workers]
    job.follow(*averages)
    for round in range(3):
        for worker, optimizer, average in zip(job.workers, optimizers, averages, strict=True):
            torch.manual_seed(job.step_seed(worker.index))
            F.cross_entropy(worker.model(batch), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(worker.model)
        job.step(*optimizers)
        if round == 1:
            save_checkpoint(folder, job, extra={"random": torch.Generator()})
            state = job.state_dict()
            load_checkpoint(folder, job)
            job.load_state_dict(state)
    full = job.full_model([batch])
    assert full is not None
    return full.state_dict()


def test_the_default_device_changes_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    expected = weights_after(tmp_path / "before")
    request.getfixturevalue("on_meta")
    found = weights_after(tmp_path / "after")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_default_dtype_of_double_precision(in_double: None, tmp_path: Path) -> None:
    assert {tensor.dtype for tensor in weights_after(tmp_path).values()} == {torch.float64, torch.int64}


def test_images_are_drawn_on_the_host(on_meta: None) -> None:
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "worker": 1, "workers": 2}
    for sampling in ("all", "shard"):
        drawn = Sampler(16, sampling=sampling, **options).indices(1)
        assert drawn.device.type == "cpu"
        with torch.device("cpu"):
            assert torch.equal(drawn, Sampler(16, sampling=sampling, **options).indices(1))
    pixels = torch.arange(16 * 3 * 4 * 4, device="cpu").view(16, 3, 4, 4) % 256
    labels = torch.arange(16, device="cpu") % 10
    data = Images(pixels.byte(), labels, 10, (0.5,) * 3, (0.25,) * 3, pad=1, flip=True)
    images, _ = data.loader(Sampler(16, **options)).batch(0)
    with torch.device("cpu"):
        assert torch.equal(images, data.loader(Sampler(16, **options)).batch(0)[0])


@pytest.mark.parametrize("wire", [Wire("int8", "bf16", "int4", fragments=2), Wire("log4", "int6", "int8")], ids=str)
@pytest.mark.parametrize(("device", "dtype"), [(None, torch.float64), (None, torch.bfloat16), ("meta", torch.float32)])
def test_formats_do_not_depend_on_defaults(wire: Wire, device: str | None, dtype: torch.dtype) -> None:
    """Of a network in single precision."""
    networks: list[dict[str, Tensor]] = []
    for default_device, default in ((None, torch.float32), (device, dtype)):
        codecs._table.cache_clear()  # as in a new process
        with torch.device("cpu"):
            network = residual_line().float()
        torch.set_default_device(default_device)
        torch.set_default_dtype(default)
        try:
            networks.append(trained_in(wire, network))
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())


def trained_in(wire: Wire, network: nn.Module) -> dict[str, Tensor]:
    """Weights after three rounds of gradients that depend on the worker."""
    job = Job(lambda: copy.deepcopy(network).apply(reset), resist(3, 4, min_depth=2), wire=wire, example=False)
    optimizers = [torch.optim.AdamW(worker.model.parameters(), lr=0.01) for worker in job.workers]
    for _ in range(12):
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            for parameter in worker.model.parameters():
                parameter.grad = parameter.detach() * (worker.index + 1)
            with torch.device("cpu"):  # Adam's step counts follow the default in torch 2.11
                optimizer.step()
        job.step(*optimizers)
    full = job.full_model([torch.ones(4, 3, dtype=torch.float32, device="cpu")])
    assert full is not None
    return dict(full.named_parameters())


@torch.no_grad()
def reset(module: nn.Module) -> None:
    for number, parameter in enumerate(module.parameters(recurse=False)):
        parameter.copy_(
            torch.linspace(-1, 1 + number, parameter.numel(), dtype=torch.float32, device="cpu").view_as(parameter)
        )
