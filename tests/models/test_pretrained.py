"""Initial weights of timm: the same logits, a fresh head for other classes, errors of one line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from resist.errors import UserError
from resist.models import build
from resist.models.pretrained import start_from, to_timm
from resist.runs.config import NetworkConfig
from resist.tasks import network_builder, open_task

SMALL = {"depths": (1, 1, 3, 1), "width": 2}
MODEL_ARGS = ("depths=1,1,3,1", "width=2")


def small(num_classes: int = 10) -> nn.Module:
    return build("preact_resnet101_imagenet", num_classes=num_classes, **SMALL)


def weights() -> dict[str, Tensor]:
    """A file's content, nothing in it at its default, under timm's names."""
    return to_timm({n: torch.rand_like(t) if t.is_floating_point() else t for n, t in small().state_dict().items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_logits_are_those_of_timms_network(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm", reason="compares with timm's network")
    timm_model = timm.create_model("resnetv2_101", num_classes=10).eval()
    file = tmp_path / name
    (save_file if file.suffix == ".safetensors" else torch.save)(timm_model.state_dict(), file)
    config = NetworkConfig(model="preact_resnet101_imagenet", init_from=f"timm:{file}")
    ours = network_builder(config)().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), timm_model(images), rtol=1e-4, atol=1e-5)


def test_every_weight_is_taken(tmp_path: Path) -> None:
    file, model = tmp_path / "w.pth", small()
    expected = weights()
    torch.save({"state_dict": expected, "epoch": 3}, file)  # as a training script of timm saves it
    assert start_from(model, f"timm:{file}") == f"initial weights from {file}"
    found = to_timm(model.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_number_of_classes_is_a_fresh_head(tmp_path: Path) -> None:
    file, model = tmp_path / "w.safetensors", small(7)
    save_file({name: tensor.contiguous() for name, tensor in weights().items()}, file)
    head = model.head.weight.clone()
    line = f"initial weights from {file}, except the head (10 classes in the file, 7 in this run)"
    assert start_from(model, f"timm:{file}") == line
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.stem.weight, weights_of(file)["stem.conv.weight"])
    with torch.device("meta"):
        assert start_from(small(7), f"timm:{file}") == line


def weights_of(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_the_task_notes_its_initial_weights(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "w.pth")
    config = NetworkConfig(
        data="digits",
        model="preact_resnet101_imagenet",
        init_from=f"timm:{tmp_path / 'w.pth'}",
        model_args=MODEL_ARGS,
    )
    assert open_task(config).notes == (f"initial weights from {tmp_path / 'w.pth'}",)
    with torch.device("meta"):  # without the weights the file is not needed
        network_builder(NetworkConfig(model=config.model, init_from="timm:gone.pth", model_args=MODEL_ARGS))()


WRONG: dict[str, tuple[object, str]] = {
    "missing": (None, r"No such file or directory; give timm:FILE"),
    "a list": ([1, 2], r"contains no dict of named tensors"),
    "numbers": ({"a": 1}, r"contains no dict of named tensors"),
    "text": (b"not weights at all", r"not a weight file, or damaged \(.*\); give a complete one"),
    "empty": (b"", r"not a weight file, or damaged"),
    "a class": ({"model": Path("x")}, r"not a weight file, or damaged"),
    "too few": (
        {"stem.conv.weight": torch.zeros(2, 3, 7, 7)},
        r"does not fit the network: stages\.0\.b",
    ),
    "too large": (
        {**weights(), "stages.2.blocks.3.conv1.weight": torch.zeros(8, 32, 1, 1)},
        r"does not fit the network: stages\.2\.blocks\.3\.conv1\.weight is not in the network",
    ),
    "another shape": (
        {**weights(), "norm.bias": torch.zeros(3)},
        r"does not fit the network: norm\.bias has the shape \(3,\) in the file and \(64,\) in the network",
    ),
}


@pytest.mark.parametrize("problem", WRONG)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_wrong_file_is_one_line(tmp_path: Path, problem: str, suffix: str) -> None:
    content, message = WRONG[problem]
    file = tmp_path / f"w{suffix}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif suffix == ".pth" and content is not None:
        torch.save(content, file)
    elif isinstance(content, dict) and all(isinstance(tensor, Tensor) for tensor in content.values()):
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, file)
    elif content is not None:
        pytest.skip("such a file holds named tensors only")
    with pytest.raises(UserError, match=rf"^{file}: {message}") as raised:
        start_from(small(), f"timm:{file}")
    assert "\n" not in str(raised.value)


def test_a_cut_file_is_one_line(tmp_path: Path) -> None:
    for name, save in (("w.pth", torch.save), ("w.safetensors", save_file)):
        file = tmp_path / name
        save({key: tensor.contiguous() for key, tensor in weights().items()}, file)
        file.write_bytes(file.read_bytes()[:-500])
        with pytest.raises(UserError, match=rf"^{file}: not a weight file, or damaged"):
            start_from(small(), f"timm:{file}")


@pytest.mark.parametrize("source", ["timm", "timm:", "resnetv2_101", "torchvision:w.pth"])
def test_a_source_that_is_not_known(source: str) -> None:
    with pytest.raises(UserError, match=r"is not of the form timm:FILE"):
        start_from(small(), source)


def test_other_networks_have_no_such_weights() -> None:
    with pytest.raises(UserError, match=r"^`init_from=timm:w\.pth` has no effect with this network; give `model="):
        start_from(build("preact_small", num_classes=10), "timm:w.pth")
