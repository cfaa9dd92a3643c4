"""Rebuild docs/models.md: which architectures ResIST trains, and why it refuses the others.

    python benchmarks/models.py                    # run all (minutes on two cores), write results and page
    python benchmarks/models.py --only "BERT"      # run those whose name contains this, keep the others' results
    python benchmarks/models.py --page             # rebuild the page from benchmarks/results/models.json
    python benchmarks/models.py --check            # write nothing; exit status 1 if the page is out of date

Each architecture is counted as published, without allocating weights, and tested in a small version: less width, small
images, equally many blocks. The tests use one batch of random inputs, in two processes with gloo:
  validation    `resist.checking.validate`: a sub-network with all blocks computes the same as the network; one with
                every second block computes the same as the network without the others; the blocks are residual
  conservation  after splitting, two new partitions and averaging, all weights are as before, bit for bit
  training      two rounds of two steps; every loss is finite
  evaluation    the full network with scaled branches; its output is finite and has the network's shape
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import resist
from architectures import CASES, Case
from model_page import page
from provenance import provenance
from resist.blocks.chains import Chain, choose_chains
from resist.checking.validate import check_network, tensors_in
from resist.cost.footprint import build_on_meta, measure
from resist.errors import UserError
from resist.subnet.seeded import build_seeded
from resist.subnet.tensors import tensors_of
from resist.sync.local import Local

HERE = Path(__file__).parent
PAGE, RESULTS = HERE.parent / "docs" / "models.md", HERE / "results" / "models.json"
WORKERS, PROCESSES, ROUNDS, LOCAL_STEPS, BATCH = 4, 2, 2, 2, 4
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="architectures whose name contains one of these")
    parser.add_argument("--page", action="store_true", help="run nothing, rebuild the page")
    parser.add_argument("--check", action="store_true", help="run nothing, write nothing, compare the page")
    parser.add_argument("--json", action="store_true", help="print the results, write nothing")
    parser.add_argument("--as-part", help=argparse.SUPPRESS)  # one of the two processes: rank, folder, names
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # from the code of other libraries
    if args.as_part:
        return take_part(**json.loads(args.as_part))
    if args.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page(kept())
        sys.exit(0 if same else f"{PAGE.name} is out of date")
    if not args.page:
        chosen = [c for c in CASES if not args.only or any(text.lower() in c.name.lower() for text in args.only)]
        results = {result["name"]: result for result in run(chosen)}
        if args.json:
            print(json.dumps(list(results.values())))
            return
        before = {result["name"]: result for result in kept()} if RESULTS.exists() else {}
        merged = [(before | results)[case.name] for case in CASES if case.name in before | results]
        RESULTS.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(kept()), encoding="utf-8")
    print(f"wrote {PAGE}")


def kept() -> list[Record]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def run(cases: Iterable[Case]) -> list[Record]:
    """Count each at full size, then test those with a chain, in one pair of processes until one fails."""
    versions = {name: version(name) for name in ("torchvision", "timm", "transformers")}
    origin = {**provenance(), **versions}
    records = {case.name: {**count(case), **origin} for case in cases}
    waiting = [name for name, record in records.items() if "refused" not in record]
    while waiting:
        for name, outcome in pair(list(waiting)):
            waiting.remove(name)
            records[name] |= outcome
            print(f"{name}: {outcome.get('refused') or 'passed'}", file=sys.stderr, flush=True)
    return list(records.values())


def count(case: Case) -> Record:
    """Count chains, parameters and FLOPs as published, without weights; or return the reason of the refusal."""
    record: Record = {"name": case.name, "input": case.input_name}
    record |= {"small": case.small_name, "small_input": case.small_input}
    template = build_on_meta(case.build)
    record["parameters"] = sum(p.numel() for p in template.parameters())
    try:
        chains = choose_chains(template, case.chains)
    except UserError as error:
        return {**record, "refused": str(error)}
    record["chains"] = [describe(template, chain) for chain in chains]
    record["named"] = bool(case.chains)
    counts = tuple(chain.num_blocks for chain in chains)
    record["full_flops"] = footprint(case, template, chains, counts).forward_flops
    held = resist.resist(WORKERS, 1).plan(chains, seed=0, round=0).capacities(0)
    small = footprint(case, template, chains, held)
    return {**record, "held": held, "held_parameters": small.parameters, "held_flops": small.forward_flops}


def describe(template: nn.Module, chain: Chain) -> Record:
    block = sum(p.numel() for name in chain.members(0) for p in template.get_submodule(name).parameters())
    differ = [f"{attribute.module}.{attribute.name}".lstrip(".") for attribute in chain.varying]
    record: Record = {"name": chain.name, "blocks": chain.num_blocks, "block_parameters": block}
    return {**record, "kind": chain.skip_type, "differ": differ}


def footprint(case: Case, template: nn.Module, chains: tuple[Chain, ...], blocks: tuple[int, ...]) -> Any:
    """Measure on the meta device, per input. A number stands for each image: the case makes its own inputs."""

    def loss(model: nn.Module, _images: Tensor) -> Tensor:
        outputs = tensors_in(model(case.inputs(2, full=True).to("meta")))
        return torch.stack([t.float().square().mean() for t in outputs if t.is_floating_point()]).sum()

    return measure(template, chains, blocks, batch_size=2, image_shape=(1,), loss=loss)


def pair(names: list[str]) -> Iterable[tuple[str, Record]]:
    """Test these in two processes until one fails; yield the outcome of each, the failed one last."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(PROCESSES):
            part = json.dumps({"rank": rank, "folder": folder, "names": names})
            command = [sys.executable, __file__, "--as-part", part]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        try:
            outputs = [process.communicate(timeout=120 + 60 * len(names))[0] for process in running]
        finally:
            for process in running:
                process.kill()
    by_name: dict[str, list[Record]] = {}
    for output in outputs:
        for line in output.splitlines():
            if line.startswith("{"):
                outcome = json.loads(line)
                by_name.setdefault(outcome.pop("name"), []).append(outcome)
    for name in names:
        outcomes = by_name.get(name, [])
        refused = next((outcome for outcome in outcomes if "refused" in outcome), None)
        if refused is None and len(outcomes) < PROCESSES:
            raise SystemExit(f"{name}: a process ended without a result; see the error above")
        yield name, refused or outcomes[0]
        if refused is not None and refused.pop("fatal", False):
            return


