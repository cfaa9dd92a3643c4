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
from resist.data.annotation import CLASSES, MAX_BYTES, parse, read_annotation
from resist.data.loader import Stream
from resist.data.sampler import Sampler
from resist.data.voc import LONGER, fitted, load_voc, longer, mirrored
from resist.errors import UserError
from resist.tasks.detection import collate

pytestmark = pytest.mark.slow

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
    "no width": (with_object(BOX.format(5, 1, 5, 5)), "object 1 (bus) has the box 5 1 5 5, which has no area"),
    "upside down": (with_object(BOX.format(1, 9, 5, 5)), "has no area"),
    "right of it": (with_object(BOX.format(1, 1, 99, 5)), "1 1 99 5, which exceeds the picture of 96 x 72 pixels"),
    "wholly outside": (with_object(BOX.format(97, 1, 97.5, 5)), "exceeds the picture"),
    "above it": (with_object(BOX.format(1, -3, 9, 5)), "exceeds the picture"),
    "no numbers": (with_object(BOX.format("a", 1, 9, 5)), "has the box a 1 9 5, not four numbers"),
    "not finite": (with_object(BOX.format("nan", 1, "inf", 5)), "not four numbers"),
    "no box": ("<annotation><object><name>bus</name></object></annotation>", "has the box - - - -, not four numbers"),
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
    assert message.endswith("`skip_bad_files`")
    assert "\n" not in message
    train, test = load_voc("voc2007", kit, image_size=36, skip_bad_files=True)
    assert len(train) == len(test) == 3
    headline, error = train.notes
    assert headline == f"{base(kit) / 'ImageSets' / 'Main' / 'trainval.txt'}: left out 1 photograph:"
    assert message.startswith(error)


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
    assert (len(train), len(train.skipped)) == (3, 2)


def test_a_photograph_that_is_cut_is_found_when_decoded_or_before_when_skipping(kit) -> None:
    file = base(kit) / "JPEGImages" / "000003.jpg"
    file.write_bytes(file.read_bytes()[:-400])
    train, _ = load_voc("voc2007", kit, image_size=36)
    with pytest.raises(UserError, match="cannot be read") as raised:
        train[2, 0]
    assert str(raised.value).startswith(f"{file}: ")
    train, _ = load_voc("voc2007", kit, image_size=36, skip_bad_files=True)
    assert (len(train), len(train.skipped)) == (3, 2)
    assert [train[index, 0][0].shape for index in range(3)] == [(3, 36, 48)] * 3


def test_nothing_is_left(kit) -> None:
    for file in (base(kit) / "JPEGImages").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="none of its 4 photographs can be used; first, ") as raised:
        load_voc("voc2007", kit, skip_bad_files=True)
    assert str(raised.value).startswith(str(base(kit) / "ImageSets" / "Main" / "trainval.txt"))


WIDE = "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
TEMPLATE = (
    "<annotation>{size}<object><name>bus</name>{difficult}<bndbox>" + WIDE + "</bndbox></object>{more}</annotation>"
)


def annotated(kit: Path, *, size: str = "", difficult: str = "", more: str = "") -> Path:
    """The annotation of photograph 000003, of a bus and `more`."""
    file = base(kit) / "Annotations" / "000003.xml"
    file.write_text(TEMPLATE.format(size=size, difficult=difficult, more=more))
    return file


def sized(width: str, height: str) -> str:
    return f"<size><width>{width}</width><height>{height}</height></size>"


@pytest.mark.parametrize("size", ["", sized("0", "0"), sized("96.0", "72.00"), sized(" 96 ", ""), sized("", "72"),
                                  sized("0", "72"), "<size/>", sized("9.6e1", "+72")])  # fmt: skip
def test_a_size_that_is_written_otherwise_is_a_size(kit, size: str) -> None:
    assert len(read_annotation(annotated(kit, size=size), 96, 72).boxes) == 1


