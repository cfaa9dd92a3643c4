import os
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import voc as torchvision_voc

import vockit
from resist.data.annotation import CLASSES, MAX_BYTES, read_annotation
from resist.data.loader import Stream
from resist.data.sampler import Sampler
from resist.data.voc import LONGER, fitted, load_voc, longer, mirrored
from resist.errors import UserError
from resist.tasks.detection import collate

A = (10, 20, 40, 60)


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    vockit.draw(tmp_path)
    return tmp_path


def base(kit: Path) -> Path:
    return kit / "VOCdevkit" / "VOC2007"


def test_boxes_begin_at_the_first_pixel(kit) -> None:
    vockit.write(kit, "000001", [("bus", A, False), ("boat", (0, 0, 96, 72), True)])
    train, test = load_voc("voc2007", kit, image_size=72, download=False)
    objects = train.photographs[0].objects
    assert objects.boxes.tolist() == [[10, 20, 40, 60], [0, 0, 96, 72]]
    assert [CLASSES[label - 1] for label in objects.labels.tolist()] == ["bus", "boat"]
    assert objects.difficult.tolist() == [False, True]
    assert len(train[0, 0][1]) == 1  # difficult objects are not trained on
    image, boxes, labels, difficult, _ = test[0, 0]
    assert image.shape == (3, 72, 96)
    assert boxes.tolist() == objects.boxes.tolist()
    assert labels.tolist() == objects.labels.tolist()
    assert difficult.tolist() == [False, True]


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(32, 900))
def test_a_picture_is_brought_to_its_size_on_one_side_and_not_over_it(width: int, height: int, size: int) -> None:
    new = fitted(width, height, size)
    assert min(new) == size or max(new) == longer(size)
    assert min(new) <= size
    assert max(new) <= longer(size) <= LONGER * size


@given(st.floats(0, 40), st.floats(50, 90))
def test_the_mirror_image_of_a_mirror_image_is_the_picture(left: float, right: float) -> None:
    boxes = torch.tensor([[left, 3.0, right, 4.0]])
    torch.testing.assert_close(mirrored(mirrored(boxes, 96), 96), boxes)
    assert (mirrored(boxes, 96)[:, 2] > mirrored(boxes, 96)[:, 0]).all()


@pytest.mark.parametrize("size", [36, 72, 100])
def test_boxes_stay_around_their_objects(tmp_path, size: int) -> None:
    """Red within the box and nowhere else, mirrored or not, at any size."""
    vockit.write(tmp_path, "one", [("bus", A, False)])
    vockit.list_set(tmp_path, "trainval", ["one"])
    vockit.list_set(tmp_path, "test", ["one"])
    train, _ = load_voc("voc2007", tmp_path, image_size=size, download=False)
    seen = set()
    for seed in range(8):
        image, boxes, *_ = train[0, seed]
        left, top, right, bottom = boxes[0].tolist()
        y, x = ((image[0].float() - image[1:].float().amax(0)) > 60).nonzero().unbind(1)
        found = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert [float(v) for v in found] == pytest.approx([left, top, right, bottom], abs=1.0)
        seen.add(round(left))
        torch.testing.assert_close(train[0, seed][0], image)  # the same seed, the same picture
    assert len(seen) == 2


def test_a_stream_of_photographs_does_not_depend_on_who_reads(kit) -> None:
    train, _ = load_voc("voc2007", kit, image_size=36, download=False)
    sampler = Sampler(len(train), batch_size=3, seed=1, worker=0, workers=2)
    streams = [Stream(train, sampler, num_data_workers=number, collate=collate) for number in (0, 1)]
    for step in (0, 1, 5):
        (images, targets, seeds), (same, too, also) = (stream.batch(step) for stream in streams)
        torch.testing.assert_close(images, same)
        torch.testing.assert_close(targets, too)
        assert seeds == also
    for stream in streams:
        stream.close()


def test_the_digest_sees_a_single_box(kit) -> None:
    before = load_voc("voc2007", kit)[0].digest()
    assert before == load_voc("voc2007", kit)[0].digest()
    file = base(kit) / "Annotations" / "000002.xml"
    file.write_text(file.read_text().replace("<xmin>59", "<xmin>60"))
    assert before != load_voc("voc2007", kit)[0].digest()


BOX = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"


def with_object(box: str, name: str = "bus") -> str:
    return f"<annotation><object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"


