"""Plans, jobs and runs as pictures in a notebook, and the notebook of the examples in a kernel of its own."""

import ast
import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from report_runs import make_run
from resist import RoundPlan, load_ipython_extension, partition
from resist.errors import UserError
from resist.report.colors import color_of
from resist.report.notebook import draw_plans
from resist.runs.history import read_history

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
SVG = "image/svg+xml"


def round_plans(rounds: int) -> list[RoundPlan]:
    """Plans of two chains for three workers."""
    return [
        RoundPlan((partition(8, [3] * 3, seed=0, round=i), partition(3, [1] * 3, seed=0, round=i, chain="b")))
        for i in range(rounds)
    ]


@pytest.fixture
def formatter() -> Any:
    """The formatter of an IPython shell in which the extension was loaded."""
    formatters = pytest.importorskip("IPython.core.formatters")
    display = formatters.DisplayFormatter()
    load_ipython_extension(SimpleNamespace(display_formatter=display))
    return display


def test_plans_show_themselves_as_svg_and_text(formatter: Any) -> None:
    (plan,) = round_plans(1)
    for value in (plan, plan.plans[0]):
        data, _ = formatter.format(value)
        root = ET.fromstring(data[SVG])
        fills = [rect.get("fill") for rect in root.iter("{http://www.w3.org/2000/svg}rect")]
        assert fills.count(color_of(1)) == 1 + 3 + 2 + (3 if value is plan else 0)  # legend, blocks, shared parts
        assert "blocks=" in data["text/plain"]


def test_a_job_shows_its_present_plan(formatter: Any) -> None:
    class Job(SimpleNamespace):
        __module__ = "resist.job"  # the formatter knows it by its name, without importing torch

    job = Job(plan=round_plans(1)[0], chains=[SimpleNamespace(name="layer3:1-8"), SimpleNamespace(name="b")], round=4)
    data, _ = formatter.format(job)
    assert "8 blocks of layer3:1-8" in data[SVG]
    assert "round 5" in data[SVG]
    assert "round 5   worker 0" in data["text/plain"]


def test_a_run_shows_its_report_in_a_frame_of_its_own(formatter: Any, tmp_path: Path) -> None:
    history = read_history(make_run(tmp_path / "run", rounds=4))
    data, _ = formatter.format(history)
    assert data["text/html"].startswith("<iframe")
    assert "<script" not in data["text/html"]  # only within the frame's quoted document
    assert "4 workers, 4 rounds, finished" in data["text/plain"]
    assert len(data["text/plain"]) < 300


@pytest.mark.parametrize("rounds", [3, 12, 2000])
def test_many_rounds_are_a_map_of_bounded_size(rounds: int) -> None:
    picture = draw_plans(round_plans(min(rounds, 20)) * -(-rounds // 20), ["first", "<b>"])
    root = ET.fromstring(picture.svg)
    images = list(root.iter("{http://www.w3.org/2000/svg}image"))
    assert len(images) == (2 if rounds > 4 else 0)
    assert len(picture.svg) < 60_000
    assert len(repr(picture).splitlines()) < 60
    assert "&lt;b&gt;" in picture.svg
    width = float(root.get("width", 0))
    assert all(float(image.get("x", 0)) + float(image.get("width", 0)) <= width for image in images)


def test_the_drawing_does_not_style_what_is_around_it() -> None:
    style = re.search(r"<style>(.*?)</style>", draw_plans(round_plans(1)).svg)
    assert style is not None
    for selector in re.findall(r"([^{}]+)\{", style[1].replace("@media(prefers-color-scheme:dark){", "")):
        assert selector.startswith(".resist-plan "), selector


def test_plans_that_do_not_belong_together_are_refused() -> None:
    for plans, chains, text in (
        ([], (), "plans is empty"),
        ([partition(4, [2, 2], seed=0, round=0), partition(5, [3, 3], seed=0, round=0)], (), "different lengths"),
        (round_plans(1), ["only one"], "1 names, and the plans are of 2 chains"),
    ):
        with pytest.raises(UserError, match=text):
            draw_plans(plans, chains)


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def pictures(of: list[dict[str, Any]]) -> list[str]:
    found = [output["data"][SVG] for cell in of for output in cell["outputs"] if SVG in output.get("data", {})]
    return ["".join(lines) for lines in found]


def test_the_notebook_is_small_and_of_no_particular_machine() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 50_000
    assert json.loads(text)["metadata"]["kernelspec"]["name"] == "python3"
    assert not re.search(r"0x[0-9a-f]{6}|/(home|root|tmp|work)/", text)
    assert all(
        cell["outputs"] for cell in cells() if "import" not in cell["source"][0] and "%" not in cell["source"][0]
    )
    assert pictures(cells())[0] == draw_plans([partition(8, [2] * 4, seed=0, round=0)]).svg


@pytest.mark.slow
def test_the_cells_show_what_is_stored(formatter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process; at night in a kernel."""
    names: dict[str, Any] = {}
    shown: list[str] = []
    for cell in cells():
        body = ast.parse("".join(line for line in cell["source"] if not line.startswith("%"))).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            data, _ = formatter.format(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
            shown += [data[SVG]] if SVG in data else []
    assert shown == pictures(cells())
    texts = [output["text"] for cell in stored() for output in cell["outputs"]]
    check_accuracies(capsys.readouterr().out, "".join(texts))


def check_accuracies(*texts: str) -> None:
    accuracies = [float(re.findall(r"([\d.]+)% of 360 test images", text)[0]) for text in texts]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=3)
    assert accuracies[0] > 90


@pytest.mark.nightly
def test_the_notebook_runs_and_shows_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    make_run(tmp_path / "run", rounds=4)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    added = "from pathlib import Path\nfrom resist.runs.history import read_history\nread_history(Path('run'))"
    notebook.cells.append(nbformat.v4.new_code_cell(added))
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert pictures(ran) == pictures(cells())
    assert len(pictures(ran)) == 3
    assert "text/html" in ran[-1].outputs[0].data
    check_accuracies(
        *("".join(output.get("text", "") for cell in of for output in cell["outputs"]) for of in (ran, stored()))
    )


def stored() -> list[dict[str, Any]]:
    """The code cells as they are stored, the lines of each output joined."""
    found = cells()
    for cell in found:
        for output in cell["outputs"]:
            output["text"] = "".join(output.get("text", ""))
    return found
