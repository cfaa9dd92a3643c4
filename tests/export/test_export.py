"""Exported networks compute the same as the scaled full network, without hooks where that is possible."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from resist.cli import main
from resist.errors import UserError
from resist.export import difference, fold, fold_scale, load_scaled
from resist.export.files import state_of, write_program, write_state
from resist.export.recipe import Recipe, check_loads, timm_counterpart
from resist.job import Job
from resist.models import build
from resist.planning.strategy import resist
from resist.runs.model_file import save_full
from resist.subnet.chains import find_chains
from resist.subnet.scaling import ScaleBranch, scale_blocks, scale_branches, scales_of
from support import BLOCKS, batch, full_of, make, tiny, train

CHANNELS = 6


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Before(nn.Module):
    """Pre-activation, with a bias and a dropout behind the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(F.relu(self.norm(x), inplace=True)))


class LayerScale(nn.Module):
    """ConvNeXt's: a factor for each channel, a parameter of the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((CHANNELS, 1, 1), 1e-6))
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.conv(x)


class Standardized(nn.Conv2d):
    """Weight-standardized: scaling the weight changes nothing, `gain` and bias have to be scaled."""

    def __init__(self) -> None:
        super().__init__(CHANNELS, CHANNELS, 1)
        self.gain = nn.Parameter(torch.ones(CHANNELS, 1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(input, self.gain * (self.weight - mean) / std, self.bias)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardized()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.sigmoid(x))


class Linear(nn.Module):
    """The output is a tuple, as Hugging Face's blocks give it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(CHANNELS, 3), nn.Linear(3, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.gelu(self.inner(x.movedim(1, -1)))).movedim(-1, 1)


class After(nn.Module):
    """Post-activation, as torchvision's ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class Two(nn.Module):
    """Two residual branches, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(torch.tanh(x))
        return x + self.two(torch.tanh(x))