@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        (sized("95", "72"), "95 x 72 pixels; the picture has 96 x 72"),
        (sized("96.5", "72"), "96.5 x 72 pixels; the picture has 96 x 72"),
        (sized("72", "96"), "72 x 96 pixels, as after a rotation by EXIF; the picture has 96 x 72"),
        (sized("wide", "72"), "wide x 72 pixels; the picture"),
        (sized("9_6", "72"), "9_6 x 72 pixels; the picture"),
        (sized("nan", "nan"), "nan x nan pixels; the picture"),
        (sized("-96", "72"), "-96 x 72 pixels; the picture"),
    ],
)
def test_another_size_is_another_picture(kit, size: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"000003\.xml: describes a picture of {complaint}"):
        read_annotation(annotated(kit, size=size), 96, 72)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", False), ("1", True), ("", False), ("true", True), ("False", False), ("1.0", True), ("0.0", False),
     (" 1 ", True), ("YES", True)],
)  # fmt: skip
def test_marks_of_difficult_objects(kit, text: str, expected: bool) -> None:
    file = annotated(kit, difficult=f"<difficult>{text}</difficult>")
    assert read_annotation(file, 96, 72).difficult.tolist() == [expected]


@pytest.mark.parametrize("text", ["2", "-1", "0.5", "nan", "maybe", "Unspecified", "1_0", "1,0"])
def test_other_marks_are_named(kit, text: str) -> None:
    file = annotated(kit, difficult=f"<difficult>{text}</difficult>")
    with pytest.raises(ValueError, match=rf"^{file}: object 1 \(bus\) has '{text}' for difficult, not 0 or 1$"):
        read_annotation(file, 96, 72)


def test_a_bad_object_is_left_out_and_not_its_neighbors(kit) -> None:
    bad = [BOX.format(5, 5, 5, 9), BOX.format(50, 50, 120, 60), BOX.format("a", 1, 2, 3)]
    more = "".join(f"<object><name>boat</name><bndbox>{box}</bndbox></object>" for box in bad)
    file = annotated(kit, more=more + "<object><name>unicorn</name><bndbox>" + WIDE + "</bndbox></object>")
    with pytest.raises(UserError, match=rf"^{file}: object 2 \(boat\) has the box 5 5 5 9, which has no area; fix or"):
        load_voc("voc2007", kit)
    train, _ = load_voc("voc2007", kit, skip_bad_files=True)
    assert len(train) == 4
    assert [CLASSES[label - 1] for label in train.photographs[2].objects.labels.tolist()] == ["bus"]
    assert train.notes[0].endswith("trainval.txt: left out 4 objects:")
    assert [note.removeprefix(f"{file}: object ")[:6] for note in train.notes[1:]] == [
        "2 (boa",
        "3 (boa",
        "4 (boa",
        "5 has ",
    ]


def test_five_of_many_are_named(kit) -> None:
    more = f"<object><name>boat</name><bndbox>{BOX.format(5, 5, 5, 9)}</bndbox></object>" * 7
    annotated(kit, more=more)
    train, _ = load_voc("voc2007", kit, skip_bad_files=True)
    assert train.notes[0].endswith("left out 7 objects, the first 5:")
    assert len(train.notes) == 6


def test_a_photograph_without_a_usable_object_is_left_out(kit) -> None:
    """It would teach the detector that nothing is there."""
    file = base(kit) / "Annotations" / "000003.xml"
    file.write_text(with_object(BOX.format(5, 1, 5, 5)))
    assert len(load_voc("voc2007", kit, skip_bad_files=True)[0]) == 3
    file.write_text("<annotation/>")
    assert len(load_voc("voc2007", kit, skip_bad_files=True)[0]) == 4


def test_photographs_of_other_suffixes_are_found(kit) -> None:
    file = base(kit) / "JPEGImages" / "000001.jpg"
    for name in ("000001.JPG", "000001.jpeg", "000001.png"):
        file = file.rename(file.with_name(name))
        assert load_voc("voc2007", kit)[0].photographs[0].file == file


def declared(encoding: str) -> str:
    return f'<?xml version="1.0" encoding="{encoding}"?>\n'


