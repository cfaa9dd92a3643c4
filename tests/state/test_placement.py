"""State that is loaded is where torch's own `load_state_dict` would put it; the meta device stands for a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from resist.job import Job
from resist.planning.strategy import resist
from saving import network

UNUSUAL = {"SparseAdam", "LBFGS"}  # of sparse gradients; of one history over all parameters
CLASSES: dict[str, Any] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer and name not in UNUSUAL
}
FUSED = {"Adagrad", "Adam", "AdamW", "SGD"}
CASES = [
    (name, how)
    for name, cls in CLASSES.items()
    for how in ("foreach", "fused", "capturable")
    if (how != "fused" or name in FUSED) and how in cls([torch.zeros(2, 2)]).param_groups[0]
]


def one_block(device: str) -> Job:
    return Job(network, resist(1, 1, min_depth=6), batchnorm="average", device=device, example=False)


@pytest.fixture(scope="module")
def jobs() -> tuple[Job, Job]:
    return one_block("cpu"), one_block("meta")


def optimizer_of(job: Job, name: str, how: str) -> Optimizer:
    parameters = [p for p in job.model.parameters() if p.dim() == 2 or name != "Muon"]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = CLASSES[name](parameters, **options)
    if job.model.training and parameters[0].is_meta:  # whose constructors refuse it
        for group in optimizer.param_groups:
            group[how] = True
    return optimizer


@pytest.mark.parametrize(("name", "how"), CASES)
def test_every_state_is_where_torch_would_put_it(jobs: tuple[Job, Job], name: str, how: str) -> None:
    saving, loading = jobs
    first, second = (optimizer_of(job, name, how) for job in jobs)
    for group in first.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    first.step()
    first.zero_grad()
    saving.attach(first)
    loading.attach(second)
    loading.load_state_dict(saving.state_dict())
    (group,) = second.param_groups
    assert group[how], "settings of the device are not those of the saved job"
    compared = 0
    for saved, parameter in zip(first.param_groups[0]["params"], group["params"], strict=True):
        for key, value in first.state[saved].items():
            found = second.state[parameter][key]
            if isinstance(value, Tensor):
                own = [{**group, "params": [0]}]
                expected = Optimizer._process_value_according_to_param_policy(parameter, value, 0, own, key)
                assert found.device == expected.device, (key, parameter.shape)
                # torch casts other states to the parameter's dtype, also those that the optimizer has made in another.
                assert found.dtype == (expected.dtype if key == "step" else value.dtype), key
                compared += 1
    assert compared or not first.state


def test_averages_and_outer_momentum_stay_on_their_device() -> None:
    saving, loading = one_block("cpu"), one_block("meta")
    for job in (saving, loading):
        job.follow(AveragedModel(job.model))
        job.attach(torch.optim.SGD(job.model.parameters(), lr=0.1))
    loading.load_state_dict(saving.state_dict())
    (worker,) = loading.workers
    assert worker.average is not None
    for model in (worker.average.model, worker.model):
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
