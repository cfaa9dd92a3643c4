"""The file of tensors: its layout, as other programs read it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from resist.runs.tensor_file import write_tensors


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
