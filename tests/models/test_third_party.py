"""Networks of other libraries: fresh weights, the data set's image size, errors of one line."""

import builtins
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resist.blocks.chains import choose_chains
from resist.cli import main
from resist.cost.footprint import build_on_meta
from resist.errors import UserError
from resist.models import build
from resist.models.third_party import TakeLogits, check_logits
from resist.runs.config import NetworkConfig
from resist.tasks import network_builder
from resist.tasks.preflight import try_network

pytestmark = pytest.mark.slow

TINY_VIT = {
    "model_type": "vit", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 5,
    "patch_size": 4, "image_size": 224,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would be downloaded fails."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def vit(tmp_path: Path) -> str:
    """A model of transformers, its sizes in a file."""
    pytest.importorskip("transformers", reason="needs the extra transformers")
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY_VIT))
    return f"transformers:{file}"


@pytest.mark.parametrize(
    ("name", "size", "chain"),
    [
        ("torchvision:resnet50", 32, "layer3:1-5"),
        ("torchvision:vit_b_32", 64, "encoder.layers:0-11"),
        ("torchvision:maxvit_t", 224, None),
        ("torchvision:regnet_y_400mf", 32, "trunk_output.block4:1-5"),
        ("timm:resnet50", 32, "layer3:1-5"),
        ("timm:vit_tiny_patch16_224", 32, "blocks:0-11"),
        ("timm:vit_tiny_patch16_224.augreg_in21k", 32, "blocks:0-11"),
        ("timm:mixer_s32_224", 64, "blocks:0-7"),
        pytest.param("transformers:vit", 32, "vit.layers:0-11", marks=pytest.mark.slow),
        pytest.param("transformers:resnet", 32, "resnet.encoder.stages.2.layers:1-5", marks=pytest.mark.slow),
    ],
)
def test_built_for_the_classes_and_images_of_the_data(name: str, size: int, chain: str | None) -> None:
    library = name.partition(":")[0]
    pytest.importorskip(library, reason=f"needs the extra {library}")
    model = build_on_meta(lambda: build(name, num_classes=7, image_size=size))
    assert model.eval()(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 7)
    if chain is not None:
        assert choose_chains(model)[0].name == chain


def test_names_of_weights_are_those_of_the_library() -> None:
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    with torch.device("meta"):
        ours = build("timm:resnet18", num_classes=5)
        timm_model = timm.create_model("resnet18", num_classes=5)
    assert ours.state_dict().keys() == timm_model.state_dict().keys()


def test_sizes_from_a_file(vit: str) -> None:
    model = build(vit, num_classes=3, image_size=16)
    assert choose_chains(model)[0].num_blocks == 5
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert not any(name.startswith("network") for name in model.state_dict())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other:net", r"'other' is not one of torchvision, timm, transformers"),
        ("torchvision:resnet1001", r"torchvision has no classification network of that name; did you mean resnet101"),
        ("torchvision:fasterrcnn_resnet50_fpn", r"torchvision has no classification network of that name"),
        ("torchvision:", r"torchvision has no classification network of that name; it has alexnet, "),
        ("timm:vit_smal_patch16_224", r"timm has no network of that name; did you mean vit_small_patch16_224"),
        ("timm:hf-hub:timm/resnet50", r"timm has no network of that name"),
        ("timm:hf_hub:timm/resnet50", r"timm has no network of that name"),
        ("transformers:bert", r"transformers has no image classifier of that type; did you mean beit"),
        ("transformers:google/vit-base-patch16-224", r"transformers has no image classifier of that type"),
        ("transformers:missing.json", r"there is no such file; give a model type"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    library = name.partition(":")[0]
    if library in ("timm", "transformers"):
        pytest.importorskip(library, reason=f"needs the extra {library}")
    with pytest.raises(UserError, match=message) as raised:
        build(name, num_classes=10, image_size=32)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("option", [{"depths": (1, 1, 1, 1)}, {"width": 8}, {"final_norm": True}])
def test_options_of_our_networks_say_nothing(option: dict[str, Any]) -> None:
    name = next(iter(option))
    with pytest.raises(UserError, match=rf"{name} has no effect with `model=torchvision:resnet18`, .*; remove it"):
        build("torchvision:resnet18", num_classes=10, **option)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_library_that_is_not_there(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(UserError, match=rf"{library} is not installed; pip install 'torch-resist\[{library}\]'"):
        build(f"{library}:vit", num_classes=10)


def test_the_libraries_are_not_imported_before_they_are_asked_for() -> None:
    import subprocess

    code = "import sys, resist.cli; sys.exit(any(name in sys.modules for name in ('timm', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 9), nn.Flatten()), r"does not accept images of 8 x 8: .*[Kk]ernel size"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 9)), r"returns the shape \(2, 9\) for two images, not"),
        (lambda: _Tuple(), r"returns a tuple, not logits"),
    ],
)
def test_what_gives_no_logits_is_refused(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check_logits(model(), "x:y", 8, 4)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="returns no logits"):
        TakeLogits()(nn.Linear(1, 1), (), {"loss": 1})


class _Tuple(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return images, images


@pytest.mark.parametrize(
    ("model", "chain", "message"),
    [
        ("torchvision:inception_v3", (), r"does not accept images of 32 x 32: .*; choose data with larger images"),
        ("torchvision:shufflenet_v2_x0_5", ("stage3:1-7",), r"chain .stage3:1-7.: its blocks have no skip connection"),
        ("torchvision:googlenet", (), r"has no chain of residual blocks"),
        ("torchvision:mobilenet_v3_small", (), ""),
        ("timm:test_vit", (), ""),
        ("preact_small", (), ""),
    ],
)
def test_networks_are_tried_before_they_are_trained(model: str, chain: tuple[str, ...], message: str) -> None:
    if model.startswith("timm"):
        pytest.importorskip("timm", reason="needs the extra timm")
    config = NetworkConfig(data="cifar10", model=model, chain=chain)
    if not message:
        try_network(config)
        return
    with pytest.raises(UserError, match=message) as raised:
        try_network(config)
    assert "\n" not in str(raised.value)


def test_the_builder_of_a_task_knows_the_size_of_its_images(vit: str) -> None:
    model = network_builder(NetworkConfig(data="digits", model=vit))()
    assert model.config.image_size == 16  # type: ignore[union-attr]
    other = network_builder(NetworkConfig(data="digits", model=vit), 3, 64)()
    assert (other.config.image_size, other.config.num_labels) == (64, 3)  # type: ignore[union-attr]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_the_plan_lists_what_moves_with_a_block_and_approximations(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--data", "cifar10", "--model", "torchvision:resnet18", "--workers", "2") == 0
    assert "note: the blocks of layer1:0-1 end in a ReLU" in capsys.readouterr().out
    assert run("plan", "--data", "cifar10", "--model", "torchvision:swin_t") == 0
    out = capsys.readouterr().out
    assert "moves with each block" in out
    assert "attn.shift_size stochastic_depth.p" in out
    assert run("plan", "--data", "cifar10", "--model", "torchvision:resnet18", "--model-args", "width=3") == 2
    assert "--model-args width=3 has no effect with --model torchvision:resnet18" in capsys.readouterr().err
    assert run("plan", "--data", "voc2007", "--model", "timm:resnet50") == 2
    assert "--data voc2007 needs a pre-activation ResNet" in capsys.readouterr().err


def test_trained_and_tested_again_from_disk(vit: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--epochs", "0.1", "--local-steps", "2", "--batch-size", "8", "--num-evals", "1", "--device", "cpu"]
    options += ["--processes", "1"]
    assert run("train", "--data", "digits", "--model", vit, "--workers", "2", "--out", str(out), *options) == 0
    trained = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["accuracy"]
    assert "chain vit.layers:0-4: 5 blocks" in capfd.readouterr().out
    assert run("evaluate", str(out)) == 0
    assert f"{100 * trained:.2f}" in capfd.readouterr().out
