"""A backbone that starts from a classification run."""

from dataclasses import replace

import pytest
import torch

from detectors import ARGUMENTS, SMALL, classification_run, cli
from resist.job import build_seeded
from resist.models.faster_rcnn import sections
from resist.tasks import network_builder
from resist.tasks.backbone import BackboneInit


@pytest.mark.parametrize("model", ["preact_small", "preact_resnet50_imagenet"])
def test_the_features_are_those_of_the_run(task, tmp_path, model: str) -> None:
    """Its scale is in the weights: every section gives what it gave in the run's scaled full network."""
    task = replace(task, build=network_builder(replace(SMALL, model=model)))
    classifier = classification_run(tmp_path / "run", model=model)
    started = replace(task, start=BackboneInit.read(tmp_path / "run"))
    detector = build_seeded(started.network, 0).eval()
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for (name, ours), (_, expected) in zip(
            sections(detector.backbone.body, images), sections(classifier, images), strict=True
        ):
            torch.testing.assert_close(ours, expected, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(detector.backbone.norms["layer4"].running_mean, classifier.norm.running_mean)
    fresh = build_seeded(task.network, 0)
    torch.testing.assert_close(detector.rpn.head.cls_logits.weight, fresh.rpn.head.cls_logits.weight)


@pytest.mark.parametrize("more", [{"model": "preact_resnet101"}, {"batchnorm": "batch"}])
def test_runs_without_a_last_norm_or_statistics_serve_too(task, tmp_path, more) -> None:
    classification_run(tmp_path / "run", **more)
    network = replace(SMALL, model=more.get("model", SMALL.model))
    replace(task, build=network_builder(network), start=BackboneInit.read(tmp_path / "run")).network()


@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        (
            {"model_args": ("depths=1,1,5,1", "width=8")},
            "conv1.weight differs; give the options of that run, --model preact_small --model-args depths=1,1,5,1 w",
        ),
        (
            {"model_args": ("width=4", "depths=1,1,7,1", "final_norm=true")},
            "options of that run, --model preact_small --model-args width=4 depths=1,1,7,1, and no",
        ),
        (
            {"model_args": ("depths=1,1,3,1",)},
            "options of that run, --model preact_small --model-args depths=1,1,3,1, and no",
        ),
    ],
)
def test_another_network_is_refused_in_one_line(capsys, kit, tmp_path, network, complaint: str) -> None:
    classification_run(tmp_path / "run", **network)
    out = tmp_path / "new"
    status, _, err = cli(
        capsys, "train", *ARGUMENTS, "--data-dir", str(kit), "--init-from", str(tmp_path / "run"), "--out", str(out)
    )
    assert (status, err.count("\n")) == (2, 1)
    assert complaint in err
    assert not out.exists()
