"""gloo with tensors of a device: one copy of each to the host in one buffer, and nothing of it on the CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_nccl import recorded
from resist.errors import AgreedError
from resist.sync import staging
from resist.sync.staging import ALIGN_BYTES, stage
from resist.sync.transport import Move


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU count as those of a device that gloo knows nothing of, as mps or xpu."""
    for module in ("staging", "distributed"):
        monkeypatch.setattr(f"resist.sync.{module}.is_summable", lambda _: False)
    monkeypatch.setattr(staging, "is_sendable", lambda _: False)


def test_tensors_of_the_cpu_are_sent_themselves() -> None:
    outgoing, incoming = [torch.ones(3)], [torch.zeros(2)]
    sent, received = stage(outgoing, incoming)
    assert sent[0] is outgoing[0]
    assert received[0] is incoming[0]


@pytest.mark.usefixtures("on_device")
def test_one_buffer_and_a_block_for_two_targets_once() -> None:
    slots = torch.arange(6.0)
    first, again, other = slots[:3], slots[:3], slots[3:]
    half = torch.ones(5, dtype=torch.bfloat16)
    sent, received = stage([first, again, other, half], [torch.zeros(2), torch.zeros(4, dtype=torch.int64)])
    assert sent[0] is sent[1]
    for wire, tensor in zip(sent, (first, again, other, half), strict=True):
        assert torch.equal(wire, tensor)
        assert wire.data_ptr() != tensor.data_ptr()
    assert [(wire.shape, wire.dtype) for wire in received] == [((2,), torch.float32), ((4,), torch.int64)]
    buffers = {wire.untyped_storage().data_ptr() for wire in (*sent, *received)}
    assert len(buffers) == 1
    assert sent[0].untyped_storage().nbytes() == 5 * ALIGN_BYTES
    assert all(wire.storage_offset() * wire.element_size() % ALIGN_BYTES == 0 for wire in (*sent, *received))


def test_tensors_of_cuda_are_copied_side_by_side_and_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    empty = torch.empty

    class OnCuda:
        """A tensor that says it is on a GPU."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.device = tensor, torch.device("cuda", 0)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tensor, name)

    def room(*size: Any, pin_memory: bool, **options: Any) -> Tensor:
        calls.append(("buffer", pin_memory))
        return empty(*size, **options)

    def copy(wire: Tensor, tensor: OnCuda, non_blocking: bool) -> None:
        calls.append(("copy", non_blocking))
        wire[:] = tensor.tensor

    stream = SimpleNamespace(synchronize=lambda: calls.append("wait"))
    monkeypatch.setattr(torch, "empty", room)
    monkeypatch.setattr(Tensor, "copy_", copy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    blocks: list[Any] = [OnCuda(torch.ones(2)), OnCuda(torch.zeros(3))]
    sent, _ = stage(blocks, [])
    assert calls == [("buffer", True), ("copy", True), ("copy", True), "wait"]
    assert [wire.tolist() for wire in sent] == [[1, 1], [0, 0, 0]]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("staged", [False, True])
def test_blocks_and_means_of_any_device_go_through_the_host(monkeypatch: pytest.MonkeyPatch, staged: bool) -> None:
    transport, recorder = recorded(monkeypatch, 0, 2, backend="gloo")
    transport.staged = staged
    used: list[Tensor] = []
    all_reduce, batch = recorder.all_reduce, recorder.batch_isend_irecv

    def watched(tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        used.append(tensor)
        return all_reduce(tensor, group, async_op)

    def batched(operations: list[Any]) -> Any:
        used.extend(operation.tensor for operation in operations)
        operations[-1].tensor.fill_(7)  # arrives
        return batch(operations)

    monkeypatch.setattr(recorder, "all_reduce", watched)
    monkeypatch.setattr(recorder, "batch_isend_irecv", batched)
    shared, sent, arriving = torch.tensor([2.0, 4.0]), torch.ones(2), torch.zeros(2)
    transport.mean([shared], "shared").finish()
    moves = [Move("blocks", 0, 1, 8, outgoing=sent), Move("blocks", 1, 0, 8, incoming=arriving)]
    transport.transfer(moves).finish()
    assert shared.tolist() == [2, 4]
    assert arriving.tolist() == [7, 7]
    own = {tensor.data_ptr() for tensor in (shared, sent, arriving)}
    assert {tensor.data_ptr() in own for tensor in used} == {not staged}
    transport.close()


BYTES = torch.arange(5, dtype=torch.uint8)
HALF = torch.tensor([1.0, 2.0, 5.0], dtype=torch.bfloat16)
# Each with its waits, and with what has arrived if the other process sends sevens.
COLLECTIVES: dict[str, tuple[Any, int, list[list[float]]]] = {
    "scatter": (lambda transport: transport.scatter([BYTES], [2, 3], "shared"), 1, [[0, 1], [7, 7]]),
    "gather": (lambda transport: transport.gather([BYTES[:2]], [2, 2], "shared"), 1, [[0, 1, 7, 7]]),
    "short mean": (lambda transport: transport.mean([HALF], "shared"), 2, []),
}


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("staged", [False, True])
def test_bytes_of_any_device_go_through_the_host_with_one_wait_each(
    monkeypatch: pytest.MonkeyPatch, name: str, staged: bool
) -> None:
    transport, recorder = recorded(monkeypatch, 0, 2, backend="gloo")
    transport.staged = staged
    batches: list[set[int]] = []
    used: set[int] = set()
    batch = recorder.batch_isend_irecv

    def staging_of(sent: Any, received: Any) -> Any:
        staged = stage(sent, received)
        batches.append({tensor.untyped_storage().data_ptr() for tensors in staged for tensor in tensors})
        return staged

    def watched(operations: list[Any]) -> Any:
        used.update(operation.tensor.untyped_storage().data_ptr() for operation in operations)
        for operation in operations:
            if operation.kind == "irecv":
                operation.tensor.fill_(7)
        return batch(operations)

    monkeypatch.setattr("resist.sync.pending_bytes.stage", staging_of)
    monkeypatch.setattr(recorder, "batch_isend_irecv", watched)
    begin, waits, expected = COLLECTIVES[name]
    arrived = begin(transport).finish()
    values = [row for tensor in arrived for row in (tensor.tolist() if tensor.dim() == 2 else [tensor.tolist()])]
    assert values == expected
    assert len(batches) == waits * staged
    assert not staged or used == set.union(*batches)
    transport.close()


def test_a_device_that_ddp_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, _ = recorded(monkeypatch, 0, 2, backend="gloo")
    model = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(AgreedError, match=r"^ddp averages gradients on the CPU and on GPUs of CUDA, not on meta; "):
        transport.average_gradients(model, lambda _: None)
