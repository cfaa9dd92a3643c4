"""Networks of timm and torchvision take what was trained."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from exported import hooks, noise
from resist.errors import UserError
from resist.export import difference, fold, fold_scale, load_scaled
from resist.export.files import state_of, write_program, write_state
from resist.export.recipe import Recipe, check_loads, timm_counterpart
from resist.job import Job
from resist.models import build
from resist.planning.strategy import resist
from resist.subnet.scaling import scales_of


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


@pytest.mark.slow
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
