"""Optimizers by name: their arguments, defaults and refusals."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from resist.blocks.chains import choose_chains
from resist.data import load
from resist.errors import UserError
from resist.models import build
from resist.runs.config import OptimizationConfig, TrainConfig
from resist.subnet.network import Subnet
from resist.subnet.tensors import tensors_of
from resist.sync.worker import Worker
from resist.tasks import Classification
from resist.training.optimizers import build_optimizer, resolve
from resist.training.trainer import Trainer, make_sampler

ALL = sorted(
    name.lower()
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
)
REFUSED = {"lbfgs", "sparseadam"}


def options(**values: Any) -> OptimizationConfig:
    return OptimizationConfig(**{"lr_schedule": "constant", **values})


def refusal(**values: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(options(**values))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def network() -> nn.Module:
    torch.manual_seed(0)
    return build("preact_small", num_classes=10, depths=(1, 1, 3, 1), width=4)


def trainer_of(o: OptimizationConfig, chain: bool = False) -> tuple[Trainer, Subnet]:
    model = network()
    chains = choose_chains(model, ()) if chain else ()
    subnet = Subnet(model, chains, [c.num_blocks for c in chains])
    subnet.load(tensors_of(model), [range(c.num_blocks) for c in chains])
    task = Classification(network, *load("digits"))
    config = TrainConfig(optimization=o)
    return Trainer(config, Worker(0, subnet), task, make_sampler(config, task.num_images, worker=0)), subnet


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in REFUSED | {"muon"}])
def test_every_class_of_torch_takes_steps_as_by_hand(name: str) -> None:
    o = options(optimizer=name.upper(), lr=0.01, batch_size=8)
    trainer, subnet = trainer_of(o)
    model = network()
    classes = {key.lower(): value for key, value in vars(torch.optim).items()}
    paper = {"momentum": 0.9, "weight_decay": 5e-4} if name == "sgd" else {}
    by_hand = classes[name](model.parameters(), lr=0.01, **paper)
    for step in range(3):
        images, labels = trainer._batches.batch(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        by_hand.step()
        by_hand.zero_grad()
        trainer.step(step, 0.01)
    for (key, value), other in zip(model.named_parameters(), subnet.model.parameters(), strict=True):
        torch.testing.assert_close(other, value, msg=key)


def test_the_default_is_the_papers_sgd() -> None:
    o = resolve(OptimizationConfig())
    assert (o.lr, o.momentum, o.nesterov, o.weight_decay) == (0.03, 0.9, False, 5e-4)
    optimizer = build_optimizer(o, network())
    assert type(optimizer) is torch.optim.SGD
    assert len(optimizer.param_groups) == 1


def test_defaults_of_others_are_their_own_and_stay_when_they_are_resolved_again() -> None:
    adamw = resolve(options(optimizer="AdamW"))
    assert (adamw.lr, adamw.momentum, adamw.nesterov, adamw.weight_decay) == (1e-3, None, None, 1e-2)
    assert resolve(adamw) == adamw
    assert resolve(options(optimizer="rmsprop")).momentum == 0
    given = resolve(options(optimizer="rmsprop", momentum=0.9, weight_decay=0.1, optimizer_args={"alpha": 0.9}))
    group = build_optimizer(given, network()).param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["alpha"], group["lr"]) == (0.9, 0.1, 0.9, 0.01)
    betas = resolve(options(optimizer="adam", optimizer_args={"betas": [0.8, 0.9], "amsgrad": True, "eps": 1e-6}))
    group = build_optimizer(betas, network()).param_groups[0]
    assert (group["betas"], group["amsgrad"], group["eps"]) == ((0.8, 0.9), True, 1e-6)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"optimizer": "adamv"}, "`optimizer=adamv` is no class of torch.optim; did you mean adam, or timm:NAME for"),
        ({"optimizer": "zzz"}, "give one of adadelta, adafactor, adagrad"),
        ({"optimizer": ""}, "is no class of torch.optim"),
        ({"optimizer": "apex:adam"}, "is no class of torch.optim"),
        ({"optimizer": "LBFGS"}, "`optimizer=LBFGS` is not supported: it computes the loss several times in a step"),
        ({"optimizer": "sparseadam"}, "`optimizer=sparseadam` is not supported: it takes sparse gradients only"),
        ({"optimizer": "adam", "momentum": 0.9}, "`momentum` has no effect with `optimizer=adam`; remove it"),
        ({"optimizer": "adam", "nesterov": False}, "`nesterov` has no effect with `optimizer=adam`; remove it"),
        ({"optimizer": "rprop", "weight_decay": 0.1}, "`weight_decay` has no effect with `optimizer=rprop`; remove it"),
        ({"optimizer": "rprop", "lr_schedule": "step"}, "have no effect with `optimizer=rprop`"),
        ({"optimizer_args": {"lr": 1}}, "`optimizer_args` has 'lr', which is an entry of its own; give `lr`"),
        (
            {"optimizer_args": {"betas": [1, 2]}},
            "which sgd does not take; it takes dampening, foreach, fused, maximize",
        ),
        ({"optimizer_args": {"params": []}}, "`optimizer_args` has 'params', which sgd does not take"),
        ({"optimizer": "adam", "optimizer_args": {"betas": [2, 3]}}, "cannot be made: Invalid beta parameter"),
        ({"optimizer": "adam", "optimizer_args": {"betas": "ab"}}, "`optimizer=adam` cannot be made: "),
        ({"optimizer": "adam", "optimizer_args": {"betas": 0.9}}, "`optimizer=adam` cannot be made: "),
        ({"optimizer": "adam", "optimizer_args": {"eps": "x"}}, "`optimizer=adam` cannot be made: "),
        ({"weight_decay": 0.0, "no_decay_norm_and_bias": True}, "has no effect without `weight_decay`"),
        ({"optimizer": "rprop", "no_decay_norm_and_bias": True}, "has no effect without `weight_decay`"),
    ],
)
def test_refusals_name_the_option(values: dict[str, Any], text: str) -> None:
    assert text in refusal(**values)


def test_an_optimizer_that_does_not_take_the_network_is_refused() -> None:
    """Muon takes matrices, and a network of convolutions has other parameters."""
    muon = resolve(options(optimizer="muon"))
    with pytest.raises(UserError, match=r"^`optimizer=muon` cannot be made: Muon only supports 2D parameters"):
        build_optimizer(muon, network())
    assert build_optimizer(muon, nn.Linear(3, 3, bias=False)).param_groups[0]["momentum"] == 0.95


def test_optimizers_of_timm() -> None:
    pytest.importorskip("timm", reason="timm is an optional extra")
    for name in ("lamb", "lion", "adopt", "muon"):
        trainer, subnet = trainer_of(options(optimizer=f"timm:{name}", batch_size=8))
        before = subnet.flat.clone()
        assert math.isfinite(float(trainer.step(0, 0.001)))
        assert not torch.equal(subnet.flat, before)
    assert resolve(options(optimizer="timm:sgd", lr=0.1)).momentum == 0.9  # as timm's factory has it
    assert resolve(options(optimizer="timm:lamb", optimizer_args={"betas": [0.8, 0.9]})).lr == 0.001
    assert "is no optimizer of timm; did you mean timm:lamb?" in refusal(optimizer="timm:lam")
    assert "needs second derivatives of the loss" in refusal(optimizer="timm:adahessian")
    assert "has no learning rate of its own; give `lr`" in refusal(optimizer="timm:adafactor")
    assert "`momentum` has no effect with `optimizer=timm:lamb`" in refusal(optimizer="timm:lamb", momentum=0.9)


def test_without_timm_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm.optim", None)
    assert refusal(optimizer="timm:lamb") == "`optimizer=timm:lamb` needs timm: pip install 'torch-resist[timm]'"


def test_no_weight_decay_of_norms_and_biases() -> None:
    """With a gradient of zero, SGD changes a weight by its decay alone."""
    trainer, subnet = trainer_of(options(no_decay_norm_and_bias=True, momentum=0.0, weight_decay=0.5), chain=True)
    before = {name: parameter.detach().clone() for name, parameter in subnet.model.named_parameters()}
    for parameter in subnet.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    assert {parameter.dim() for parameter in subnet.model.parameters()} == {1, 2, 4}
    for name, parameter in subnet.model.named_parameters():
        decayed = parameter.dim() > 1
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.03 * 0.5 * decayed))


def test_gradients_are_clipped_by_the_norm_of_all() -> None:
    o = options(momentum=0.0, weight_decay=0.0, batch_size=8)
    moved = []
    for norm in (None, 0.01):
        trainer, subnet = trainer_of(replace(o, clip_grad_norm=norm))
        before = [p.detach().clone() for p in subnet.model.parameters()]
        trainer.step(0, 1.0)
        changes = [(p.detach() - b).flatten() for p, b in zip(subnet.model.parameters(), before, strict=True)]
        moved.append(torch.cat(changes))
    assert moved[0].norm() > 0.1
    torch.testing.assert_close(moved[1], moved[0] * 0.01 / moved[0].norm(), rtol=1e-3, atol=1e-7)


def test_the_average_is_that_of_the_formula() -> None:
    trainer, subnet = trainer_of(options(model_ema_decay=0.5, batch_size=8))
    assert trainer.average is not None
    expected = [p.detach().clone() for p in subnet.model.parameters()]
    for step in range(3):
        trainer.step(step, 0.1)
        expected = [0.5 * e + 0.5 * p.detach() for e, p in zip(expected, subnet.model.parameters(), strict=True)]
        for found, value in zip(trainer.average.module.parameters(), expected, strict=True):
            torch.testing.assert_close(found.detach(), value)
    assert trainer_of(options())[0].average is None
