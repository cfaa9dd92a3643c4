"""A second implementation of Algorithm 1: nested loops and state dicts, without the package.

    draw S sub-networks | train each for l local steps on its own batches | average each parameter over the
    sub-networks that held it | draw again | repeat

Slow, memory-hungry (every worker copies the full network) and easy to believe.
"""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = dict[str, Tensor]


def train_resist(
    full: nn.Module,
    rounds: Sequence[Sequence[Sequence[int]]],
    batches: Callable[[int, int], tuple[Tensor, Tensor]],
    *,
    local_steps: int,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Weights:
    """The weights and running statistics of `full` after these rounds. `rounds[t][worker]` lists the blocks (0 is
    `layer3.1`) that a worker has in round t; momentum starts at zero in every round, as in the paper."""
    weights = {name: value.clone() for name, value in full.state_dict().items() if value.is_floating_point()}
    for round, held in enumerate(rounds):
        trained: list[Weights] = []
        for worker, blocks in enumerate(held):
            net = shallow(full, weights, blocks)
            velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
            for step in range(round * local_steps, (round + 1) * local_steps):
                images, labels = batches(worker, step)
                parameters = dict(net.named_parameters())
                gradients = torch.autograd.grad(F.cross_entropy(net(images), labels), list(parameters.values()))
                with torch.no_grad():
                    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                        velocity[name] = momentum * velocity[name] + gradient + weight_decay * parameter
                        parameter -= lr * velocity[name]
            trained.append(as_in_full(net, blocks))
        for name in weights:
            copies = [held[name] for held in trained if name in held]
            weights[name] = sum(copies[1:], copies[0]) / len(copies)
    return weights


def shallow(full: nn.Module, weights: Weights, blocks: Sequence[int]) -> nn.Module:
    """A copy of the full network, with these weights, whose section 3 has its first block and only these others."""
    net = copy.deepcopy(full)
    net.load_state_dict(weights, strict=False)
    section = net.get_submodule("layer3")
    assert isinstance(section, nn.Sequential)
    net.add_module("layer3", nn.Sequential(section[0], *(section[1 + block] for block in blocks)))
    return net.train()


def as_in_full(net: nn.Module, blocks: Sequence[int]) -> Weights:
    """The state of a shallow network under the full network's names."""
    named: Weights = {}
    for name, value in net.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layer3" and parts[1] != "0":
            parts[1] = str(1 + blocks[int(parts[1]) - 1])
        if value.is_floating_point():
            named[".".join(parts)] = value
    return named
