"""Make a plan by hand: the blocks of each worker, the messages between two rounds, the bytes saved. Nothing is trained.

python examples/1_plan_by_hand.py --workers 4 --blocks 22 --capacity 6
"""

import argparse

from resist import RoundPlan, allreduce_bytes, partition, schedule

# The paper's ResNet101 for 100 classes: float32 weights of one block of section 3, and of the shared part.
BLOCK_BYTES = 4 * 1_180_672
SHARED_BYTES = 4 * 15_422_116

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--workers", type=int, default=4)
parser.add_argument("--blocks", type=int, default=22)
parser.add_argument("--capacity", type=int, default=6, help="blocks of each worker")
options = parser.parse_args()

# A plan is a pure function of the seed and the round: every worker computes it, so it is never sent.
capacities = [options.capacity] * options.workers
plans = [partition(options.blocks, capacities, seed=0, round=round) for round in range(3)]
for round, plan in enumerate(plans):
    print(f"round {round + 1}")  # people count from 1
    for worker, held in enumerate(plan.blocks):
        print(f"  worker {worker}  " + "".join("#" if block in held else "." for block in range(options.blocks)))

# From one plan to the next: the holders of a block send it to its owner, which averages it and hands it over.
steps = schedule(RoundPlan((plans[0],)), RoundPlan((plans[1],)), [BLOCK_BYTES])  # of one chain
print(f"\nFrom round 1 to round 2: {len(steps.average)} messages to average, {len(steps.hand_over)} to hand over.")
for message in steps.messages[:6]:
    print(f"  {message.phase:<9}  block {message.block:>2}  worker {message.source} -> {message.target}")

shared = options.workers * allreduce_bytes(SHARED_BYTES, options.workers)
whole = SHARED_BYTES + options.blocks * BLOCK_BYTES
full = options.workers * allreduce_bytes(whole, options.workers)
blocks = steps.num_bytes
print("\nSent by all workers in a synchronization, MB:")
print(f"  ResIST      {(shared + blocks) / 1e6:7.1f}  ({shared / 1e6:.1f} shared part, {blocks / 1e6:.1f} blocks)")
print(f"  local SGD   {full / 1e6:7.1f}  (every worker holds every block)")
held = SHARED_BYTES + options.capacity * BLOCK_BYTES
print(f"A worker holds {held / whole:.0%} of the network's weights.")
