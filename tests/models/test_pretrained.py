"""Initial weights of timm: the same logits, a fresh head for other classes, errors of one line."""

import argparse
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
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
    assert start_from(model, f"timm:{file}") == f"initial weights from {file} (state_dict)"
    found = to_timm(model.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def checkpoint() -> dict[str, object]:
    """What timm's training script saves beside the weights."""
    options = argparse.Namespace(model="resnetv2_50", lr=0.1, mean=(0.5, 0.5), opt_kwargs={}, resume="", clip=None)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    return {
        "epoch": 3, "arch": "resnetv2_50", "version": 2, "args": options, "optimizer": optimizer.state_dict(),
        "amp_scaler": torch.amp.GradScaler("cpu").state_dict(), "metric": np.float64(71.5), "top1": np.float32(0.5),
        "saver": {"checkpoint_files": [("checkpoint-3.pth.tar", np.float64(71.5))], "best_epoch": np.int64(3)},
        "buffers": {"queue": torch.zeros(3)},
    }  # fmt: skip


FORMS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, object]], str]] = {
    "training": (lambda w: {**checkpoint(), "state_dict": w}, "state_dict"),
    "without an average": (lambda w: {**checkpoint(), "state_dict": w, "state_dict_ema": None}, "state_dict"),
    "average": (lambda w: {"state_dict": empty(w), **checkpoint(), "state_dict_ema": w}, "state_dict_ema"),
    "model": (lambda w: {"model": w}, "model"),
    "model and average": (lambda w: {"model": empty(w), "model_ema": w, "step": 3}, "model_ema"),
    "other name": (lambda w: {"net": w, "acc": 0.5}, "net"),
    "deeper": (lambda w: {"ckpt": {"model": prefixed(w, "module.")}}, "ckpt.model"),
    "DDP": (lambda w: prefixed(w, "module."), ""),
    "compiled": (lambda w: prefixed(w, "_orig_mod."), ""),
    "DDP of compiled": (lambda w: prefixed(w, "module._orig_mod."), ""),
    "compiled DDP": (lambda w: {"state_dict": prefixed(w, "_orig_mod.module.")}, "state_dict"),
    "compiled parts": (lambda w: {n.replace("stages.", "stages._orig_mod."): t for n, t in w.items()}, ""),
    "Lightning": (lambda w: {**checkpoint(), "state_dict": prefixed(w, "model.")}, "state_dict"),
    "average of torch": (lambda w: {**prefixed(w, "module."), "n_averaged": torch.tensor(7)}, ""),
    "parameters": (lambda w: {n: nn.Parameter(t, t.is_floating_point()) for n, t in w.items()}, ""),
}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, object]:
    return {prefix + name: tensor for name, tensor in state.items()}


def empty(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_training_scripts_are_read(tmp_path: Path, form: str) -> None:
    make, entry = FORMS[form]
    file, model, expected = tmp_path / "last.pth.tar", small(), weights()
    torch.save(make(expected), file)
    assert start_from(model, f"timm:{file}") == f"initial weights from {file}" + (f" ({entry})" if entry else "")
    found = to_timm(model.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_numbers_of_the_earlier_numpy_are_read(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save({"state_dict": weights(), "metric": np.float64(1)}, file)
    content = file.read_bytes()
    with zipfile.ZipFile(file) as read:
        parts = {name: read.read(name) for name in read.namelist()}
    assert b"numpy._core.multiarray" in content
    with zipfile.ZipFile(file, "w") as new:
        for name, part in parts.items():
            new.writestr(name, part.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    start_from(small(), f"timm:{file}")


def test_the_content_decides_the_format(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in weights().items()}
    save_file(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        start_from(small(), f"timm:{tmp_path / name}")


def test_forms_that_are_not_loaded_are_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"w\.pth: a TorchScript archive, which is not loaded; save its state dict with"
    ):
        start_from(small(), f"timm:{tmp_path / 'w.pth'}")


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


class Runs:
    """An object whose pickle runs code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code of a file was run')",)


WRONG: dict[str, tuple[object, str]] = {
    "missing": (None, r"No such file or directory; give timm:FILE"),
    "a list": ([1, 2], r"contains no dict of named tensors"),
    "numbers": ({"a": 1}, r"contains no dict of named tensors"),
    "text": (b"not weights at all", r"not a weight file, or damaged \(.*\); give a complete one"),
    "empty": (b"", r"not a weight file, or damaged"),
    "a class": (
        {"model": Path("x")},
        r"contains pathlib\.(_local\.)?PosixPath, not loaded because such objects can run code; save",
    ),
    "a network": (
        nn.Linear(2, 2),
        r"contains .*torch\.nn\.modules\.linear\.Linear.*, not loaded because such objects can",
    ),
    "code": (
        Runs(),
        r"contains .*exec, not loaded because such objects can run code; save the state dict alone: torch",
    ),
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