LAUGHS = "<!DOCTYPE a [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {chr(98 + i)} '{f'&{chr(97 + i)};' * 10}'>" for i in range(12)
)
BAD = {
    "cut": (vockit.annotation([("bus", A, False)], 96, 72)[:-30], "not complete XML"),
    "empty": ("", "not complete XML"),
    "no XML": ("once upon a time", "not complete XML"),
    "something else": ("<svg/>", "the root element is 'svg', not 'annotation'"),
    "class": (
        with_object(BOX.format(1, 1, 5, 5), "unicorn"),
        "object 1 has the class 'unicorn', which is not one of VOC's",
    ),
    "no class": (with_object(BOX.format(1, 1, 5, 5), ""), "object 1 has the class ''"),
    "no width": (with_object(BOX.format(5, 1, 5, 5)), "(bus), 5 1 5 5, has no area"),
    "upside down": (with_object(BOX.format(1, 9, 5, 5)), "has no area"),
    "right of it": (with_object(BOX.format(1, 1, 99, 5)), "1 1 99 5, exceeds the picture of 96 x 72 pixels"),
    "wholly outside": (with_object(BOX.format(97, 1, 97.5, 5)), "exceeds the picture"),
    "above it": (with_object(BOX.format(1, -3, 9, 5)), "exceeds the picture"),
    "no numbers": (with_object(BOX.format("a", 1, 9, 5)), "is a 1 9 5, not four numbers"),
    "not finite": (with_object(BOX.format("nan", 1, "inf", 5)), "not four numbers"),
    "no box": ("<annotation><object><name>bus</name></object></annotation>", "is - - - -, not four numbers"),
    "another size": (
        vockit.annotation([], 500, 375),
        "describes a picture of 500 x 375 pixels; the picture has 96",
    ),
    "expanding": (LAUGHS + "]><annotation>&m;</annotation>", "declares a document type"),
    "other files": ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
    "deep": ("<annotation>" + "<a>" * 90_000 + "</a>" * 90_000 + "</annotation>", "has elements 21 levels deep"),
    "large": ("<annotation>" + " " * MAX_BYTES + "</annotation>", "larger than 1,000,000 bytes"),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_annotation_is_named_and_can_be_skipped(kit, problem: str) -> None:
    text, complaint = BAD[problem]
    file = base(kit) / "Annotations" / "000003.xml"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        load_voc("voc2007", kit, image_size=36)
    message = str(raised.value)
    assert message.startswith(f"{file}: ")
    assert complaint in message
    assert message.endswith("--skip-bad-files")
    assert "\n" not in message
    train, test = load_voc("voc2007", kit, image_size=36, skip_bad_files=True)
    assert len(train) == len(test) == 3
    assert len(train.skipped) == len(test.skipped) == 1
    listed = base(kit) / "ImageSets" / "Main" / "trainval.txt"
    assert train.notes[0].startswith(f"{listed}: left out 1 photograph, first {file}: ")


@pytest.mark.parametrize("problem", ["missing", "empty", "no picture", "folder", "pipe", "no annotation"])
def test_a_bad_photograph_is_named_and_can_be_skipped(kit, problem: str) -> None:
    file = base(kit) / "JPEGImages" / "000003.jpg"
    if problem == "no annotation":
        file = base(kit) / "Annotations" / "000003.xml"
    file.unlink()
    if problem in ("empty", "no picture"):
        file.write_bytes(b"" if problem == "empty" else b"%PDF-1.4")
    elif problem == "folder":
        file.mkdir()
    elif problem == "pipe":
        os.mkfifo(file)  # reading it would wait for ever
    with pytest.raises(UserError) as raised:
        load_voc("voc2007", kit, image_size=36)
    assert str(raised.value).startswith(f"{file}: ")
    train, _ = load_voc("voc2007", kit, image_size=36, skip_bad_files=True)
    assert (len(train), len(train.skipped)) == (3, 1)


def test_a_photograph_that_is_cut_is_found_when_decoded_or_before_when_skipping(kit) -> None:
    file = base(kit) / "JPEGImages" / "000003.jpg"
    file.write_bytes(file.read_bytes()[:-400])
    train, _ = load_voc("voc2007", kit, image_size=36)
    with pytest.raises(UserError, match="cannot be read as a picture") as raised:
        train[2, 0]
    assert str(raised.value).startswith(f"{file}: ")
    train, _ = load_voc("voc2007", kit, image_size=36, skip_bad_files=True)
    assert (len(train), len(train.skipped)) == (3, 1)
    assert [train[index, 0][0].shape for index in range(3)] == [(3, 36, 48)] * 3


def test_nothing_is_left(kit) -> None:
    for file in (base(kit) / "JPEGImages").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="none of its 4 photographs can be used; first, ") as raised:
        load_voc("voc2007", kit, skip_bad_files=True)
    assert str(raised.value).startswith(str(base(kit) / "ImageSets" / "Main" / "trainval.txt"))