TEXTS = {
    **dict.fromkeys(["GBK", "gb2312", "cp936", "gb18030", "Big5", "Shift_JIS", "EUC-JP", "ISO-2022-JP"], "中文"),
    **dict.fromkeys(["UTF-8", "utf8", "utf-8-sig", "UTF-7"], "中文"),
    **dict.fromkeys(["windows-1251", "koi8-r"], "папка"),
    "iso-8859-1": "dossi\xe9r",
    "ascii": "folder",
    "euc-kr": "폴더",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_annotations_in_any_encoding(kit, encoding: str) -> None:
    folder = TEXTS[encoding]
    content = declared(encoding) + TEMPLATE.format(size=f"<folder>{folder}</folder>", difficult="", more="")
    file = annotated(kit)
    file.write_bytes(content.encode(encoding))
    assert parse(file).findtext("folder") == folder
    for codec in (encoding, "utf-8"):  # as declared, or not
        file.write_bytes(content.encode(codec))
        assert len(read_annotation(file, 96, 72).boxes) == 1


@pytest.mark.parametrize(
    "encoding", ["utf8mb4", "ANSI", "unicode", "UTF-16", "UTF-32", "ebcdic", "cp037", "hex", "rot13", "zip", "idna",
                 "undefined", "unicode_escape", "../x", "x" * 60, "mbcs"],
)  # fmt: skip
def test_encodings_that_do_not_exist_or_are_not_meant(kit, encoding: str) -> None:
    content, file = (
        declared(encoding) + TEMPLATE.format(size="<folder>図</folder>", difficult="", more=""),
        annotated(kit),
    )
    for text in (content, content.replace("図", "x")):
        file.write_bytes(text.encode())
        assert len(read_annotation(file, 96, 72).boxes) == 1
    file.write_bytes(content.encode("shift_jis"))
    with pytest.raises(
        ValueError, match=rf"^{file}: declares the encoding '{encoding}'.* nor in UTF-8 \(byte \d+\); save"
    ):
        read_annotation(file, 96, 72)


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("head", ["", declared("UTF-16"), declared("UTF-8"), declared("GBK")])
def test_byte_order_marks_and_texts_of_two_bytes(kit, encoding: str, head: str) -> None:
    file = annotated(kit)
    content = (head + TEMPLATE.format(size="<folder>図</folder>", difficult="", more="")).encode(encoding)
    file.write_bytes(content)
    assert len(read_annotation(file, 96, 72).boxes) == 1
    file.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=rf"^{file}: "):
        read_annotation(file, 96, 72)


def test_a_text_that_is_not_in_utf_8_and_declares_nothing(kit) -> None:
    file = annotated(kit, size="<folder>図</folder>")
    file.write_bytes(file.read_text().encode("gbk"))
    with pytest.raises(
        ValueError, match=r"is not UTF-8, and declares no other encoding \(byte 21\); save it as UTF-8$"
    ):
        read_annotation(file, 96, 72)
    train, _ = load_voc("voc2007", kit, skip_bad_files=True)
    assert len(train) == 3


@settings(max_examples=100)
@given(encoding=st.text(st.characters(exclude_characters="<>\"'"), max_size=70), body=st.binary(max_size=60))
def test_whatever_a_file_declares_it_is_read_or_named(tmp_path_factory, encoding: str, body: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "declares.xml"
    file.write_bytes(declared(encoding).encode("utf-8", "surrogatepass") + b"<annotation>" + body + b"</annotation>")
    try:
        read_annotation(file, 96, 72)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ")
        assert "\n" not in str(error)
        assert str(error).isprintable() or "mismatched" in str(error)


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
    with pytest.raises(UserError, match=r"unknown\.txt: not found; give `splits` two of small, test, trainval"):
        load_voc("voc2007", kit, splits=("small", "unknown"))
    with pytest.raises(UserError, match="`splits=small`; give two names"):
        load_voc("voc2007", kit, splits=("small",))
    with pytest.raises(UserError, match="`image_size=5` is too small"):
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
