"""The text of docs/models.md, from the results of benchmarks/models.py."""

from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
KINDS = {"plain": "x + f(x)", "relu": "relu(x + f(x))", "norm": "norm(x + f(x))", "unknown": "tried with real inputs"}

HEAD = """# Networks

Written by `benchmarks/models.py` from `benchmarks/results/models.json`; do not edit.

Any chain of residual blocks can be dealt out, wherever the network comes from:

```
resist train --data cifar10 --model torchvision:resnet101
resist train --data cifar10 --model timm:vit_small_patch16_224      # pip install 'resist[timm]'
resist train --data cifar10 --model transformers:vit                # pip install 'resist[transformers]'
```

Weights are always fresh; nothing is downloaded. Heads get as many classes as the data set has, and networks that are built
for one size of images are built for the data set's. In the library, `Job` takes any function that returns an `nn.Module`.

## What a network has to be like

- A **chain** is a run of neighbors in one `nn.Sequential` or `nn.ModuleList` with the same class and the same shapes of
  weights. Numbers and flags that differ along it (drop-path rates, layer indices, shifted windows) **go with their block**,
  as its weights do. With `torch.compile` each new combination of them is compiled anew.
- Its blocks are **residual**. That is tried: with all weights zero a block has to give its input back. A block that ends in a
  ReLU or a norm gives back an input that has already been through one. A run of equal layers without a skip connection
  (RepVGG, ShuffleNet) is refused: without one of them the others would get what they have never seen.
- A block takes a tensor, its first argument, and returns one of the same shape, alone or first in a tuple.
- The network does not care **where** a block stands. One that gives layer i something of its own (`rope[i]`) would hand it to
  the wrong block. `resist plan` and `resist train` try that on two images; for your own loop,
  `resist.subnet.validate.check_network(model, choose_chains(model), lambda model: model(batch))` does it once.

**Blocks that end in a ReLU** (torchvision's ResNets, ResNeXt, RegNet): the full network uses x + scale * (block(x) - x) for
every kind of block. With x + f(x) that is exactly x + scale * f(x). With relu(x + f(x)) it is relu(x + scale * f(x)) wherever
x + f(x) is not negative; where it is negative, (1 - scale) * x remains, and the other would give less, down to zero. **Blocks
that end in a norm** (BERT): it is the mean of two normalized states, and not normalized itself. Either way the scale cannot be
folded into the weights of a block exactly. `resist plan` and a run's first lines say so.
"""


def page(results: Sequence[Record]) -> str:
    passed = [r for r in results if "refused" not in r]
    refused = [r for r in results if "refused" in r]
    parts = [HEAD, counted(passed), ran(passed), refusals(refused), origins(results)]
    return "\n".join(parts)


def counted(results: Sequence[Record]) -> str:
    """What is partitioned, as published."""
    lines = [
        f"## {len(results)} networks that pass, as published",
        "",
        "Counted without weights. In the chain: the share of all weights that is dealt out. At S = 4: what one of four workers "
        "holds by default (`--min-depth 4`: at least four blocks), parameters and FLOPs of its forward pass as a share of the full "
        "network's; a multiply-add is two FLOPs.",
        "",
    ]
    rows: list[list[str]] = []
    for r in results:
        chains, total = r["chains"], r["parameters"]
        share = sum(c["blocks"] * c["block_parameters"] for c in chains) / total
        row = [
            r["name"], r["input"], f"{total / 1e6:.1f} M", f"{r['full_flops'] / 1e9:.2f}",
            ", ".join(f"`{c['name']}`" for c in chains) + (" (named)" if r["named"] else ""),
            ", ".join(KINDS[c["kind"]] for c in chains), f"{share:.0%}",
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
    lines += ["", "Attributes that differ along a chain, and go with its blocks:", ""]
    lines += [f"- {name}, `{chain}`: {which}" for name, chain, which in differ if which]
    return "\n".join(lines) + "\n"


def ran(results: Sequence[Record]) -> str:
    """What was run, and at what size."""
    lines = [
        "## What each of them went through",
        "",
        "In a smaller version with random inputs, S = 2, two processes on one machine that talk by gloo: (1) a sub-network with "
        "all blocks computes what the network does (bit for bit, or how far apart as a share of the largest number: where a "
        "block's size is no multiple of 16 numbers its weights are aligned otherwise, and sums are rounded in another order), and "
        "one with every other block what the network does without the rest; (2) split, dealt anew twice and folded, every weight "
        "is as before, bit for bit, over the wire with S = 2 and in one process with S = 4 (or as many as there are blocks); "
        "(3) two rounds of two steps, the first and last loss of worker 0 given here; (4) the full network, its branches scaled, "
        "gives finite numbers of the right shape. Four steps show that it runs, not that it learns.",
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
    lines = [f"## {len(results)} networks that are refused, and what they are told", ""]
    return "\n".join([*lines, *table(("network", "reason"), ([r["name"], r["refused"]] for r in results))]) + "\n"


def origins(results: Sequence[Record]) -> str:
    """Where the results come from: one line for each machine, commit and set of versions."""
    keys = ("machine", "cores", "gpu", "torch", "torchvision", "timm", "transformers", "python", "commit", "date")
    seen: dict[tuple[object, ...], int] = {}
    for r in results:
        key = tuple(r.get(k) for k in keys)
        seen[key] = seen.get(key, 0) + 1
    lines = ["## Provenance", ""]
    for key, number in seen.items():
        told = ", ".join(f"{k} {value}" for k, value in zip(keys, key, strict=True) if value is not None)
        lines.append(f"- {number} networks: {told}")
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *body)]
