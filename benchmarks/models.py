"""Rebuild docs/models.md: which architectures and optimizers are right, and why others are refused.

    python benchmarks/models.py                    # run all (minutes on two cores), write results and page
    python benchmarks/models.py --only "BERT"      # run those whose name contains this, keep the others' results
    python benchmarks/models.py --page             # rebuild the page from benchmarks/results/
    python benchmarks/models.py --check            # write nothing; exit status 1 if the page is out of date

Each architecture is counted as published, without allocating weights, and tested in a small version: less width, small
images, equally many blocks. Each is tested in a process of its own, with four workers, a batch of random inputs as
`example=`, and weights with noise, so that every branch counts. References: benchmarks/reference.py.
  sub-networks  under two plans each worker's network computes what the plain network computes with the other blocks
                bypassed; its gradients are the same
  conservation  after two synchronizations all weights are as before, bit for bit
  training      three rounds of two steps; every loss is finite
  evaluation    the full network computes what the plain network computes with scaled branches
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")  # kernels for AVX2 write past the end of small weights' gradients

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import resist
from architectures import CASES, Case, Inputs, called
from model_page import page
from provenance import provenance
from reference import apart, main_output, preact_formula, with_gains, with_noise
from resist.blocks.chain import Chain
from resist.cost.footprint import build_on_meta
from resist.errors import UserError
from resist.subnet.seeded import build_seeded

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "models.md"
RESULTS, OPTIMIZERS = HERE / "results" / "models.json", HERE / "results" / "optimizers.json"
WORKERS, ROUNDS, LOCAL_STEPS, BATCH, SEED = (2, 4), 3, 2, 4, 1
LIMIT_S = 120  # of processor time, for one network
TOLERANCE = 1e-4  # another order of summation, after up to a hundred layers
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="architectures whose name contains one of these")
    parser.add_argument("--page", action="store_true", help="run nothing, rebuild the page")
    parser.add_argument("--check", action="store_true", help="run nothing, write nothing, compare the page")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each, write nothing")
    args = parser.parse_args()
    if args.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page(kept(), kept(OPTIMIZERS))
        sys.exit(0 if same else f"{PAGE.name} is out of date")
    if not args.page:
        chosen = [c for c in CASES if not args.only or any(text.lower() in c.name.lower() for text in args.only)]
        results: dict[str, Record] = {}
        for result in run(chosen):
            results[result["name"]] = result
            print(json.dumps(result) if args.json else f"{result['name']}: {verdict(result)}", flush=True)
        if args.json:
            return
        before = {result["name"]: result for result in kept()} if args.only else {}
        merged = [(before | results)[case.name] for case in CASES if case.name in before | results]
        RESULTS.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(kept(), kept(OPTIMIZERS)), encoding="utf-8")
    print(f"wrote {PAGE}")


def kept(file: Path = RESULTS) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def verdict(result: Record) -> str:
    return result.get("refused") or result.get("failed") or "passed"


def run(cases: Sequence[Case]) -> Iterator[Record]:
    """Test each in a process of its own, two at a time."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # from the code of other libraries
    missing = {case.library for case in cases if importlib.util.find_spec(case.library) is None}
    for library in sorted(missing):
        print(f"{library} is not installed: its networks are skipped", file=sys.stderr)
    cases = [case for case in cases if case.library not in missing]
    origin = provenance()
    for library in {case.library for case in cases} - {"resist"}:
        # Once, before the processes are forked.
        importlib.import_module("transformers.modeling_utils" if library == "transformers" else library)
        origin[library] = version(library)
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        waiting = [pool.apply_async(outcome, (case.name,)) for case in cases]
        for case, result in zip(cases, waiting, strict=True):
            yield {"name": case.name, **result.get(timeout=10 * LIMIT_S), **origin}


class OutOfTime(BaseException):
    """The processor time of a network is used up. No `Exception`, since those of networks are caught."""


