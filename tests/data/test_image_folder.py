"""Photographs in folders: listing, batches, and errors that name the file in one line."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from photographs import COLORS, make_folder, write
from resist.data import Photographs, Sampler, image_size_of, load, num_classes_of
from resist.data.classes import class_names
from resist.data.image_folder import MEAN, STD, read
from resist.data.listing import list_split
from resist.errors import UserError
from waits import fake_gpu


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_folder(tmp_path / "data")


def opened(folder: Path, **options: object) -> tuple[Photographs, Photographs]:
    train, held_out = load("folder", folder, **{"image_size": 32, **options})  # type: ignore[arg-type]
    assert isinstance(train, Photographs)
    assert isinstance(held_out, Photographs)
    return train, held_out


def test_what_is_listed(folder: Path) -> None:
    write(folder / "train/ant/deeper/still/z.webp", (0, 0, 0), (40, 40))
    (folder / "train/ant/.hidden.png").write_bytes(b"")
    (folder / "train/ant/notes.txt").write_text("no image")
    (folder / "train/readme.png").write_bytes(b"")
    (folder / "train/.cache").mkdir()
    train, held_out = opened(folder)
    names = [train.listing.path(i).relative_to(folder / "train").as_posix() for i in range(len(train))]
    assert names == sorted(names, key=os.fsencode)
    assert Counter(name.split("/")[0] for name in names) == {"ant": 9, "bee": 8, "cat": 8}
    assert [sorted(COLORS)[label] for label in train.listing.labels] == [name.split("/")[0] for name in names]
    assert set(held_out.listing.labels.tolist()) == {0, 1, 2}
    assert (train.num_classes, held_out.num_classes, num_classes_of("folder", folder)) == (3, 3, 3)
    assert (image_size_of("folder"), num_classes_of("imagenet")) == (224, 1000)
    assert train.notes == (
        f"{folder / 'train'}: passed over 1 file of other kinds: .txt 1; first ant/notes.txt",
        f"{folder / 'train'}: passed over 1 file beside the class folders: readme.png",
    )
    assert held_out.notes == ()


def test_files_are_sorted_by_name_in_any_folder(folder: Path, tmp_path: Path) -> None:
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    for name in sorted(names, key=lambda name: hash(str(name))):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, tmp_path / "copy" / name)
    one, other = opened(folder)[0], opened(tmp_path / "copy")[0]
    assert one.digest() == other.digest()
    assert one.listing.names.tolist() == other.listing.names.tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda train: (train / "ant/ant_0.png").rename(train / "ant/ant_x.png"),
        lambda train: (train / "ant/ant_0.png").rename(train / "bee/ant_0.png"),
        lambda train: (train / "ant/ant_0.png").unlink(),
        lambda train: (train / "ant/ant_0.png").write_bytes((train / "ant/ant_0.png").read_bytes() + b"\0"),
    ],
)
def test_the_digest_follows_names_labels_and_sizes(folder: Path, change: Callable[[Path], object]) -> None:
    before = opened(folder)[0].digest()
    os.utime(folder / "train/ant/ant_0.png", (0, 0))
    assert opened(folder)[0].digest() == before
    change(folder / "train")
    assert opened(folder)[0].digest() != before


def test_training_batches_keep_image_and_label_together(folder: Path) -> None:
    train = opened(folder)[0]
    loader = train.loader(Sampler(len(train), batch_size=12, seed=0, worker=0, workers=2))
    assert len(train) == 24
    labels: list[int] = []
    for step in range(2):
        images, own = loader.batch(step)
        assert (images.shape, images.dtype, own.dtype) == ((12, 3, 32, 32), torch.float32, torch.int64)
        assert torch.equal(images.mean(dim=(2, 3)).argmax(1), own)  # class and strongest color have the same number
        labels += own.tolist()
    assert Counter(labels) == {0: 8, 1: 8, 2: 8}


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_have_the_memory_format_that_was_asked_for(folder: Path, channels_last: bool) -> None:
    for data in opened(folder):
        data = data.to("cpu", channels_last=channels_last)
        sampler = Sampler(len(data), batch_size=3, seed=0, worker=0, workers=2)
        for images in (data.loader(sampler).batch(0)[0], next(data.batches(3, limit=1))[0]):
            assert images.is_contiguous(memory_format=torch.channels_last) is channels_last
            assert images.is_contiguous() is not channels_last


@pytest.mark.slow
def test_batches_do_not_depend_on_the_reading_processes(folder: Path) -> None:
    def batches(data_workers: int, steps: list[int]) -> list[tuple[Tensor, Tensor]]:
        sampler = Sampler(24, batch_size=7, seed=3, worker=1, workers=2, sampling="shard")
        loader = opened(folder, data_workers=data_workers)[0].loader(sampler)
        return [loader.batch(step) for step in steps]

    expected = batches(0, list(range(6)))
    for got, step in zip(batches(2, [3, 4, 5, 0]), (3, 4, 5, 0), strict=True):
        assert torch.equal(got[0], expected[step][0])
        assert torch.equal(got[1], expected[step][1])
    assert not torch.equal(expected[0][0], expected[1][0])


def test_rand_augment_is_a_function_of_seed_worker_and_step(folder: Path) -> None:
    def batch(seed: int, step: int, first: int | None = None, **options: object) -> Tensor:
        train = opened(folder, **options)[0]
        loader = train.loader(Sampler(len(train), batch_size=6, seed=seed, worker=0, workers=2))
        if first is not None:
            loader.batch(first)
        return loader.batch(step)[0]

    once = batch(0, 2, rand_augment=(2, 9))
    torch.manual_seed(7)
    assert torch.equal(batch(0, 2, first=0, rand_augment=(2, 9)), once)
    assert not torch.equal(batch(0, 2, rand_augment=(1, 30)), once)
    assert not torch.equal(batch(0, 2), once)
    assert not torch.equal(batch(1, 2, rand_augment=(2, 9)), once)
    held_out = next(opened(folder, rand_augment=(2, 9))[1].batches(4))
    assert torch.equal(held_out[0], next(opened(folder)[1].batches(4))[0])  # tests are not augmented


@pytest.mark.slow  # the first use of fake tensors takes seconds
def test_no_batch_waits_for_a_gpu(folder: Path) -> None:
    """Images and labels are copied from pinned memory, and nothing else is copied but once."""
    data = opened(folder)[0].to("cuda", channels_last=True)
    assert data._pinned
    with fake_gpu() as waits:
        batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
        data.on_device(batch)
        waits.clear()
        images, labels = data.on_device(batch)
        assert {images.device.type, labels.device.type} == {"cuda"}
        assert (waits.found, waits.copies) == ([], 2)


@pytest.mark.parametrize("data_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_test_image_comes_once_as_torchvision_cuts_it(folder: Path, data_workers: int) -> None:
    _, held_out = opened(folder, data_workers=data_workers)
    batches = list(held_out.batches(4))
    assert [len(labels) for _, labels in batches] == [4, 5]  # a last batch of one joins the one before it
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    usual = v2.Compose(
        [v2.Resize(37), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )
    expected = torch.stack([usual(read(held_out.listing.path(i))) for i in range(9)])
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected, rtol=1e-5, atol=1e-5)
    assert [len(labels) for _, labels in held_out.batches(4, limit=1)] == [4]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), r"the file is empty"),
    "text": (lambda path: path.write_text("<html>not found</html>"), r"not a picture that Pillow reads"),
    "cut": (cut, r"cannot be read \(.*\)"),
    "noise": (
        lambda path: path.write_bytes(path.read_bytes()[:20] + bytes(range(200))),
        r"(cannot be|not a picture).*",
    ),
}


@pytest.mark.parametrize("damage", UNREADABLE)
@pytest.mark.parametrize("file", ["ant_1.JPEG", "ant_2.png"])
def test_a_file_that_cannot_be_read_is_named(folder: Path, damage: str, file: str) -> None:
    path = folder / "train/ant" / file
    make_bad, reason = UNREADABLE[damage]
    make_bad(path)
    with pytest.raises(UserError, match=rf"^{path}: {reason}; fix or delete it, or give `skip_bad_files`$"):
        read(path)
    loader = opened(folder)[0].loader(Sampler(24, batch_size=24, seed=0, worker=0, workers=1))
    with pytest.raises(UserError, match=rf"^{path}: "):
        loader.batch(0)


@pytest.mark.parametrize("data_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_files_are_left_out_and_counted(folder: Path, caplog: pytest.LogCaptureFixture, data_workers: int) -> None:
    cut(folder / "train/bee/bee_3.JPEG")
    (folder / "train/cat/cat_0.png").write_bytes(b"")
    (folder / "train/dog").mkdir()
    write(folder / "val/elk/0.png", (0, 0, 0), (40, 40))
    train, held_out = opened(folder, skip_bad_files=True, data_workers=data_workers)
    assert (len(train), len(held_out), train.num_classes) == (22, 9, 4)
    missing = [note.partition(" (cannot")[0] for note in train.notes]
    assert missing == [
        f"{folder / 'train'}: left out 1 folder: dog (contains no images)",
        f"{folder / 'train'}: left out 2 files: bee/bee_3.JPEG",
    ]
    assert train.notes[1].endswith(", cat/cat_0.png (the file is empty)")
    assert held_out.notes == (
        f"{folder / 'val'}: left out 1 folder: elk (is not a class of train/)",
        f"{folder / 'val'}: left out 1 class: dog (is missing, a class of train/)",
    )
    batches = train.loader(Sampler(len(train), batch_size=11, seed=0, worker=0, workers=1))
    assert sum(len(batches.batch(step)[1]) for step in range(2)) == 22
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "reading all 24 files once to find those that cannot be read" in caplog.text
    caplog.clear()
    again = opened(folder, skip_bad_files=True)[0]
    assert (again.digest(), again.notes, caplog.text) == (train.digest(), train.notes, "")
    write(folder / "train/cat/cat_0.png", COLORS["cat"], (40, 40))
    assert len(opened(folder, skip_bad_files=True)[0]) == 23


def test_what_was_found_is_looked_for_again_where_it_cannot_be_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(folder / "train/bee/bee_3.JPEG")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert len(opened(folder, skip_bad_files=True)[0]) == 23


def test_all_of_a_class_may_be_bad_but_not_all_files(folder: Path) -> None:
    for path in (folder / "val").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"^{folder / 'val'}: contains no image that can be read$"):
        opened(folder, skip_bad_files=True)
    write(folder / "val/cat/new.png", COLORS["cat"], (40, 40))
    assert opened(folder, skip_bad_files=True)[1].listing.labels.tolist() == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: shutil.rmtree(d), "/train: No such file or directory; `data_dir` has to contain train/CLASS/* and"),
        (lambda d: shutil.rmtree(d / "train"), "/train: No such file or directory; the folders here are val; `data"),
        (lambda d: shutil.rmtree(d / "val"), "/val: No such file or directory; `data_dir` has to contain"),
        (
            lambda d: [shutil.rmtree(p) for p in (d / "train").iterdir()],
            "/train: contains no class folders; `data",
        ),
        (lambda d: [shutil.rmtree(p) for p in (d / "val").iterdir()], "/val: contains no images in class folders"),
        (lambda d: (d / "train/dog").mkdir(), "/train/dog: contains no images; fix or delete it, or give `skip"),
        (lambda d: (d / "val/dog").mkdir(), "/val/dog: is not a class of train/; fix or delete it, or give `skip"),
        (lambda d: shutil.rmtree(d / "train/bee"), "/val/bee: is not a class of train/; fix or delete it"),
    ],
)
def test_folders_that_are_wrong_are_named(folder: Path, change: Callable[[Path], object], message: str) -> None:
    change(folder)
    with pytest.raises(UserError) as raised:
        opened(folder)
    assert str(raised.value).startswith(f"{folder}{message}")
    assert "\n" not in str(raised.value)


def test_imagenet_has_a_thousand_classes(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"^{folder / 'train'}: has 3 class folders, ImageNet 1,000; give `data=fold"):
        load("imagenet", folder)


def test_a_large_listing_is_small(tmp_path: Path) -> None:
    """Arrays that processes share, not a Python object for each file."""
    root = make_folder(tmp_path)
    listing = list_split(root / "train", class_names(root), skip_bad=False)
    for part in (listing.names, listing.labels, listing.sizes):
        assert isinstance(part, np.ndarray)
        assert part.dtype != object
