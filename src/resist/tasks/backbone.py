"""A detector's backbone that starts from a classification run of ours."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from resist.errors import UserError
from resist.runs.config import NetworkConfig, TrainConfig
from resist.runs.history import read_config
from resist.runs.model_file import FILE, read_full

BODY, LAST_NORM = "backbone.body.", "backbone.norms.layer4."
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class BackboneInit:
    """The network of a classification run.

    network: its options. tensors: by the names of a detector, without the head.
    scales:  by chain, what the branches of its blocks are multiplied by in the run's full network.
    """

    run: Path
    network: NetworkConfig
    tensors: dict[str, Tensor]
    scales: dict[str, float]

    @staticmethod
    def read(run: Path) -> "BackboneInit":
        """Raises UserError in one line where `run` is no finished classification run."""
        network = read_config(run).network
        if network.task != "classification":
            raise UserError(f"--backbone {run} is a run of --task {network.task}; give a classification run")
        tensors, scales = read_full(run / FILE)
        named = {_name(name): tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        return BackboneInit(run, network, named, scales)

    def check(self, model: nn.Module) -> None:
        """Raises UserError in one line where the detector `model`, on any device, has another backbone."""
        own = {name: t.shape for name, t in model.state_dict().items() if name.startswith(BODY)}
        mine = {name: t.shape for name, t in self.tensors.items() if not name.startswith(LAST_NORM)}
        differ = [
            name
            for name in sorted(own.keys() | mine.keys())
            # A run with --batchnorm batch has no statistics.
            if own.get(name) != mine.get(name) and not (name not in mine and name.endswith(STATISTICS))
        ]
        if differ:
            n = self.network
            part = NetworkConfig(model=n.model, sections=n.sections, width=n.width)
            options = " ".join(("--model", n.model, *_without(TrainConfig(network=part).arguments(), "--model")))
            raise UserError(
                f"--backbone {self.run} holds another network, {differ[0].removeprefix(BODY)} differs; give {options} "
                "as it had, and no others of these"
            )

    def fill(self, model: nn.Module) -> None:
        """Put the weights into a detector, but for one on the meta device. The scale of the run's branches goes into
        the last convolution of each, so that the features are those of the run's full network."""
        if next(model.parameters()).is_meta:
            return
        self.check(model)
        model.load_state_dict(self.tensors, strict=False)
        with torch.no_grad():
            for chain, scale in self.scales.items():
                container, _, span = chain.partition(":")
                first, last = map(int, span.split("-"))
                for block in list(model.get_submodule(BODY + container).children())[first : last + 1]:
                    convolution = [module for module in block.modules() if isinstance(module, nn.Conv2d)][-1]
                    convolution.weight *= scale
                    if convolution.bias is not None:
                        convolution.bias *= scale


def _name(name: str) -> str:
    """A tensor's name in the detector: the norm before the last pooling is that of the last section's output."""
    return LAST_NORM + name.removeprefix("norm.") if name.startswith("norm.") else BODY + name


def _without(words: list[str], flag: str) -> list[str]:
    if flag not in words:
        return words
    at = words.index(flag)
    return words[:at] + words[at + 2 :]
