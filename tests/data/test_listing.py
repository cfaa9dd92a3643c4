"""Folders of classes as people leave them: nothing is dropped without a word, and every name can be printed."""

import io
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from photographs import COLORS, make_folder, write
from resist.data.classes import class_names
from resist.data.image_folder import load_folder
from resist.data.listing import list_split
from resist.data.naming import few, shown
from resist.errors import UserError

CAFE = os.fsdecode(b"caf\xe9")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_folder(tmp_path / "data", train=2, val=1)


def notes(folder: Path) -> list[str]:
    """The lines about the training set and the test set, the latter marked, with names relative to the folder."""
    found = [note for split in load_folder(folder, size=32, skip_bad=True) for note in split.notes]
    assert all(note.startswith(f"{folder}/") for note in found)
    return [note.removeprefix(f"{folder}/") for note in found]


def error(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        load_folder(folder, size=32)
    text = str(raised.value)
    assert text.isprintable()
    return text.removeprefix(f"{shown(folder)}/")


def content(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (9, 90, 200)).save(file, kind)
    return file.getvalue()


NAMES = {
    "a.jfif": "JPEG", "b.jpe": "JPEG", "c.JPG": "JPEG", "d.avif": "AVIF", "e.jp2": "JPEG2000", "f": "JPEG",
    "g.jpg.1": "PNG", "h.jpg?size=large": "WEBP", "i.bin": "BMP", "j.tif": "TIFF", "k.x": "GIF", "l.y": "AVIF",
    "m.z": "PPM", "n.PnG": "PNG", "o.tga": "TGA", "p.ico": "ICO", "q.jpeg ": "JPEG",
}  # fmt: skip


def test_every_picture_is_read_whatever_its_name(folder: Path) -> None:
    for name, kind in NAMES.items():
        (folder / "train/ant" / name).write_bytes(content(kind))
    train, _ = load_folder(folder, size=32, skip_bad=True)
    assert [note for note in train.notes if "ant" in note] == []
    assert len(train) == 6 + len(NAMES)


def test_other_files_are_counted_by_kind(folder: Path) -> None:
    for name in ("a.txt", "b.txt", "b.TXT", "c.heic", "d", "BMX.dat", "e.svg"):
        (folder / "train/bee" / name).write_bytes(b"BM or other" * 3)
    (folder / "train/bee/raw.NEF").write_bytes(content("TIFF"))
    (folder / "train/bee/empty").write_bytes(b"")
    (folder / "train/labels.csv").write_text("")
    (folder / "train/bee/.DS_Store").write_text("")
    os.mkfifo(folder / "train/bee/pipe.png")
    assert notes(folder) == [
        "train: passed over 10 files of other kinds: .txt 3, no suffix 2, .dat 1, .heic 1, .nef 1 and 2 more; first "
        "bee/BMX.dat",
        "train: passed over 1 file beside the class folders: labels.csv",
    ]


def nest(folder: Path, middle: str) -> None:
    for split in ("train", "val"):
        (folder / split).rename(folder / "aside")
        (folder / split / middle).parent.mkdir(parents=True)
        (folder / "aside").rename(folder / split / middle)


@pytest.mark.parametrize("middle", ["images", "images/all", CAFE])
def test_a_folder_too_much_is_named_with_what_lies_in_it(folder: Path, middle: str) -> None:
    nest(folder, middle)
    name, where = shown(middle.split("/")[0]), f" in {middle}" if "/" in middle else ""
    assert error(folder) == (
        f"train: has one class, {name}, and two are needed; it contains the folders ant, bee, cat{where}: if they "
        f"are the classes, move them up into {folder}/train"
    )
    with pytest.raises(UserError, match="has one class"):
        class_names(folder)
    with pytest.raises(UserError, match="has one class"):
        load_folder(folder, skip_bad=True)


def test_one_class_is_no_task(folder: Path) -> None:
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            shutil.rmtree(folder / split / name)
    assert error(folder) == "train: has one class, cat, and two are needed; add another class"


def test_another_folder_that_has_the_splits_is_named(folder: Path) -> None:
    with pytest.raises(UserError) as raised:
        load_folder(folder.parent)
    assert str(raised.value).startswith(
        f"{folder.parent}/train: No such file or directory; give `data_dir={folder}`, which has one; `data_dir` has to"
    )
    (folder / "train").rename(folder / "Training")
    assert error(folder).startswith("train: No such file or directory; the folders here are Training, val; `data_dir`")


def link_to_nothing(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(path.parent / "nowhere")


def file_in_place(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("../../elsewhere/ant")


def emptied(path: Path) -> None:
    for file in path.iterdir():
        file.rename(file.with_name(f"{file.stem}.heic"))
        file.with_name(f"{file.stem}.heic").write_text("no picture")


def loop(path: Path) -> None:
    (path / "again").symlink_to(path)


PROBLEMS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "missing in val": (
        lambda d: shutil.rmtree(d / "val/ant"), "val/ant: is missing, a class of train/; add it, or give `skip_bad",
        "val: left out 1 class: ant (is missing, a class of train/)", "",
    ),
    "missing in train": (
        lambda d: shutil.rmtree(d / "train/ant"), "val/ant: is not a class of train/; fix or delete it, or give",
        "val: left out 1 folder: ant (is not a class of train/)", "",
    ),
    "dangling in train": (
        lambda d: link_to_nothing(d / "train/ant"), "train/ant: leads to nothing; fix or delete it, or give `skip_bad",
        "train: left out 1 link: ant (leads to nothing)", "",
    ),
    "dangling in val": (
        lambda d: link_to_nothing(d / "val/ant"), "val/ant: leads to nothing; fix or delete it, or give `skip_bad",
        "val: left out 1 link: ant (leads to nothing)", "",
    ),
    "dangling file": (
        lambda d: link_to_nothing(d / "train/bee/bee_0.png"), "train/bee/bee_0.png: leads to nothing; fix or",
        "train: left out 1 link: bee/bee_0.png (leads to nothing)", "",
    ),
    "file in val": (
        lambda d: file_in_place(d / "val/ant"), "val/ant: is a file, not the folder of the class; add it, or give `s",
        "val: left out 1 class: ant (is a file, not the folder of the class)",
        "val: passed over 1 file beside the class folders: ant",
    ),
    "file in train": (
        lambda d: file_in_place(d / "train/ant"), "val/ant: is not a class of train/; fix or",
        "val: left out 1 folder: ant (is not a class of train/)",
        "train: passed over 1 file beside the class folders: ant",
    ),
    "other files only": (
        lambda d: emptied(d / "train/ant"), "train/ant: contains no images, but 2 files of other kinds: .heic 2; fix",
        "train: left out 1 folder: ant (contains no images, but 2 files of other kinds: .heic 2)",
        "train: passed over 2 files of other kinds: .heic 2; first ant/ant_0.heic",
    ),
    "loop": (
        lambda d: loop(d / "train/ant"), "train/ant/again: leads to a folder that it lies in; fix or",
        "train: left out 1 link: ant/again (leads to a folder that it lies in)", "",
    ),
    "another case": (
        lambda d: (d / "val/ant").rename(d / "val/Ant"),
        "val/Ant: is not a class of train/, which has 'ant' and not 'Ant' (the first of 2 such problems); fix or",
        "val: left out 1 folder: Ant (is not a class of train/, which has 'ant' and not 'Ant')",
        "val: left out 1 class: ant (is missing, a class of train/)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_class_is_never_dropped_silently(folder: Path, problem: str) -> None:
    change, message, first, second = PROBLEMS[problem]
    change(folder)
    assert error(folder).startswith(message)
    found = notes(folder)
    assert {first, second} - {""} == set(found)


def test_unicode_forms_and_cases(folder: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for split in ("train", "val"):
        (folder / split / "ant").rename(folder / split / composed)
    (folder / "val" / composed).rename(folder / "val" / decomposed)
    assert error(folder).startswith(
        rf"val/{decomposed}: is not a class of train/, which has 'caf\xe9' and not 'cafe\u0301' (the first of 2 such"
    )
    shutil.copytree(folder / "train" / composed, folder / "train" / decomposed)
    assert error(folder) == (
        r"train: the classes 'cafe\u0301' and 'caf\xe9' differ only by their unicode form; merge or rename them"
    )
    shutil.rmtree(folder / "train" / decomposed)
    (folder / "val" / decomposed).rename(folder / "val" / composed)
    for split in ("train", "val"):
        shutil.copytree(folder / split / "bee", folder / split / "Bee")
        shutil.copytree(folder / split / "bee", folder / split / "bee ")
    assert notes(folder) == ["train: classes that differ only by case or spaces are two: 'Bee' and 'bee' and 'bee '"]


def test_classes_below_the_classes_are_mentioned(folder: Path) -> None:
    for split in ("train", "val"):
        for part in ("one", "two"):
            shutil.copytree(folder / split, folder / "new" / split / part)
    assert notes(folder / "new") == [
        "train: one is one class, whose images lie in its folders ant, bee, cat; so with all classes",
        "val: one is one class, whose images lie in its folders ant, bee, cat; so with all classes",
    ]
    (folder / "new/train/two/ant/ant_0.png").rename(folder / "new/train/two/ant_0.png")
    assert [note for note in notes(folder / "new") if note.startswith("train")] == []


def test_all_are_counted_and_five_are_named(folder: Path) -> None:
    for number in range(7):
        (folder / f"train/none{number}").mkdir()
        (folder / f"train/ant/{number}.png").write_bytes(b"")
    empty, files = [note for note in notes(folder) if note.startswith("train")]
    assert (
        empty
        == "train: left out 7 folders: "
        + ", ".join(f"none{number} (contains no images)" for number in range(5))
        + " and 2 more"
    )
    assert files.startswith("train: left out 7 files: ant/0.png (the file is empty), ant/1.png")
    assert files.endswith("ant/4.png (the file is empty) and 2 more")
    assert error(folder).startswith("train/none0: contains no images (the first of 7 such problems); fix")


def test_names_that_are_not_utf_8_can_be_printed(folder: Path) -> None:
    root = folder.parent / CAFE
    folder.rename(root)
    for split in ("train", "val"):
        (root / split / "ant").rename(root / split / CAFE)
    for name in ("0.png", "new\nline.png", os.fsdecode(b"\xff.png")):
        (root / "train" / CAFE / name).write_bytes(b"junk")
    (root / "train" / CAFE / os.fsdecode(b"\xe9.txt")).write_text("")
    (root / "train" / os.fsdecode(b"\xe9")).mkdir()
    splits = load_folder(root, size=32, skip_bad=True)
    lines = [note for split in splits for note in split.notes]
    assert len(lines) == 4
    for line in lines:
        assert line.isprintable()
        line.encode("utf-8")
    assert lines[2].startswith(
        rf"{folder.parent}/caf\xe9/train: left out 3 files: caf\xe9/0.png (not a picture that Pillow reads), "
        r"caf\xe9/new\nline.png"
    )
    assert lines[1].endswith(r"first caf\xe9/\xe9.txt")
    again = load_folder(root, size=32, skip_bad=True)
    assert again[0].notes == splits[0].notes
    with pytest.raises(UserError) as raised:
        load_folder(root)
    assert str(raised.value).startswith(rf"{folder.parent}/caf\xe9/train/\xe9: contains no images")
    shutil.rmtree(root)
    with pytest.raises(UserError) as raised:
        load_folder(root)
    assert str(raised.value).startswith(rf"{folder.parent}/caf\xe9/train: No such file")


def test_names_that_are_no_unicode_are_read(tmp_path: Path) -> None:
    for name in (CAFE, "tea"):
        write(tmp_path / "train" / name / "1.png", COLORS["ant"], (40, 40))
    listing = list_split(tmp_path / "train", class_names(tmp_path), skip_bad=False)
    assert [listing.path(index).parent.name for index in range(2)] == [CAFE, "tea"]


def test_names_in_messages() -> None:
    assert shown("a\udcff\x1b\u202eb") == r"a\xff\x1b\u202eb"
    assert few(["a"] * 5) == "a, a, a, a, a"
    assert few(["a"] * 6) == "a, a, a, a, a and 1 more"