def outcome(name: str) -> Record:
    """Test one network: its results, the reason of a refusal, or what failed."""
    case = next(case for case in CASES if case.name == name)

    def stop(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    start, about = time.process_time(), {"input": case.input_name, "small": case.small_name}
    found: Record
    try:
        found = examine(case)
    except UserError as error:
        found = {"refused": str(error)}
    except OutOfTime:
        found = {"failed": f"no result after {LIMIT_S} s of processor time"}
    except Exception as error:  # networks can raise anything
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
    return {**about, "small_input": case.small_input, **found, "run_s": round(time.process_time() - start, 1)}


def examine(case: Case) -> Record:
    """Count and test one network. Raises UserError if it is refused."""
    batch = case.inputs(BATCH, full=False)
    build = partial(lively, case)
    plain = build_seeded(build, SEED).eval()
    strategy = resist.resist(WORKERS[-1], LOCAL_STEPS, min_depth=0)
    job = resist.Job(build, strategy, chains=case.chains, example=batch, batchnorm="average", seed=SEED)
    chains = job.chains
    forward, backward = partitioned(case, job, plain, batch)
    losses = train(case, job)
    full = job.full_model()
    assert full is not None
    trained = build_seeded(build, SEED).eval()
    trained.load_state_dict(full.state_dict())
    scales = {n: scale_of(c, WORKERS[-1]) for c in chains for b in range(c.num_blocks) for n in c.members(b)}
    with torch.no_grad():
        scaled = apart(main_output(called(full, batch)), expected(case, trained, scales, batch))
    result = {
        **count(case, chains),
        "small_parameters": sum(p.numel() for p in plain.parameters()),
        "forward": forward,
        "backward": backward,
        "scaled": scaled,
        "losses": [round(losses[0], 3), round(losses[-1], 3)],
        "scales": [round(scale, 3) for scale in job.scales],
    }
    wrong = [name for name in ("forward", "backward", "scaled") if not result[name] < TOLERANCE]
    assert not wrong, ", ".join(f"{name} differs by {result[name]:.0e}" for name in wrong)
    assert all(map(math.isfinite, losses)), losses
    return result


def lively(case: Case) -> nn.Module:
    return with_noise(case.small())


def partitioned(case: Case, job: resist.Job, plain: nn.Module, batch: Inputs) -> tuple[float, float]:
    """Test sub-networks and conservation.

    Args:
        case: The network.
        job: The job, before training.
        plain: The plain network.
        batch: The example.

    Returns:
        The largest differences of an output and of a gradient.
    """
    differences = [compare(case, job, worker.index, plain, batch) for worker in job.workers]
    job.synchronize()
    job.synchronize()
    differences += [compare(case, job, worker.index, plain, batch) for worker in job.workers]
    full, original = job.full_model(), plain.state_dict()
    assert full is not None
    found = full.state_dict()
    lost = [name for name in original.keys() | found.keys() if not _equal(found.get(name), original.get(name))]
    assert not lost, f"not conserved: {lost[:3]}"
    forward, backward = map(max, zip(*differences, strict=True))
    return forward, backward


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is not None and right is not None and torch.equal(left, right)


def compare(case: Case, job: resist.Job, worker: int, plain: nn.Module, batch: Inputs) -> tuple[float, float]:
    """Compare a worker's network with the plain one with other blocks bypassed: output and gradients."""
    subnet = job.workers[worker].model.eval()
    missing = [
        name
        for chain, held in zip(job.chains, job.plan.held(worker), strict=True)
        for block in range(chain.num_blocks)
        if block not in held
        for name in chain.members(block)
    ]
    gains = dict.fromkeys(missing, 0.0)
    with torch.no_grad():
        forward = apart(main_output(called(subnet, batch)), expected(case, plain, gains, batch))
    reference = with_gains(plain, gains, outside=case.outside)
    for network in (subnet, reference):
        case.loss(network, batch).backward()
    pairs = zip(
        subnet.parameters(),
        (p for n, p in reference.named_parameters() if not n.startswith(tuple(f"{name}." for name in missing))),
        strict=True,
    )
    gradients = [(own.grad, other.grad) for own, other in pairs]
    subnet.zero_grad()
    largest = max(float(other.abs().max()) for _, other in gradients if other is not None)
    differences = [_difference(own, other) for own, other in gradients]
    return forward, max(differences) / largest


def _difference(own: Tensor | None, other: Tensor | None) -> float:
    if own is None or other is None:
        present = next((gradient for gradient in (own, other) if gradient is not None), None)
        return 0.0 if present is None else float(present.abs().max())
    return float((own - other).abs().max())


def expected(case: Case, plain: nn.Module, gains: Mapping[str, float], batch: Inputs) -> Tensor:
    """Compute the output of a reference: by hooks, or for our own networks by the formula."""
    if case.library == "resist":
        assert isinstance(batch, Tensor)
        return preact_formula(plain, batch, gains)
    return main_output(called(with_gains(plain, gains, outside=case.outside), batch))


def train(case: Case, job: resist.Job) -> list[float]:
    """Train some rounds. Returns the losses of worker 0."""
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.01, momentum=0.9) for worker in job.workers]
    losses: list[float] = []
    start = job.round
    for step in range(ROUNDS * LOCAL_STEPS):
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            torch.manual_seed(job.step_seed(worker.index))
            seed = len(job.workers) * step + worker.index
            loss = case.loss(worker.model.train(), case.inputs(BATCH, full=False, seed=seed))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(worker.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if worker.index == 0:
                losses.append(loss.item())
        job.step(*optimizers)
    assert job.round == start + ROUNDS
    return losses


def scale_of(chain: Chain, workers: int) -> float:
    """Return the mean share of the chain that a worker holds."""
    return -(-chain.num_blocks // workers) / chain.num_blocks


def count(case: Case, chains: Sequence[Chain]) -> Record:
    """Count the published network, without weights: parameters, FLOPs, and what a worker holds by default."""
    template = build_on_meta(case.build)
    flops = count_flops(template, case)
    record: Record = {
        "parameters": sum(p.numel() for p in template.parameters()),
        "flops": flops.get("", 0) if flops else None,
        "chains": [describe(template, chain, flops) for chain in chains],
        "named": bool(case.chains),
    }
    plans = {workers: resist.resist(workers, 1).plan(chains, seed=0, round=0) for workers in WORKERS}
    return {**record, "held": {str(workers): list(plan.capacities(0)) for workers, plan in plans.items()}}


def describe(template: nn.Module, chain: Chain, flops: Mapping[str, int] | None) -> Record:
    blocks = [[template.get_submodule(name) for name in chain.members(block)] for block in range(chain.num_blocks)]
    sizes = {sum(p.numel() for member in members for p in member.parameters()) for members in blocks}
    assert len(sizes) == 1, f"as published, the blocks of {chain.name} differ"
    per_block = [sum(flops[name] for name in chain.members(b)) for b in range(chain.num_blocks)] if flops else []
    return {
        "name": chain.name,
        "blocks": chain.num_blocks,
        "form": chain.form,
        "kind": chain.skip_type,
        "block_parameters": sizes.pop(),
        "block_flops": sum(per_block) / len(per_block) if per_block else None,
        "differ": [f"{attribute.module}.{attribute.name}".lstrip(".") for attribute in chain.varying],
    }


def count_flops(template: nn.Module, case: Case) -> dict[str, int] | None:
    """Count the FLOPs of a forward pass of one input, in all and by module; None if it does not run without data."""
    inputs = case.inputs(2, full=True)
    moved = inputs.to("meta") if isinstance(inputs, Tensor) else {key: t.to("meta") for key, t in inputs.items()}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            called(template.eval(), moved)
    except Exception:  # networks can raise anything
        return None
    counts = {name: sum(kinds.values()) // 2 for name, kinds in counter.get_flop_counts().items()}
    modules = {name: counts.get(f"{type(template).__name__}.{name}", 0) for name, _ in template.named_modules() if name}
    return {"": counts.get("Global", 0), **modules}


if __name__ == "__main__":
    main()
