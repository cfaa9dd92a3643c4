"""Reports in a real browser: nothing goes wrong in it, nothing is empty, and it can be read on a telephone."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from report_runs import make_run
from resist.report.page import page as page_of
from resist.runs.history import read_history

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]
SIZES = ((360, "light"), (800, "dark"), (1440, "light"), (2560, "dark"))
MAX_BYTES, MAX_SECONDS = 1e6, 2.0

# Of each figure: its title, its box, and whether anything in it was drawn, pixel by pixel for pictures.
FIGURES = """() => [...document.querySelectorAll("figure")].map((figure) => {
  const box = figure.getBoundingClientRect();
  const drawn = [...figure.querySelectorAll("path.line, path.dots, path[fill], rect, td.cell, .bar i")];
  const sized = drawn.filter((one) => { const b = one.getBoundingClientRect(); return b.width + b.height > 2; });
  let painted = sized.length;
  for (const image of figure.querySelectorAll("img")) {
    const canvas = new OffscreenCanvas(image.naturalWidth || 1, image.naturalHeight || 1);
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    for (let i = 3; i < pixels.length; i += 4) painted += pixels[i] === 255;
  }
  return {title: figure.querySelector("figcaption").textContent, width: box.width, height: box.height, painted};
})"""

# The smallest text and the least contrast of any text with what lies behind it.
TEXT = """() => {
  const channels = (color) => { const n = color.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const layer = channels(getComputedStyle(e).backgroundColor);
      layers.push(layer);
      if (layer[3] === 1) break;
    }
    const over = (below, [r, g, b, a]) => [r, g, b].map((value, i) => a * value + (1 - a) * below[i]);
    return layers.reverse().reduce(over, [255, 255, 255]);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let size = Infinity, contrast = Infinity, where = "";
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("script, style, title") || !parent.getClientRects().length) continue;
    const style = getComputedStyle(parent);
    size = Math.min(size, parseFloat(style.fontSize));
    const [a, b] = [light(channels(style.color).slice(0, 3)), light(behind(parent))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < contrast) [contrast, where] = [ratio, node.textContent];
  }
  return {size, contrast, where};
}"""

# Ticks and legends that lie on top of each other, or outside the window.
CLASHES = """() => {
  const found = [];
  for (const axis of document.querySelectorAll(".xticks, .yticks")) {
    const boxes = [...axis.children].map((one) => one.getBoundingClientRect());
    boxes.forEach((a, i) => {
      if (a.left < 0 || a.right > innerWidth) found.push(["outside", axis.children[i].textContent]);
      for (const b of boxes.slice(i + 1)) {
        if (a.left < b.right && b.left < a.right && a.top + 1 < b.bottom && b.top + 1 < a.bottom) {
          found.push([axis.className, axis.children[i].textContent]);
        }
      }
    });
  }
  return found;
}"""


# Where the figures end on the right.
RIGHTMOST = (
    """() => Math.max(...[...document.querySelectorAll("figure")].map((one) => one.getBoundingClientRect().right))"""
)

# The text at the pointer, in each figure that has one.
TIPS = """() => [...document.querySelectorAll(".frame")].filter((one) => one.querySelector("script")).map((frame) => {
  const area = frame.querySelector(".area"), box = area.getBoundingClientRect(), tip = frame.querySelector(".tip");
  const [clientX, clientY] = [box.left + 0.9 * box.width, box.top + 0.4 * box.height];
  area.dispatchEvent(new PointerEvent("pointermove", {clientX, clientY}));
  const {left, right} = tip.getBoundingClientRect();
  return {text: tip.hidden ? "" : tip.textContent, left, right};
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """One run, several of them, and a run of few rounds that was never tested."""
    folder = tmp_path_factory.mktemp("reports")
    runs = {
        "resist": make_run(folder / "resist"),
        "local": make_run(folder / "local", strategy="local_sgd"),
        "eight": make_run(folder / "eight", workers=8, capacity=4, rounds=313, distinct=20),
        "short": make_run(folder / "short", rounds=2, num_evals=0),
    }
    for name, members in (("one", ["resist"]), ("all", list(runs)), ("untested", ["short"])):
        (folder / f"{name}.html").write_text(page_of([read_history(runs[one]) for one in members]), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in ("one", "all", "untested")}


@pytest.mark.parametrize(("width", "scheme"), SIZES)
@pytest.mark.parametrize("name", ["one", "all", "untested"])
def test_a_report_can_be_read(browser: Any, reports: dict[str, Path], name: str, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: messages.append(request.url) if request.url.startswith("http") else None)
    page.goto(reports[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(RIGHTMOST) > 0.75 * width
    figures = page.evaluate(FIGURES)
    assert len(figures) == {"one": 11, "all": 6 + 2 + 4 * 5, "untested": 8}[name]
    for figure in figures:
        assert figure["width"] > 200
        assert figure["height"] > 60
        untested = name == "untested" and figure["title"].startswith("Test accuracy")
        local = figure["title"].startswith("Bytes from")  # local SGD sends nothing from worker to worker
        assert figure["painted"] > 0 or untested or local, figure
    text = page.evaluate(TEXT)
    assert text["size"] >= 12
    assert text["contrast"] >= 4.5, text
    assert page.evaluate(CLASHES) == []
    tips = page.evaluate(TIPS)
    assert len(tips) >= 5
    assert all(tip["text"].strip() and tip["left"] >= 0 and tip["right"] <= width for tip in tips)
    assert messages == []
    page.close()


def test_a_telephone_shows_the_speed_up_at_once_and_that_tables_go_on(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 780})
    page.goto(reports["all"].as_uri())
    box = page.get_by_text(re.compile("times as fast")).first.bounding_box()
    assert box["y"] + box["height"] < 780
    row = page.locator("#comparison tr", has_text="speed").first.locator("td").first.bounding_box()
    assert row["x"] + row["width"] <= 360
    wide = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth).length"
    )
    shown = page.evaluate("[...document.querySelectorAll('.more')].filter((e) => e.offsetHeight > 0).length")
    assert shown == wide > 0
    page.close()


def test_the_keyboard_moves_the_place_that_is_read_out(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(reports["one"].as_uri())
    area = page.locator(".area").first
    area.focus()
    area.press("ArrowRight")
    first = area.locator("[role=status]").inner_text()
    for _ in range(20):
        area.press("ArrowRight")
    assert "full network" in first
    assert area.locator("[role=status]").inner_text() != first
    area.press("Escape")
    assert area.locator("[role=status]").is_hidden()
    page.close()


def test_it_is_whole_without_a_script_and_on_paper(browser: Any, reports: dict[str, Path]) -> None:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, java_script_enabled=False)
    page = context.new_page()
    page.goto(reports["all"].as_uri())
    page.emulate_media(media="print")
    for text in ("speed‑up", "Which worker held which block", "What differs between the runs"):
        assert page.get_by_text(text).first.is_visible(), text
    folded = page.locator("details.run:not([open])")
    assert folded.count() == 0 or folded.first.locator("figure").first.is_visible()
    context.close()


def test_what_the_map_says_is_what_the_plan_was(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(reports["one"].as_uri())
    area = page.locator(".map .area")
    box = area.bounding_box()
    records = read_history(reports["one"].parent / "resist").rounds
    for number, block in ((0, 0), (17, 9), (39, 21)):
        area.hover(position={"x": (number + 0.5) / 40 * box["width"], "y": (block + 0.5) / 22 * box["height"]})
        (plan,) = records[number]["plan"].values()
        holders = [str(worker) for worker, held in enumerate(plan) if block in held]
        messages = area.locator(".tip").inner_text()
        assert messages.splitlines()[0] == f"round {number + 1}, block {block}"
        assert messages.splitlines()[1].split(maxsplit=1)[1] == ", ".join(holders)
    page.close()


def test_five_thousand_rounds_of_a_hundred_blocks_stay_small_and_quick(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "run", rounds=5_000, workers=8, blocks=100, capacity=16, num_evals=200, distinct=10)
    file = tmp_path / "big.html"
    file.write_text(page_of([read_history(tmp_path / "run")]), encoding="utf-8")
    assert file.stat().st_size < MAX_BYTES
    took: list[float] = []
    for _ in range(3):  # the quickest: others may be busy on this machine
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        start = time.perf_counter()
        page.goto(file.as_uri())
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        took.append(time.perf_counter() - start)
        page.close()
    assert min(took) < MAX_SECONDS
