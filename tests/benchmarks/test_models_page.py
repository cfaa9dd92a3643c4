"""Tests of docs/models.md: the page is the script's output, and the results are reproducible."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import model_page

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = BENCHMARKS.parent / "docs" / "models.md"


def kept() -> list[dict[str, Any]]:
    return json.loads((BENCHMARKS / "results" / "models.json").read_text())


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == model_page.page(kept())


def test_of_every_family_there_is_one_that_passes() -> None:
    passed = [record["name"].lower() for record in kept() if "refused" not in record]
    assert len(set(passed)) >= 20
    families = (
        "preact_resnet200", "resnet18", "resnet152", "wide_resnet", "resnext", "regnet", "convnext", "efficientnet",
        "vit", "deit", "swin", "mixer", "hugging face vit", "hugging face resnet", "bert",
    )  # fmt: skip
    assert [family for family in families if not any(family in name for name in passed)] == []


def test_numbers_of_a_result_fit_together() -> None:
    for record in kept():
        if "refused" in record:
            assert record["refused"]
            assert "\n" not in record["refused"]
            continue
        dealt = sum(chain["blocks"] * chain["block_parameters"] for chain in record["chains"])
        assert 0 < dealt < record["parameters"]
        assert record["apart"] < 1e-5
        if "held" in record:
            pairs = zip(record["held"], record["chains"], strict=True)
            left_out = sum((chain["blocks"] - held) * chain["block_parameters"] for held, chain in pairs)
            assert record["held_parameters"] == record["parameters"] - left_out
            assert record["held_flops"] < record["full_flops"]


AGAIN = ["torchvision swin_t", "torchvision shufflenet", "timm vit_small_patch16_rope", "Hugging Face DistilBERT"]


@pytest.mark.slow
def test_some_are_counted_again() -> None:
    """Chains, parameters and FLOPs are those of the page."""
    pytest.importorskip("timm", reason="needs the extra timm")
    pytest.importorskip("transformers", reason="needs the extra transformers")
    import models

    before = {record["name"]: record for record in kept()}
    cases = [case for case in models.CASES if case.name in before and case.name.startswith(tuple(AGAIN))]
    assert len(cases) == len(AGAIN)
    for case in cases:
        counted = json.loads(json.dumps(models.count(case)))
        assert counted == {key: before[case.name][key] for key in counted}


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
    free = versions | {"date", "commit", "machine", "cores", "gpu", "run_s", "losses", "apart"}
    found = json.loads(done.stdout)
    assert len(found) == len(AGAIN)
    for record in found:
        old = before[record["name"]]
        assert {k: v for k, v in record.items() if k not in free} == {k: v for k, v in old.items() if k not in free}
        assert record.get("losses") == (pytest.approx(old["losses"], abs=0.02) if "losses" in old else None)
