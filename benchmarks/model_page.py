"""The text of docs/models.md, written from the results of benchmarks/models.py."""

from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
FORMS = {"plain": "x + f(x)", "relu": "relu(x + f(x))", "norm": "norm(x + f(x))", "unknown": "tested with real inputs"}

HEAD = """# Networks

Written by `benchmarks/models.py` from `benchmarks/results/models.json`; do not edit.

`resist` can distribute any chain of residual blocks, from any library:

```
resist train --data cifar10 --model torchvision:resnet101
resist train --data cifar10 --model timm:vit_small_patch16_224      # pip install 'torch-resist[timm]'
resist train --data cifar10 --model transformers:vit                # pip install 'torch-resist[transformers]'
```

Weights are freshly initialized; nothing is downloaded. The head has the number of classes of the data set, and networks
for a fixed image size are built for the size of the data set's images. In the library, `Job` takes any function that returns
an `nn.Module`.

## Requirements

- A **chain** is a run of neighbors in one `nn.Sequential` or `nn.ModuleList` with the same class and the same shapes of
  weights. Numbers and flags that differ along the chain (drop-path rates, layer indices, shifted windows) **move with their
  block**, like its weights. `torch.compile` compiles again for each new combination of them.
- Its blocks are **residual**. This is tested: with all weights zero a block must return its input. A block that ends in a
  ReLU or a norm must return an input that has already passed one. A run of equal layers without a skip connection
  (RepVGG, ShuffleNet) is refused: if one of them is left out, the others get inputs that they have never seen.
- A block takes a tensor as its first argument and returns one of the same shape, alone or first in a tuple.
- The network does not depend on the **position** of a block. A network that passes its own value to layer i (`rope[i]`) would
  pass it to the wrong block. `resist plan` and `resist train` test this on two images; for your own loop,
  `from resist.subnet.validate import check_network`, and call
  `check_network(model, choose_chains(model), lambda model: model(batch))` once.

**Blocks that end in a ReLU** (torchvision's ResNets, ResNeXt, RegNet): the full network uses x + scale * (block(x) - x) for
every type of block. For x + f(x) this is exactly x + scale * f(x). For relu(x + f(x)) it is relu(x + scale * f(x)) where
x + f(x) is not negative; where it is negative, it is (1 - scale) * x, which is larger than relu(x + scale * f(x)). **Blocks
that end in a norm** (BERT): it is a weighted mean of two normalized states, and is not normalized itself. In both cases the scale
cannot be folded exactly into the weights of a block. `resist plan` and the first lines of a run say so.
"""


def page(results: Sequence[Record]) -> str:
    passed = [r for r in results if "refused" not in r]
    refused = [r for r in results if "refused" in r]
    parts = [HEAD, counted(passed), ran(passed), refusals(refused), origins(results)]
    return "\n".join(parts)


def counted(results: Sequence[Record]) -> str:
    """Write the table of the published networks: chains, parameters and FLOPs."""
    lines = [
        f"## {len(results)} networks that pass, as published",
        "",
        "Counted without allocating weights. In the chain: the share of all weights that is distributed. At S = 4: the part that one of "
        "four workers holds by default (`--min-depth 4`: at least four blocks), with parameters and FLOPs of its forward pass as a "
        "share of the full network's; a multiply-add is two FLOPs.",
        "",
    ]
    rows: list[list[str]] = []
    for r in results:
        chains, total = r["chains"], r["parameters"]
        share = sum(c["blocks"] * c["block_parameters"] for c in chains) / total
        row = [
            r["name"], r["input"], f"{total / 1e6:.1f} M", f"{r['full_flops'] / 1e9:.2f}",
            ", ".join(f"`{c['name']}`" for c in chains) + (" (named)" if r["named"] else ""),
            ", ".join(FORMS[c["kind"]] for c in chains), f"{share:.0%}",
        ]  # fmt: skip
        if "held" in r:
            held = ", ".join(f"{h} of {c['blocks']}" for h, c in zip(r["held"], chains, strict=True))
            row += [
                held,
                f"{r['held_parameters'] / 1e6:.1f} M ({r['held_parameters'] / total:.0%})",
                f"{r['held_flops'] / 1e9:.2f} ({r['held_flops'] / r['full_flops']:.0%})",
            ]
        else:
            row += [f"at most {chains[0]['blocks']} workers", "", ""]
        rows.append(row)
    columns = ("network", "input", "parameters", "GFLOPs", "chain", "a block is", "in the chain",
               "blocks at S = 4", "parameters at S = 4", "GFLOPs at S = 4")  # fmt: skip
    lines += table(columns, rows)
    differ = [(r["name"], c["name"], ", ".join(f"`{d}`" for d in c["differ"])) for r in results for c in r["chains"]]
    lines += ["", "Attributes that differ along a chain, and move with its blocks:", ""]
    lines += [f"- {name}, `{chain}`: {which}" for name, chain, which in differ if which]
    return "\n".join(lines) + "\n"


def ran(results: Sequence[Record]) -> str:
    """Write the table of the tests, run with small versions of the networks."""
    lines = [
        "## Tests of each network",
        "",
        "Each test uses a smaller version with random inputs, S = 2, two processes on one machine, gloo. (1) A sub-network with "
        "all blocks computes the same as the network (bit for bit, or the difference as a share of the largest number: if the "
        "size of a block is not a multiple of 16 numbers, its weights are aligned differently, and sums are rounded in another order); "
        "a sub-network with every second block computes the same as the network without the other blocks. (2) After splitting, two "
        "new partitions and averaging, every weight has its old value, bit for bit, between processes with S = 2 and in one process "
        "with S = 4 (or the number of blocks, if it is smaller). (3) Two rounds of two steps; the table has the first and last loss of "
        "worker 0. (4) The full network with scaled branches returns finite numbers of the right shape. Four steps show that the "
        "network trains, not that it learns.",
        "",
    ]
    rows = [
        [
            r["name"], r["small"], r["small_input"], f"{r['run_parameters'] / 1e6:.2f} M",
            ", ".join(f"`{c}`" for c in r["run_chains"]),
            "bit for bit" if r["apart"] == 0 else f"{r['apart']:.0e}", "bit for bit",
            f"{r['losses'][0]:.2f}, {r['losses'][1]:.2f}", " ".join(f"{s:.2f}" for s in r["scales"]),
        ]
        for r in results
    ]  # fmt: skip
    columns = (
        "network",
        "smaller version",
        "input",
        "parameters",
        "chain (blocks)",
        "all blocks",
        "conserved",
        "losses",
        "scale",
    )
    return "\n".join([*lines, *table(columns, rows)]) + "\n"


def refusals(results: Sequence[Record]) -> str:
    lines = [f"## {len(results)} networks that are refused, and the reasons", ""]
    return "\n".join([*lines, *table(("network", "reason"), ([r["name"], r["refused"]] for r in results))]) + "\n"


def origins(results: Sequence[Record]) -> str:
    """Write the provenance: one line for each machine, commit and set of versions."""
    keys = ("machine", "cores", "gpu", "torch", "torchvision", "timm", "transformers", "python", "commit", "date")
    seen: dict[tuple[object, ...], int] = {}
    for r in results:
        key = tuple(r.get(k) for k in keys)
        seen[key] = seen.get(key, 0) + 1
    lines = ["## Provenance", ""]
    for key, number in seen.items():
        origin = ", ".join(f"{k} {value}" for k, value in zip(keys, key, strict=True) if value is not None)
        lines.append(f"- {number} networks: {origin}")
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *body)]
