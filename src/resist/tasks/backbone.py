"""Initial weights of a detector's backbone from a classification run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from resist.errors import UserError
from resist.runs.config import NetworkConfig
from resist.runs.config_file import read_config
from resist.runs.model_file import FILE, read_full

BODY, LAST_NORM = "backbone.body.", "backbone.norms.layer4."
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class BackboneInit:
    """Network of a classification run, as initial weights of a detector's backbone.

    Attributes:
        run: Run directory.
        network: Options of the run's network.
        tensors: Its weights by their names in a detector, without the head.
        scales: Factor of each block's branch in the run's full network, by dotted name.
    """

    run: Path
    network: NetworkConfig
    tensors: dict[str, Tensor]
    scales: dict[str, float]

    @staticmethod
    def read(run: Path) -> "BackboneInit":
        """Read the network of a run directory.

        Raises:
            UserError: `run` is not the directory of a finished classification run.
        """
        network = read_config(run).network
        if network.task != "classification":
            raise UserError(
                f"`init_from={run}`: a run with `data={network.data}`, of detection; give a classification run"
            )
        tensors, scales = read_full(run / FILE)
        named = {_name(name): tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        factors = {name: scale for name, scale in scales.items() if isinstance(scale, float)}
        assert len(factors) == len(scales), "blocks of preact networks are scaled in the plain form"
        return BackboneInit(run, network, named, factors)

    def check(self, model: nn.Module) -> None:
        """Raise UserError if a detector's backbone differs from the run's network."""
        expected = {name: t.shape for name, t in model.state_dict().items() if name.startswith(BODY)}
        shapes = {name: t.shape for name, t in self.tensors.items() if not name.startswith(LAST_NORM)}
        differ = [
            name
            for name in sorted(expected.keys() | shapes.keys())
            # A run with batchnorm="batch" has no statistics.
            if expected.get(name) != shapes.get(name) and not (name not in shapes and name.endswith(STATISTICS))
        ]
        if differ:
            n = self.network
            shape = [text for text in n.model_args if not text.startswith(("final_norm", "zero_init"))]
            options = f"`model={n.model}`" + (f" `model_args={' '.join(shape)}`" if shape else "")
            raise UserError(
                f"`init_from={self.run}`: {differ[0].removeprefix(BODY)} differs; give the options of that run, "
                f"{options}, and no other model options"
            )

    def fill(self, model: nn.Module) -> None:
        """Load the weights into a detector; does nothing on the meta device.

        The scale of each branch is multiplied into its last convolution, so that the features equal those of the run's
        full network.

        Raises:
            UserError: The detector's backbone differs from the run's network.
        """
        if next(model.parameters()).is_meta:
            return
        self.check(model)
        model.load_state_dict(self.tensors, strict=False)
        with torch.no_grad():
            for name, scale in self.scales.items():
                block = model.get_submodule(BODY + name)
                convolution = [module for module in block.modules() if isinstance(module, nn.Conv2d)][-1]
                convolution.weight *= scale
                if convolution.bias is not None:
                    convolution.bias *= scale


def _name(name: str) -> str:
    """Name of a tensor in the detector; the norm before the last pooling becomes that of the last section's output."""
    return LAST_NORM + name.removeprefix("norm.") if name.startswith("norm.") else BODY + name