def network(block: Callable[[], nn.Module], scale: float, seed: int = 0) -> nn.Module:
    """Four equal blocks after a stem that ends in a ReLU, weights and statistics random, branches scaled."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = [nn.Conv2d(3, CHANNELS, 3), nn.ReLU()]
        model = nn.Sequential(*stem, nn.Sequential(*(block() for _ in range(4))), nn.Flatten(), nn.LazyLinear(5))
        model(noise(1, 3, 8, 8))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias)
                module.running_mean = torch.randn(CHANNELS)
                module.running_var = 0.5 + torch.rand(CHANNELS)
    return scale_blocks(model, {f"2.{number}": scale for number in range(4)}).eval()


@pytest.mark.parametrize(
    ("block", "into"),
    [
        (Before, ("conv.weight", "conv.bias")),
        (LayerScale, ("gamma",)),
        (Gain, ("conv.weight", "conv.bias", "conv.gain")),
        (Linear, ("outer.weight", "outer.bias")),
    ],
)
@settings(max_examples=5)
@given(scale=st.floats(0.01, 0.99) | st.floats(1.01, 2), seed=st.integers(0, 1000))
def test_folding_is_exact(block: Callable[[], nn.Module], into: tuple[str, ...], scale: float, seed: int) -> None:
    scaled = network(block, scale, seed)
    before = {name: tensor.clone() for name, tensor in scaled.state_dict().items()}
    folded, folds = fold(scaled, noise(2, 3, 8, 8))
    assert hooks(folded) == 0
    expected = [(set(into), f"2.{i}", scale) for i in range(4)]
    assert [(set(record.into), record.block, record.scale) for record in folds] == expected
    images = noise(5, 3, 8, 8, seed=seed + 1)
    assert difference(scaled, folded, images) < 1e-6
    torch.testing.assert_close(folded(images), scaled(images), rtol=1e-4, atol=1e-5)
    assert len(scales_of(scaled)) == 4  # the original is as it was
    assert all(torch.equal(before[name], tensor) for name, tensor in scaled.state_dict().items())


@pytest.mark.parametrize(
    ("block", "why"), [(After, "an activation after the sum"), (Two, "more than one residual branch")]
)
def test_what_cannot_be_folded_is_refused_with_the_reason(block: Callable[[], nn.Module], why: str) -> None:
    scaled = network(block, 0.3)
    with pytest.raises(UserError, match=rf"block 2.0 \({block.__name__}\) cannot be folded .*{why}.*`scale=keep`"):
        fold_scale(scaled, noise(2, 3, 8, 8))
    assert len(scales_of(scaled)) == 4


def test_a_fold_before_an_activation_is_approximate() -> None:
    scaled = network(After, 0.3)
    folded, folds = fold(scaled, noise(2, 3, 8, 8), approximate=True)
    assert {record.into for record in folds} == {("norm.weight", "norm.bias")}
    assert not any(record.exact for record in folds)
    block, x = scaled.get_submodule("2.1"), noise(2, CHANNELS, 8, 8).relu()
    torch.testing.assert_close(folded.get_submodule("2.1")(x), F.relu(x + 0.3 * block.norm(block.conv(x))))
    assert 0.001 < difference(scaled, folded, noise(2, 3, 8, 8)) < 1
    with pytest.raises(UserError, match="more than one residual branch"):
        fold(network(Two, 0.3), noise(2, 3, 8, 8), approximate=True)


def test_blocks_within_blocks_and_other_hooks() -> None:
    class OuterSGD(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Sequential(Before(), Before()), nn.Conv2d(CHANNELS, CHANNELS, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.last(self.inner(x))

    model = network(OuterSGD, 0.4)
    scale_blocks(model, {f"2.{i}.inner.{j}": 0.7 for i in range(4) for j in range(2)})
    seen: list[int] = []
    model.get_submodule("2.3").register_forward_hook(lambda *_: seen.append(1))
    folded = fold_scale(model, noise(2, 3, 8, 8))
    assert scales_of(folded) == {}
    assert difference(model, folded, noise(3, 3, 8, 8, seed=4)) < 1e-6
    seen.clear()
    folded(noise(2, 3, 8, 8))
    assert seen == [1]


def test_a_block_that_the_example_does_not_reach_is_named() -> None:
    scaled = network(Before, 0.3)
    scaled.aside = Before()
    scale_blocks(scaled, {"aside": 0.5})
    scaled.forward = lambda images: nn.Sequential(*list(scaled)[:-1])(images)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="block aside takes no part"):
        fold_scale(scaled, noise(2, 3, 8, 8))
    with pytest.raises(UserError, match="no block 'nowhere'"):
        scale_blocks(scaled, {"nowhere": 0.5})


@pytest.mark.slow
@pytest.mark.parametrize("batchnorm", ["average", "batch"])
def test_a_trained_job_folds_into_an_ordinary_network(batchnorm: str) -> None:
    job, optimizers = make(resist(3, 2, min_depth=1), batchnorm=batchnorm)
    train(job, optimizers, 5)
    scaled = full_of(job)
    images = batch(7, 0, 9)[0]
    folded = fold_scale(scaled, images[:2])
    assert hooks(folded) == 0
    assert sum(isinstance(h, ScaleBranch) for m in scaled.modules() for h in m._forward_hooks.values()) == BLOCKS
    torch.testing.assert_close(folded(images), scaled(images), rtol=1e-12, atol=1e-12)
    if batchnorm == "average":
        plain = tiny().eval()
        plain.load_state_dict(folded.state_dict())
        torch.testing.assert_close(plain(images), scaled(images), rtol=1e-12, atol=1e-12)
    program = torch.export.export(folded, (images,)).module()
    torch.testing.assert_close(program(images), scaled(images), rtol=1e-12, atol=1e-12)


TIMM = {  # small networks of timm, and where the scale goes; None: it cannot be folded
    "resnetv2_50": ({"layers": (1, 1, 3, 1), "channels": (16, 16, 16, 16), "stem_chs": 8}, "conv3.weight"),
    "test_convnext": ({}, "gamma"),
    "test_vit": ({"img_size": 32}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_takes_what_was_trained(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is an optional extra")
    options, into = TIMM[name]
    recipe = Recipe("timm", name, {"num_classes": 5, **options})
    scaled = trained(recipe)
    images = noise(3, 3, 32, 32, seed=9)
    if into is None:
        with pytest.raises(UserError, match="more than one residual branch"):
            fold_scale(scaled, images)
        left = scaled
    else:
        left, folds = fold(scaled, images)
        assert {into} == {name for record in folds for name in record.into}
        assert hooks(left) == 0
    check_loads(recipe, state_of(left), left, images)
    path = tmp_path / "x.safetensors"
    write_state(path, state_of(left), {"format": "resist export 1", "scales": json.dumps(scales_of(left))})
    loaded = recipe.build().eval()
    if into is None:
        load_scaled(loaded, path)
    else:
        loaded.load_state_dict(load_file(path))
    torch.testing.assert_close(loaded(images), scaled(images), rtol=1e-5, atol=1e-5)
    if into is not None:
        return
    write_program(tmp_path / "x.pt2", left, images, {})  # has the scale in it
    assert (tmp_path / "x.pt2").stat().st_size < 1.5 * path.stat().st_size
    program = torch.export.load(tmp_path / "x.pt2").module()
    for num in (1, 3, 7):  # any number of images
        some = noise(num, 3, 32, 32, seed=num)
        torch.testing.assert_close(program(some), scaled(some), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_torchvision_takes_what_was_trained(tmp_path: Path) -> None:
    """MobileNet v2 ends its branches in a norm; ResNet-50 applies a ReLU after the sum."""
    images = noise(2, 3, 32, 32, seed=9)
    recipe = Recipe("torchvision", "mobilenet_v2", {"num_classes": 5, "width_mult": 0.25})
    scaled = trained(recipe)
    folded = fold_scale(scaled, images)
    path = tmp_path / "x.pth"
    write_state(path, state_of(folded), {"scale": "folded"})
    loaded = recipe.build().eval()
    loaded.load_state_dict(torch.load(path, weights_only=True))
    torch.testing.assert_close(loaded(images), scaled(images), rtol=1e-5, atol=1e-5)

    recipe = Recipe("torchvision", "resnet50", {"num_classes": 5, "width_per_group": 8})
    scaled = trained(recipe)
    with pytest.raises(UserError, match="activation after the sum"):
        fold_scale(scaled, images)
    folded, folds = fold(scaled, images, approximate=True)
    assert {record.into for record in folds} == {("bn3.weight", "bn3.bias")}
    assert difference(scaled, folded, images) > 0
    check_loads(recipe, state_of(folded), folded, images)
    with pytest.raises(UserError, match="does not compute the same"):
        check_loads(recipe, state_of(folded), scaled, images)


def trained(recipe: Recipe) -> nn.Module:
    """The scaled full network of a job of two workers after two short rounds on noise."""
    job = Job(recipe.build, resist(2, 2, min_depth=1))
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.01) for worker in job.workers]
    for step in range(4):
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(worker.model(noise(4, 3, 32, 32, seed=step)), torch.arange(4)).backward()
            optimizer.step()
        job.step(*optimizers)
    full = job.full_model([noise(8, 3, 32, 32, seed=n) for n in range(2)])
    assert full is not None
    return full


def test_a_recipe_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="torchvision cannot build 'resnet9'"):
        Recipe("torchvision", "resnet9").build()
    with pytest.raises(UserError, match="`model=resnet9` is not known"):
        Recipe("resist", "resnet9", {"num_classes": 2}).build()
    recipe = Recipe("resist", "preact_small", {"num_classes": 2, "depths": (1, 1, 2, 1), "width": 2})
    with pytest.raises(UserError, match="does not take the weights of this run"):
        check_loads(recipe, {}, recipe.build(), noise(2, 3, 16, 16))
    assert recipe.code == "build('preact_small', num_classes=2, depths=(1, 1, 2, 1), width=2)"
    assert Recipe("torchvision", "resnet18", {"num_classes": 2}).code == "torchvision.models.resnet18(num_classes=2)"
    assert Recipe("timm", "vit").code == "timm.create_model('vit')"


SMALL = [
    "--workers", "3", "--min-depth", "0", "--model-args", "depths=1,1,5,1", "width=4", "--batch-size", "32",
    "--local-steps", "3", "--epochs", "0.2", "--num-evals", "1", "--device", "cpu", "--processes", "1",
]  # fmt: skip


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of 4 chain blocks dealt to 3 workers, one without running statistics, one without scale."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"plain": [], "batch": ["--batchnorm", "batch"]}
    for name, more in options.items():
        with pytest.raises(SystemExit) as ended:
            main(["train", *SMALL, *more, "--out", str(folder / name)])
        assert not ended.value.code
    return {name: folder / name for name in options}


def own() -> nn.Module:
    return build("preact_small", num_classes=10, depths=(1, 1, 5, 1), width=4).eval()


def scaled_of(run: Path) -> nn.Module:
    """The full network of the run "plain", put together by hand from what is kept in it."""
    model = own()
    model.load_state_dict(load_file(run / "model.safetensors"))
    return scale_blocks(model, {f"layer3.{number}": 0.5 for number in range(1, 5)})


@pytest.mark.slow
def test_every_target_computes_what_the_run_computes(capsys, tmp_path, runs) -> None:
    scaled, images = scaled_of(runs["plain"]), noise(3, 3, 16, 16)
    for to, file in (("safetensors", "a.safetensors"), ("torch", "a.pt"), ("program", "a.pt2")):
        for scale in ("fold", "keep"):
            path = tmp_path / f"{scale}-{file}"
            arguments = ["--to", to, "-o", str(path), "--scale", scale, "--device", "cpu"]
            status, text, err = command(capsys, "export", str(runs["plain"]), *arguments)
            assert (status, err) == (0, "")
            assert str(path) in text
            assert "4 blocks are multiplied by 0.5" in text
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [("timm:test_convnext", {}), ("timm:test_vit", {"img_size": 32}), ("torchvision:resnet18", {})],
)
def test_runs_of_their_networks(capsys, tmp_path, monkeypatch, runs, model: str, options: dict[str, int]) -> None:
    """A run directory as training leaves it: the weights of a network of timm or torchvision, and the scale."""
    library, _, name = model.partition(":")
    pytest.importorskip(library, reason="timm is an optional extra")
    build_theirs = Recipe(library, name, {"num_classes": 10, **options}).build
    monkeypatch.setattr("resist.export.run.network_builder", lambda _config: build_theirs)
    config = json.loads((runs["plain"] / "config.json").read_text())
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
def test_our_networks_for_photographs_are_timms(capsys, tmp_path, runs, model: str) -> None:
    pytest.importorskip("timm", reason="timm is an optional extra")
    config = json.loads((runs["plain"] / "config.json").read_text())
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


@pytest.mark.parametrize("depth", [50, 101, 152, 200])
def test_timms_names_of_our_networks(depth: int) -> None:
    pytest.importorskip("timm", reason="timm is an optional extra")
    recipe = timm_counterpart(f"preact_resnet{depth}_imagenet", 10, (), None)
    assert recipe is not None
    assert recipe.name == f"resnetv2_{depth if depth != 200 else 50}"
    with torch.device("meta"):
        ours = build(f"preact_resnet{depth}_imagenet", num_classes=10).state_dict()
        loaded = recipe.build().state_dict()
    assert {n: t.shape for n, t in recipe.translated(ours).items()} == {n: t.shape for n, t in loaded.items()}
    assert timm_counterpart("preact_resnet101", 10, (), None) is None


def from_printed_code(text: str) -> nn.Module:
    """What the printed lines of code make."""
    names: dict[str, object] = {}
    exec("\n".join(line.strip() for line in text.splitlines() if line.startswith("  ")), names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.slow
def test_statistics_are_estimated_for_a_run_without_them(capsys, tmp_path, runs) -> None:
    status, _, err = command(capsys, "export", str(runs["batch"]), "--to", "torch", "-o", str(tmp_path / "x.pt"))
    assert (status, err.count("\n")) == (2, 1)
    assert "--calibrate" in err
    arguments = ["--to", "torch", "-o", str(tmp_path / "x.pt"), "--calibrate", "--device", "cpu"]
    status, text, _ = command(capsys, "export", str(runs["batch"]), *arguments)
    assert status == 0
    model = from_printed_code(text)
    own().load_state_dict(model.state_dict())
    assert model.get_buffer("norm.running_mean").abs().max() > 0
    trained_weights = load_file(runs["batch"] / "model.safetensors")
    assert torch.equal(trained_weights["layer3.0.conv2.weight"], model.get_parameter("layer3.0.conv2.weight"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--to", "timm"], "of --model timm:NAME or preact_resnet..._imagenet, not of preact_small"),
        (["--to", "torchvision"], "give --to safetensors, torch or program"),
        (["--to", "torch", "-o", "x.safetensors"], "has the suffix .safetensors; give it one of .pt, .pth"),
        (["--to", "torch", "-o", "x"], "has no suffix; give it one of"),
        (["--to", "torch", "-o", "none/x.pt"], "none is not a writable directory"),
        (["--to", "torch", "--device", "tpu"], "--device 'tpu' is not one of"),
        (["--to", "safetensors", "-o", "there.safetensors"], "exists already and is never overwritten"),
        (["--to", "safetensors", "-o", "dangling.safetensors"], "exists already and is never overwritten"),
    ],
)
def test_what_cannot_be_exported_is_an_error_of_one_line(
    capsys, tmp_path, monkeypatch, runs, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.safetensors").write_text("precious")
    Path("dangling.safetensors").symlink_to("nowhere")
    before = sorted(os.listdir())
    status, out, err = command(capsys, "export", str(runs["plain"]), *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert text in err
    assert Path("there.safetensors").read_text() == "precious"
    assert sorted(os.listdir()) == before


def test_a_run_that_is_none_or_damaged(capsys, tmp_path, runs) -> None:
    status, _, err = command(capsys, "export", str(tmp_path), "--to", "torch")
    assert (status, err.count("\n")) == (2, 1)
    assert "is not a run directory" in err
    (tmp_path / "config.json").write_text((runs["plain"] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((runs["plain"] / "model.safetensors").read_bytes()[:-9])
    status, _, err = command(capsys, "export", str(tmp_path), "--to", "torch")
    assert (status, err.count("\n")) == (2, 1)
    assert "model.safetensors is damaged" in err
    assert not (tmp_path / "exported.pt").exists()


@pytest.mark.slow
def test_a_reader_that_stops_ends_it_quietly(tmp_path, runs) -> None:
    arguments = ["export", str(runs["plain"]), "--to", "torch", "-o", str(tmp_path / "x.pt")]
    command = [sys.executable, "-m", "resist", *arguments]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "x.pt").exists()


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_state(tmp_path / "x.pt", {"a": torch.zeros(3)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path, monkeypatch, links: bool) -> None:
    path, link = tmp_path / "x.pt", os.link

    def late(source: Path, target: Path) -> None:
        target.write_text("precious")
        if not links:
            raise PermissionError("no links here")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(UserError, match="exists already"):
        write_state(path, {"a": torch.zeros(3)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    assert path.read_text() == "precious"


def test_a_file_that_is_no_export_is_refused(tmp_path, runs) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_scaled(own(), tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="give a file of resist export"):
        load_scaled(own(), runs["plain"] / "model.safetensors")
    path = tmp_path / "x.safetensors"
    for state, scales in (({}, "{}"), (state_of(own()), '{"layer9.1": 0.5}'), (state_of(own()), "[")):
        path.unlink(missing_ok=True)
        write_state(path, state, {"format": "resist export 1", "scales": scales})
        with pytest.raises(UserError, match=r"another network|no block 'layer9.1'"):
            load_scaled(own(), path)