def take_part(rank: int, folder: str, names: list[str]) -> None:
    """Be one of the two processes: print a line of JSON for each architecture."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        for case in (c for c in CASES if c.name in names):
            start = time.perf_counter()
            outcome: Record
            try:
                outcome = live(case, rank)
            except UserError as error:  # the same in both processes
                outcome = {"refused": str(error)}
            except Exception as error:
                traceback.print_exc()
                outcome = {"refused": f"{type(error).__name__}: {error}", "fatal": True}
            run_s = round(time.perf_counter() - start, 1)
            print(json.dumps({"name": case.name, **outcome, "run_s": run_s}), flush=True)
            if outcome.get("fatal"):
                os._exit(1)
    finally:
        dist.destroy_process_group()


def live(case: Case, rank: int) -> Record:
    """Test validation, conservation, training and evaluation. Raises UserError for a refused network."""
    batch = case.inputs(BATCH, full=False)
    model = build_seeded(case.small, 0)
    chains = choose_chains(model, case.chains)
    apart = check_network(model, chains, lambda network: network(batch))
    conserved(case, chains)
    job = resist.Job(case.small, resist.resist(PROCESSES, LOCAL_STEPS, min_depth=0), chains=case.chains)
    optimizer = torch.optim.SGD(job.model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for step in range(ROUNDS * LOCAL_STEPS):
        job.model.train()
        loss = case.loss(job.model, case.inputs(BATCH, full=False, seed=PROCESSES * step + rank))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        job.step(optimizer)
    assert job.round == ROUNDS
    assert all(map(math.isfinite, losses)), losses
    full = job.full_model([batch])
    outcome: Record = {
        "run_chains": [f"{c.name} ({c.num_blocks})" for c in chains],
        "run_parameters": sum(p.numel() for p in model.parameters()),
        "apart": apart,
    }
    if full is None:
        return outcome
    with torch.no_grad():
        scaled, before = tensors_in(full(batch)), tensors_in(model(batch))
    assert [t.shape for t in scaled] == [t.shape for t in before]
    assert all(t.isfinite().all() for t in scaled)
    assert job.scales == [scale_of(c, PROCESSES) for c in chains]
    return {
        **outcome,
        "losses": [round(losses[0], 3), round(losses[-1], 3)],
        "scales": [round(s, 3) for s in job.scales],
    }


def scale_of(chain: Chain, workers: int) -> float:
    """Return the mean share of the chain that a worker holds."""
    return -(-chain.num_blocks // workers) / chain.num_blocks


def conserved(case: Case, chains: tuple[Chain, ...]) -> None:
    """Test that splitting, two new partitions and averaging conserve all weights.

    Between processes with S = 2, and in this process with S = 4 (or the number of blocks, if it is smaller).
    """
    original = tensors_of(build_seeded(case.small, 0))
    most = min(WORKERS, *(chain.num_blocks for chain in chains))
    for workers, transport in ((PROCESSES, None), (most, Local(most))):
        strategy = resist.resist(workers, 1, min_depth=0)
        job = resist.Job(case.small, strategy, chains=case.chains, batchnorm="average", transport=transport)
        for _ in range(2):
            job.synchronize()
        full = job.full_model()
        if full is not None:
            lost = [n for n, t in tensors_of(full).items() if not torch.equal(t, original[n])]
            assert not lost, f"not conserved: {lost[:3]}"
            assert len(tensors_of(full)) == len(original)


if __name__ == "__main__":
    main()
