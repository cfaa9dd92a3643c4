"""The file of tensors: its layout, as other programs read it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from resist.runs.tensor_file import AS_BYTES, read_tensors, verify_tensors, write_tensors


def test_every_tensor_begins_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor([True, False, True]), "b": torch.randn(3, dtype=torch.float64),
        "c": torch.randn(5).bfloat16(), "d": torch.randn(3),
    }  # fmt: skip
    file = tmp_path / "tensors.safetensors"
    write_tensors(file, tensors, "resist test 1", {})
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0
    assert all(torch.equal(found, tensors[name]) for name, found in load_file(file).items())


def test_types_that_safetensors_does_not_know_come_back(tmp_path: Path) -> None:
    tensors = {"plain": torch.randn(3)}
    for name, dtype in AS_BYTES.items():
        size = torch.empty(0, dtype=dtype).element_size()
        for shape in ((2, 3), (0, 4), (), (1,)):
            content = torch.arange(size * torch.Size(shape).numel(), dtype=torch.uint8)
            tensors[f"{name} {shape}"] = content.view(dtype).reshape(shape)
    file = tmp_path / "tensors.safetensors"
    write_tensors(file, tensors, "resist test 1", {"a": 1})
    assert verify_tensors(file, "resist test 1").metadata == {"a": 1}
    found = read_tensors(file, "resist test 1")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        if tensor.numel():
            raw = (t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))
            assert torch.equal(*raw)
