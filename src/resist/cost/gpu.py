"""Memory of a GPU in a run: training, tests, and what a process on a GPU holds beside them.

`CONTEXT_BYTES` and `COMMUNICATOR_BYTES` are estimates, which have not been measured on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import Adafactor, Optimizer

from resist.cost.footprint import Memory
from resist.cost.states import BuildOptimizer
from resist.sync.transport import hosted_workers

# The CUDA context of a process with its kernels, and the workspaces of cuBLAS and cuDNN.
CONTEXT_BYTES = 500_000_000
# The buffers of an NCCL communicator: about 9 MB for each connection in each of up to 32 channels.
COMMUNICATOR_BYTES = 300_000_000

GPU_ASSUMPTIONS = (
    f"Estimates, not measured on a GPU: {CONTEXT_BYTES / 1e9:.1f} GB for the CUDA context of a process with its "
    f"libraries, {COMMUNICATOR_BYTES / 1e9:.1f} GB for the buffers of its one NCCL communicator.",
    "Each process has a GPU of its own, and the data set in its memory if that is not streamed. Of the workers that a "
    "process hosts, weights and optimizer states exist at the same time, but not activations and gradients.",
    "The optimizer computes all parameters together, as torch does by default on GPUs (foreach): its temporary tensors "
    "are part of the training peak.",
    "A test needs the full network twice, and its activations without gradients, beside the weights and optimizer "
    "states of the process of worker 0. Where all processes test, each needs as much.",
    "Activations are those of fp32; with bf16 they are about half as large. Not counted: what the allocator keeps free "
    "between tensors, and the workspaces of single kernels.",
)


@dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """Settings of a run on GPUs that decide its memory beside that of training steps.

    Attributes:
        processes: Number of processes, each with a GPU; None: one for each worker.
        data_bytes: Bytes of the data set, which each process keeps on its GPU; 0 if it is read during training.
        test_batch: Images in the largest batch of a test.
    """

    processes: int | None = None
    data_bytes: int = 0
    test_batch: int = 250


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Memory of the GPU that needs most, in bytes.

    Attributes:
        workers: Number of workers of its process.
        training: Peak of the training steps of these workers.
        test: Peak of a test of the full network, with what these workers keep; 0 where other processes test.
        context: CUDA context and libraries.
        communicator: Buffers of NCCL; 0 for a single process.
        data: The data set.
    """

    workers: int
    training: int
    test: int
    context: int
    communicator: int
    data: int

    @property
    def total(self) -> int:
        """Bytes in all; a test and training never need theirs at the same time."""
        return max(self.training, self.test) + self.context + self.communicator + self.data


def gpu_memory(memories: Sequence[Memory], settings: GpuSettings, *, test: int) -> GpuMemory:
    """Predict the memory of the GPU that needs most.

    Args:
        memories: Memory of each worker's training step.
        settings: Settings of the run.
        test: Bytes of a test of the full network.
    """
    processes = min(settings.processes or len(memories), len(memories))
    found: list[GpuMemory] = []
    for hosted in hosted_workers(len(memories), processes):
        own = [memories[worker] for worker in hosted]
        kept = sum(memory.kept for memory in own)
        found.append(
            GpuMemory(
                workers=len(own),
                training=kept + max(memory.peak - memory.kept for memory in own),
                test=kept + test if 0 in hosted else 0,
                context=CONTEXT_BYTES,
                communicator=COMMUNICATOR_BYTES if processes > 1 else 0,
                data=settings.data_bytes,
            )
        )
    return max(found, key=lambda gpu: gpu.total)


def built_on_gpu(build_optimizer: BuildOptimizer) -> BuildOptimizer:
    """Return a function that makes optimizers as `build_optimizer` does on GPUs; see `as_on_gpu`."""
    return lambda parameters: as_on_gpu(build_optimizer(parameters))


def as_on_gpu(optimizer: Optimizer) -> Optimizer:
    """Make an optimizer compute all parameters together where torch does so by default on GPUs, and only there."""
    for group in optimizer.param_groups if not isinstance(optimizer, Adafactor) else ():  # which saves memory
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer
