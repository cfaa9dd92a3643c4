"""`resist export`: each target computes the same as the scaled full network of the run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from commands import Commands
from exported import noise, own
from resist.blocks.chains import find_chains
from resist.cli import main
from resist.errors import UserError
from resist.export import onnx
from resist.export.recipe import Recipe
from resist.models import build
from resist.runs.model_file import save_full
from resist.subnet.scaling import scale_blocks, scale_branches, scales_of

SMALL = [
    "--workers", "3", "--min-depth", "0", "--model-args", "depths=1,1,5,1", "width=4", "--batch-size", "32",
    "--local-steps", "3", "--epochs", "0.2", "--num-evals", "1", "--device", "cpu", "--processes", "1",
]  # fmt: skip


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def trained(folder: Path, *options: str) -> Path:
    """A run of 4 chain blocks dealt to 3 workers."""
    with pytest.raises(SystemExit) as ended:
        main(["train", *SMALL, *options, "--out", str(folder / "run")])
    assert not ended.value.code
    return folder / "run"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def without_statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("batch"), "--batchnorm", "batch")


def scaled_of(run: Path) -> nn.Module:
    """The full network of the run "plain", put together by hand from what is kept in it."""
    model = own()
    model.load_state_dict(load_file(run / "model.safetensors"))
    return scale_blocks(model, {f"layer3.{number}": 0.5 for number in range(1, 5)})


OTHER = "; --to program needs torch alone):"
NEEDS = {  # what is printed before the lines of code
    ("torch", "fold"): "load it (needs resist for the network's source" + OTHER,
    ("torch", "keep"): "load it (needs resist for the network's source and the scale" + OTHER,
    ("safetensors", "fold"): "load it (needs resist for the network's source, safetensors" + OTHER,
    ("safetensors", "keep"): "load it (needs resist for the network's source and the scale, safetensors" + OTHER,
    ("program", "fold"): "load it (needs torch):",
    ("program", "keep"): "load it (needs torch):",
}
WITH_TORCH_ALONE = """
import sys, torch
for path in sys.argv[1:]:
    torch.export.load(path).module()(torch.zeros(3, 3, 16, 16))
assert not [name for name in sys.modules if name.split('.')[0] in ('resist', 'torchvision', 'timm')]
"""


@pytest.mark.slow
def test_every_target_computes_what_the_run_computes_and_says_what_it_needs(capsys, tmp_path, plain) -> None:
    """A state dict of a network of this package needs this package; a program needs torch alone."""
    scaled, images = scaled_of(plain), noise(3, 3, 16, 16)
    for to, file in (("safetensors", "a.safetensors"), ("torch", "a.pt"), ("program", "a.pt2")):
        for scale in ("fold", "keep"):
            path = tmp_path / f"{scale}-{file}"
            arguments = ["--to", to, "-o", str(path), "--scale", scale, "--device", "cpu"]
            status, text, err = command(capsys, "export", str(plain), *arguments)
            assert (status, err) == (0, "")
            assert str(path) in text
            assert "4 blocks are multiplied by 0.5" in text
            assert next(line for line in text.splitlines() if line.startswith("load it")) == NEEDS[to, scale]
            found = from_printed_code(text)  # with the printed lines of code
            torch.testing.assert_close(found(images), scaled(images), rtol=1e-5, atol=1e-5)
            assert scales_of(found) == (scales_of(scaled) if scale == "keep" and to != "program" else {})
    with safe_open(tmp_path / "fold-a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["scale"], json.loads(metadata["scales"]), metadata["num_classes"]) == ("folded", {}, "10")
    assert json.loads(metadata["input_size"]) == [3, 16, 16]
    assert json.loads(metadata["mean"]) == pytest.approx([0.3052] * 3, abs=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{scale}-a.{suffix}" for scale in ("fold", "keep") for suffix in ("safetensors", "pt", "pt2")
    )
    programs = [str(tmp_path / f"{scale}-a.pt2") for scale in ("fold", "keep")]
    subprocess.run([sys.executable, "-c", WITH_TORCH_ALONE, *programs], check=True)


@pytest.mark.slow
def test_onnx_computes_what_the_run_computes(capsys, tmp_path, plain) -> None:
    """For any number of images, with the scale folded and as part of the graph."""
    pytest.importorskip("onnxscript", reason="onnx is an optional extra")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnx is an optional extra")
    scaled = scaled_of(plain)
    for scale in ("fold", "keep"):
        path = tmp_path / f"{scale}.onnx"
        arguments = ["--to", "onnx", "-o", str(path), "--scale", scale, "--device", "cpu"]
        status, text, err = command(capsys, "export", str(plain), *arguments)
        assert (status, err) == (0, "")
        assert re.search(r"checked: the logits of onnxruntime differ from torch's by \d\.\de-\d\d at most", text)
        names: dict[str, Any] = {}
        exec("\n".join(line.strip() for line in text.splitlines() if line.startswith("  ")), names)
        for num in (1, 2, 5):
            images = noise(num, 3, 16, 16)
            found = torch.from_numpy(names["model"](images.numpy()))
            torch.testing.assert_close(found, scaled(images).detach(), rtol=1e-5, atol=1e-5)
        metadata = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
        assert (metadata["scale"], metadata["num_classes"]) == ("folded" if scale == "fold" else "kept", "10")


def test_onnx_without_its_packages(capsys, tmp_path, monkeypatch, plain) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    path = tmp_path / "x.onnx"
    status, out, err = command(capsys, "export", str(plain), "--to", "onnx", "-o", str(path))
    assert (status, out) == (2, "")
    assert err == "resist: --to onnx needs onnxscript: pip install 'torch-resist[onnx]'\n"
    assert not path.exists()


@pytest.mark.slow
def test_onnx_that_differs_is_not_written_and_one_that_cannot_be_checked_is_called_so(
    capsys, tmp_path, monkeypatch, plain
) -> None:
    pytest.importorskip("onnxscript", reason="onnx is an optional extra")
    pytest.importorskip("onnxruntime", reason="onnx is an optional extra")
    path = tmp_path / "x.onnx"
    arguments = ["export", str(plain), "--to", "onnx", "-o", str(path)]
    model, other, images = own(), own(), noise(3, 3, 16, 16)
    content = onnx._convert(other, images, {})
    monkeypatch.setattr(onnx, "_convert", lambda *_: content)
    with pytest.raises(UserError, match="onnxruntime does not compute the same as this network"):
        onnx.write_onnx(path, build("preact_small", num_classes=10, depths=(1, 1, 5, 1), width=4).eval(), images, {})
    assert not path.exists()
    monkeypatch.setattr(onnx, "_convert", lambda *_: b"no graph")
    with pytest.raises(UserError, match="onnxruntime cannot run this network"):
        onnx.write_onnx(path, model, images, {})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, text, _ = command(capsys, *arguments)
    assert status == 0
    assert "not checked, because onnxruntime is not installed: pip install 'torch-resist[onnx]'" in text


@pytest.mark.slow
def test_the_average_of_a_run_is_exported(capsys, tmp_path) -> None:
    run = tmp_path / "run"
    assert command(capsys, "train", *SMALL, "--model-ema-decay", "0.9", "--out", str(run))[0] == 0
    average = own()
    average.load_state_dict(load_file(run / "model_ema.safetensors"))
    scale_blocks(average, {f"layer3.{number}": 0.5 for number in range(1, 5)})
    status, text, _ = command(capsys, "export", str(run), "--to", "program", "--ema")
    assert status == 0
    images = noise(3, 3, 16, 16)
    found = from_printed_code(text)(images)
    torch.testing.assert_close(found, average(images), rtol=1e-5, atol=1e-5)
    assert (found - scaled_of(run)(images)).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [("timm:test_convnext", {}), ("timm:test_vit", {"img_size": 32}), ("torchvision:resnet18", {})],
)
def test_runs_of_their_networks(capsys, tmp_path, monkeypatch, plain, model: str, options: dict[str, int]) -> None:
    """A run directory as training leaves it: the weights of a network of timm or torchvision, and the scale."""
    library, _, name = model.partition(":")
    pytest.importorskip(library, reason="timm is an optional extra")
    build_theirs = Recipe(library, name, {"num_classes": 10, **options}).build
    monkeypatch.setattr("resist.export.run.network_builder", lambda _config: build_theirs)
    config = json.loads((plain / "config.json").read_text())
    config["network"] = {"model": model, "data": "synthetic"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    scaled = build_theirs().eval()
    chains = find_chains(scaled)[:1]
    scale_branches(scaled, chains, [0.3])
    save_full(scaled, chains, [0.3], tmp_path / "model.safetensors")
    foldable = name == "test_convnext"
    images = noise(3, 3, 32, 32)
    status, _, err = command(capsys, "export", str(tmp_path), "--to", library, "-o", str(tmp_path / "x.pth"))
    assert (status, err.count("\n")) == ((0, 0) if foldable else (2, 1))
    assert ("cannot be folded" in err) is not foldable
    status, text, _ = command(capsys, "export", str(tmp_path), "--to", library, "--scale", "keep")
    assert status == 0
    assert f"exported-{library}.safetensors" in text
    torch.testing.assert_close(from_printed_code(text)(images), scaled(images), rtol=1e-5, atol=1e-5)
    status, text, _ = command(capsys, "export", str(tmp_path), "--to", library, "--scale", "approximate")
    assert status == 2  # it is there already
    (tmp_path / f"exported-{library}.safetensors").unlink()
    status, text, _ = command(capsys, "export", str(tmp_path), "--to", library, "--scale", "approximate")
    assert status == (2 if name == "test_vit" else 0)
    assert ("approximate: test accuracy" in text) is (name == "resnet18")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["preact_resnet101_imagenet", "preact_resnet200_imagenet"])
def test_our_networks_for_photographs_are_timms(capsys, tmp_path, plain, model: str) -> None:
    pytest.importorskip("timm", reason="timm is an optional extra")
    config = json.loads((plain / "config.json").read_text())
    config["network"] = {"model": model, "data": "synthetic", "model_args": ["depths=1,1,3,1", "width=8"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    scaled = build(model, num_classes=10, depths=(1, 1, 3, 1), width=8).eval()
    chains = find_chains(scaled)[:1]
    scale_branches(scaled, chains, [0.3])
    save_full(scaled, chains, [0.3], tmp_path / "model.safetensors")
    images = noise(3, 3, 32, 32)
    for scale in ("fold", "keep"):
        path = str(tmp_path / f"{scale}.safetensors")
        status, text, err = command(capsys, "export", str(tmp_path), "--to", "timm", "--scale", scale, "-o", path)
        assert (status, err) == (0, "")
        assert "timm.create_model('resnetv2_50', num_classes=10, layers=(1, 1, 3, 1)" in text
        found = from_printed_code(text)
        torch.testing.assert_close(found(images), scaled(images), rtol=1e-5, atol=1e-5)
        assert scales_of(found) == ({"stages.2.blocks.1": 0.3, "stages.2.blocks.2": 0.3} if scale == "keep" else {})


def from_printed_code(text: str) -> nn.Module:
    """What the printed lines of code make."""
    names: dict[str, object] = {}
    exec("\n".join(line.strip() for line in text.splitlines() if line.startswith("  ")), names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.slow
def test_statistics_are_estimated_for_a_run_without_them(capsys, tmp_path, without_statistics) -> None:
    status, _, err = command(capsys, "export", str(without_statistics), "--to", "torch", "-o", str(tmp_path / "x.pt"))
    assert (status, err.count("\n")) == (2, 1)
    assert "--calibrate" in err
    arguments = ["--to", "torch", "-o", str(tmp_path / "x.pt"), "--calibrate", "--device", "cpu"]
    status, text, _ = command(capsys, "export", str(without_statistics), *arguments)
    assert status == 0
    model = from_printed_code(text)
    own().load_state_dict(model.state_dict())
    assert model.get_buffer("norm.running_mean").abs().max() > 0
    trained_weights = load_file(without_statistics / "model.safetensors")
    assert torch.equal(trained_weights["layer3.0.conv2.weight"], model.get_parameter("layer3.0.conv2.weight"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--to", "timm"], "of --model timm:NAME or preact_resnet..._imagenet, not of preact_small"),
        (["--to", "torchvision"], "give --to safetensors, torch, program or onnx"),
        ([], "--to is missing; give one of program, onnx, safetensors, torch, torchvision, timm; see resist export"),
        (["--to", "onnx", "-o", "x.pt2"], "has the suffix .pt2; give it one of .onnx"),
        (["--to", "program", "--ema"], "has no average of its weights, because it has no --model-ema-decay; remove"),
        (["--to", "torch", "-o", "x.safetensors"], "has the suffix .safetensors; give it one of .pt, .pth"),
        (["--to", "torch", "-o", "x"], "has no suffix; give it one of"),
        (["--to", "torch", "-o", "none/x.pt"], "none is not a writable directory"),
        (["--to", "torch", "--device", "tpu"], "--device 'tpu' is not one of"),
        (["--to", "safetensors", "-o", "there.safetensors"], "exists already and is never overwritten"),
        (["--to", "safetensors", "-o", "dangling.safetensors"], "exists already and is never overwritten"),
    ],
)
def test_what_cannot_be_exported_is_an_error_of_one_line(
    capsys, tmp_path, monkeypatch, plain, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.safetensors").write_text("precious")
    Path("dangling.safetensors").symlink_to("nowhere")
    before = sorted(os.listdir())
    status, out, err = command(capsys, "export", str(plain), *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert text in err
    assert Path("there.safetensors").read_text() == "precious"
    assert sorted(os.listdir()) == before


def test_a_run_that_is_none_or_damaged(capsys, tmp_path, plain) -> None:
    status, _, err = command(capsys, "export", str(tmp_path), "--to", "torch")
    assert (status, err.count("\n")) == (2, 1)
    assert "is not a run directory" in err
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes()[:-9])
    status, _, err = command(capsys, "export", str(tmp_path), "--to", "torch")
    assert (status, err.count("\n")) == (2, 1)
    assert "model.safetensors is damaged" in err
    assert not (tmp_path / "exported.pt").exists()


def without_reader() -> None:
    """A prelude: standard output is a pipe whose reader has ended."""
    import os

    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


@pytest.mark.slow
def test_a_reader_that_stops_ends_it_quietly(commands: Commands, tmp_path, plain) -> None:
    path = tmp_path / "x.pt"
    done = commands.run("export", plain, "--to", "torch", "-o", path, prelude=without_reader)
    assert (done.returncode, done.stderr) == (141, "")
    assert path.exists()