@settings(max_examples=300)
@given(st.data())
def test_whatever_a_file_holds_it_is_read_or_named(tmp_path_factory, data) -> None:
    """A valid annotation with some bytes changed, cut somewhere."""
    text = bytearray(vockit.annotation([("bus", A, False), ("sheep", (1, 2, 3, 4), True)], 96, 72).encode())
    for _ in range(data.draw(st.integers(0, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "one.xml"
    file.write_bytes(text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text)
    try:
        found = read_annotation(file, 96, 72)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ")
        assert "\n" not in str(error)
    else:
        left, top, right, bottom = found.boxes.unbind(1)
        assert ((left >= 0) & (left < right) & (right <= 96) & (top >= 0) & (top < bottom) & (bottom <= 72)).all()
        assert ((found.labels >= 1) & (found.labels <= 20)).all()


def test_a_box_that_leaves_by_a_pixel_is_cut(kit) -> None:
    file = base(kit) / "Annotations" / "000001.xml"
    file.write_text(with_object(BOX.format(0, 0, 97, 72.5)))
    assert load_voc("voc2007", kit)[0].photographs[0].objects.boxes.tolist() == [[0, 0, 96, 72]]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("", "lists no photograph"), ("\n \n", "lists no photograph"), ("../../x\n", "name 1 is '../../x'"),
     ("000001 -1\n", "name 1 is '000001 -1'")],
)  # fmt: skip
def test_a_bad_list_is_named(kit, content: str, complaint: str) -> None:
    file = base(kit) / "ImageSets" / "Main" / "trainval.txt"
    file.write_text(content)
    with pytest.raises(UserError) as raised:
        load_voc("voc2007", kit)
    assert str(raised.value).startswith(f"{file}: {complaint}")


def test_sets_are_chosen_by_name(kit) -> None:
    vockit.list_set(kit, "small", ["000002", "000004"])
    train, test = load_voc("voc2007", kit, splits=("small", "trainval"))
    assert (len(train), len(test)) == (2, 4)
    assert (train.augment, test.augment) == (True, False)
    with pytest.raises(UserError, match=r"unknown\.txt: not found; give --splits two of small, test, trainval"):
        load_voc("voc2007", kit, splits=("small", "unknown"))
    with pytest.raises(UserError, match="--splits small; give two names"):
        load_voc("voc2007", kit, splits=("small",))
    with pytest.raises(UserError, match="--image-size 5 is too small"):
        load_voc("voc2007", kit, image_size=5)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torchvision find its archives on a server here, in files that are made here."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    known = dict(torchvision_voc.DATASET_YEAR_DICT)
    for key, split, year in (("2007", "trainval", "2007"), ("2007-test", "test", "2007"), ("2012", "train", "2012")):
        made = tmp_path / key
        names = vockit.draw(made)
        root = made / "VOCdevkit" / "VOC2007"
        for file in (root / "ImageSets" / "Main").iterdir():
            file.unlink()
        vockit.list_set(made, split, names)
        if year == "2012":
            vockit.list_set(made, "val", names)
        archive = tmp_path / f"{key}.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(root, f"VOCdevkit/VOC{year}")
        digest = md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        known[key] = {**known[key], "url": url, "md5": digest}
    monkeypatch.setattr(torchvision_voc, "DATASET_YEAR_DICT", known)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore:.*extract:DeprecationWarning")  # tarfile's, of how torchvision unpacks
@pytest.mark.usefixtures("archives")
def test_missing_archives_are_downloaded_and_unpacked(tmp_path) -> None:
    for name in ("voc2007", "voc2012"):
        train, test = load_voc(name, tmp_path / "data", image_size=36)
        assert (len(train), len(test)) == (4, 4)
        again = load_voc(name, tmp_path / "data", image_size=36, download=False)
        assert again[0].digest() == train.digest()


def test_an_archive_that_cannot_be_had_says_where_files_belong(tmp_path, monkeypatch) -> None:
    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision_voc, "download_and_extract_archive", unreachable)
    with pytest.raises(UserError, match=r"trainval\.txt: not found, and cannot be downloaded") as raised:
        load_voc("voc2007", tmp_path / "data")
    assert str(raised.value).endswith(f"(no route to host); unpack the archives of VOC2007 into {tmp_path / 'data'}")
    with pytest.raises(UserError, match="downloading is off"):
        load_voc("voc2012", tmp_path / "data", download=False)
