"""Tests of docs/models.md: the page is the script's output, and the results are reproducible."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import model_page
from reference import apart, preact_formula, with_gains, with_noise
from resist.models import build

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = BENCHMARKS.parent / "docs" / "models.md"


def kept(name: str = "models") -> list[dict[str, Any]]:
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


def passed() -> list[dict[str, Any]]:
    return [record for record in kept() if not record.keys() & {"refused", "failed"}]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == model_page.page(kept(), kept("optimizers"))


def test_of_every_family_there_is_one_that_passes() -> None:
    names = [record["name"].lower() for record in passed()]
    assert len(set(names)) >= 60
    families = (
        "preact_resnet200", "resnet18", "resnet152", "wide_resnet", "resnext", "regnet", "convnext", "efficientnet",
        "vit", "deit", "swin", "mixer", "hugging face vit", "hugging face resnet", "bert", "gpt-2", "llama", "t5",
    )  # fmt: skip
    assert [family for family in families if not any(family in name for name in names)] == []


def test_numbers_of_a_result_fit_together() -> None:
    assert [record["name"] for record in kept() if "failed" in record] == []
    for record in passed():
        dealt = sum(chain["blocks"] * chain["block_parameters"] for chain in record["chains"])
        assert 0 < dealt < record["parameters"]
        assert max(record["forward"], record["backward"], record["scaled"]) < 1e-4
        for held in record["held"].values():
            assert 0 < model_page.left(record, held, "block_parameters", "parameters") <= 1
    assert all(record["refused"] and "\n" not in record["refused"] for record in kept() if "refused" in record)


def test_every_optimizer_of_torch_is_on_the_page() -> None:
    found = {record["name"]: record for record in kept("optimizers")}
    kinds = [value for value in vars(torch.optim).values() if isinstance(value, type)]
    names = {kind.__name__ for kind in kinds if issubclass(kind, torch.optim.Optimizer)} - {"Optimizer"}
    assert {name for name in names if not any(name in title for title in found)} == set()
    assert sum(title.startswith("timm ") for title in found) >= 3
    assert max(record["difference"] for record in found.values()) < 1e-6
    assert min(record["trained"] for record in found.values()) > 1e-3


BUILDS = (
    partial(build, "preact_small", num_classes=3, width=4),
    partial(build, "preact_resnet50_imagenet", num_classes=3, width=2),
)


@pytest.mark.parametrize("small", BUILDS)
def test_hooks_and_formula_are_the_same_reference(small: Callable[[], torch.nn.Module]) -> None:
    torch.manual_seed(0)
    model, images = with_noise(small()).eval(), torch.rand(2, 3, 32, 32)
    gains = {"layer3.1": 0.0, "layer3.2": 0.5}
    with torch.no_grad():
        assert apart(preact_formula(model, images, {}), model(images)) < 1e-5
        by_hooks = with_gains(model, gains)(images)
        assert apart(preact_formula(model, images, gains), by_hooks) < 1e-5
        assert apart(by_hooks, model(images)) > 1e-3


AGAIN = ["torchvision swin_t", "torchvision shufflenet", "timm vit_small_patch16_rope", "Hugging Face DistilBERT"]


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_some_of_them_again() -> None:
    """Count and run again: every value that does not depend on the machine is the same."""
    pytest.importorskip("timm", reason="needs the extra timm")
    pytest.importorskip("transformers", reason="needs the extra transformers")
    command = [sys.executable, str(BENCHMARKS / "models.py"), "--json", "--only", *AGAIN]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = {record["name"]: record for record in kept()}
    versions = {"torch", "torchvision", "timm", "transformers", "python"}
    free = versions | {"date", "commit", "machine", "cores", "gpu", "run_s"}
    measured = {"losses", "forward", "backward", "scaled"}
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(AGAIN)
    for record in found:
        old = before[record["name"]]
        fixed = old.keys() - free - measured
        assert {key: record.get(key) for key in fixed} == {key: old[key] for key in fixed}
        assert record.get("losses") == (pytest.approx(old["losses"], abs=0.02) if "losses" in old else None)
