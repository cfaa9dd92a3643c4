"""Fill benchmarks/pages/models.md with the results of models.py and optimizers.py: docs/models.md."""

from collections import Counter
from collections.abc import Sequence

from page_parts import PAGES, Parts, Record, rows

FORMS = {
    "plain": "x + f(x)",
    "relu": "relu(x + f(x))",
    "norm": "norm(x + f(x))",
    "outside": "f(x), added outside",
    "unknown": "tested with real inputs",
}
ORIGIN = ("machine", "cores", "gpu", "torch", "torchvision", "timm", "transformers", "python", "commit", "date")
fill = Parts(PAGES / "models.md").fill


def page(results: Sequence[Record], optimizers: Sequence[Record]) -> str:
    """Return the whole page."""
    refused = [r for r in results if "refused" in r]
    failed = [r for r in results if "failed" in r]
    passed = [r for r in results if r not in refused and r not in failed]
    values = {
        "num_passed": len(passed),
        "published": rows(map(published, passed)),
        "differ": "\n".join(filter(None, map(differing, passed))),
        "tested": rows(map(tested, passed)),
        "num_refused": len(refused),
        "refused": rows((r["name"], r["refused"]) for r in refused),
        "failed": fill("failed", num_failed=len(failed), rows=rows((r["name"], r["failed"]) for r in failed))
        if failed
        else "",
        "optimizers": rows((r["name"], digits(r["difference"]), digits(r["trained"])) for r in optimizers),
        "origins": "\n".join((origins("networks", results), origins("optimizers", optimizers))),
    }
    return fill("page", **values) + "\n"


def published(r: Record) -> list[str]:
    """Return the row of a published network: chains, parameters, and what a worker holds."""
    chains, total = r["chains"], r["parameters"]
    share = sum(c["blocks"] * c["block_parameters"] for c in chains) / total
    return [
        r["name"], r["input"], f"{total / 1e6:.1f} M",
        ", ".join(f"`{c['name']}`" for c in chains) + (" (named)" if r["named"] else ""),
        ", ".join(FORMS[c["kind"]] for c in chains), f"{share:.0%}", *holding(r, "2"), *holding(r, "4"),
    ]  # fmt: skip


def holding(r: Record, workers: str) -> list[str]:
    """Return blocks, share of the parameters and share of the FLOPs of a worker."""
    chains, held = r["chains"], r["held"][workers]
    blocks = ", ".join(f"{h} of {c['blocks']}" for h, c in zip(held, chains, strict=True))
    return [blocks, f"{left(r, held, 'block_parameters', 'parameters'):.0%}",
            f"{left(r, held, 'block_flops', 'flops'):.0%}" if r["flops"] else ""]  # fmt: skip


def left(r: Record, held: Sequence[int], of_block: str, of_all: str) -> float:
    """Return the share that remains without the blocks that are not held."""
    pairs = zip(held, r["chains"], strict=True)
    return 1 - sum((c["blocks"] - h) * c[of_block] for h, c in pairs) / r[of_all]


def differing(r: Record) -> str:
    """Return a line for each chain of a network whose blocks differ in attributes."""
    attributes = {c["name"]: ", ".join(f"`{name}`" for name in c["differ"]) for c in r["chains"] if c["differ"]}
    return "\n".join(fill("differ", name=r["name"], chain=chain, attributes=a) for chain, a in attributes.items())


def tested(r: Record) -> list[str]:
    """Return the row of the tests of a network, run with a small version."""
    return [
        r["name"], r["small"], r["small_input"], f"{r['small_parameters'] / 1e6:.2f} M",
        ", ".join(f"`{c['name']}`" + (", in place" if c["form"] == "in_place" else "") for c in r["chains"]),
        digits(r["forward"]), digits(r["backward"]), "bit for bit",
        digits(r["scaled"]), " ".join(f"{s:.2f}" for s in r["scales"]),
        f"{r['losses'][0]:.2f}, {r['losses'][1]:.2f}",
    ]  # fmt: skip


def digits(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.0e}"


def origins(kind: str, results: Sequence[Record]) -> str:
    """Return the provenance: one line for each machine, commit and set of versions."""
    numbers = Counter(", ".join(f"{key} {r[key]}" for key in ORIGIN if r.get(key) is not None) for r in results)
    return "\n".join(fill("origin", kind=kind, number=n, origin=origin) for origin, n in numbers.items())
