"""Fill benchmarks/pages/models.md with the results of benchmarks/models.py: docs/models.md."""

from collections import Counter
from collections.abc import Sequence

from page_parts import PAGES, Parts, Record, rows

FORMS = {"plain": "x + f(x)", "relu": "relu(x + f(x))", "norm": "norm(x + f(x))", "unknown": "tested with real inputs"}
ORIGIN = ("machine", "cores", "gpu", "torch", "torchvision", "timm", "transformers", "python", "commit", "date")
fill = Parts(PAGES / "models.md").fill


def page(results: Sequence[Record]) -> str:
    """Return the whole page."""
    passed = [r for r in results if "refused" not in r]
    refused = [r for r in results if "refused" in r]
    values = {
        "num_passed": len(passed),
        "published": rows(map(published, passed)),
        "differ": "\n".join(filter(None, map(differing, passed))),
        "tested": rows(map(tested, passed)),
        "num_refused": len(refused),
        "refused": rows((r["name"], r["refused"]) for r in refused),
        "origins": origins(results),
    }
    return fill("page", **values) + "\n"


def published(r: Record) -> list[str]:
    """Return the row of a published network: chains, parameters and FLOPs."""
    chains, total = r["chains"], r["parameters"]
    share = sum(c["blocks"] * c["block_parameters"] for c in chains) / total
    held = [fill("workers", num_blocks=chains[0]["blocks"]), "", ""]
    if "held" in r:
        held = [
            ", ".join(f"{h} of {c['blocks']}" for h, c in zip(r["held"], chains, strict=True)),
            f"{r['held_parameters'] / 1e6:.1f} M ({r['held_parameters'] / total:.0%})",
            f"{r['held_flops'] / 1e9:.2f} ({r['held_flops'] / r['full_flops']:.0%})",
        ]
    return [
        r["name"], r["input"], f"{total / 1e6:.1f} M", f"{r['full_flops'] / 1e9:.2f}",
        ", ".join(f"`{c['name']}`" for c in chains) + (" (named)" if r["named"] else ""),
        ", ".join(FORMS[c["kind"]] for c in chains), f"{share:.0%}", *held,
    ]  # fmt: skip


def differing(r: Record) -> str:
    """Return a line for each chain of a network whose blocks differ in attributes."""
    attributes = {c["name"]: ", ".join(f"`{name}`" for name in c["differ"]) for c in r["chains"] if c["differ"]}
    return "\n".join(fill("differ", name=r["name"], chain=chain, attributes=a) for chain, a in attributes.items())


def tested(r: Record) -> list[str]:
    """Return the row of the tests of a network, run with a small version."""
    return [
        r["name"], r["small"], r["small_input"], f"{r['run_parameters'] / 1e6:.2f} M",
        ", ".join(f"`{c}`" for c in r["run_chains"]),
        "bit for bit" if r["apart"] == 0 else f"{r['apart']:.0e}", "bit for bit",
        f"{r['losses'][0]:.2f}, {r['losses'][1]:.2f}", " ".join(f"{s:.2f}" for s in r["scales"]),
    ]  # fmt: skip


def origins(results: Sequence[Record]) -> str:
    """Return the provenance: one line for each machine, commit and set of versions."""
    numbers = Counter(", ".join(f"{key} {r[key]}" for key in ORIGIN if r.get(key) is not None) for r in results)
    return "\n".join(fill("origin", number=number, origin=origin) for origin, number in numbers.items())
