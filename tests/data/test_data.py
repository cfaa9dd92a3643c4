"""Data sets: batches are a function of (seed, worker, step), no image is lost, missing files are named."""

import hashlib
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist.data import Images, Loader, Sampler, load
from resist.data.datasets import num_classes_of
from resist.data.in_memory import mirror, shift
from resist.data.sampler import generator
from resist.errors import UserError
from waits import fake_gpu


def numbered(num: int, pad: int = 0, flip: bool = False) -> Images:
    """Image i is filled with i."""
    images = torch.arange(num, dtype=torch.uint8)[:, None, None, None].expand(num, 3, 4, 4).contiguous()
    return Images(images, torch.arange(num) % 10, 10, (0.0,) * 3, (1 / 255,) * 3, pad, flip)


def sampler(num: int = 23, **options: object) -> Sampler:
    settings = {"batch_size": 5, "seed": 0, "worker": 0, "workers": 3, **options}
    return Sampler(num, **settings)  # type: ignore[arg-type]


def loader(*, augment: bool = True, **options: object) -> Loader:
    return Loader(numbered(23, pad=1, flip=True), sampler(**options), augment=augment)  # type: ignore[arg-type]


def test_batches_depend_on_seed_worker_and_step_alone() -> None:
    first = loader()
    in_order = [first.batch(step) for step in range(12)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    other = loader()
    for step in (11, 0, 7, 3, 11):
        images, labels = other.batch(step)
        assert torch.equal(images, in_order[step][0])
        assert torch.equal(labels, in_order[step][1])
    assert torch.equal(torch.get_rng_state(), before)
    for changed in (loader(seed=1), loader(worker=1)):
        assert not torch.equal(changed.batch(0)[0], in_order[0][0])
    assert not torch.equal(loader().batch(1)[0], in_order[0][0])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3), st.sampled_from(["all", "shard"]), st.integers(1, 4))
def test_every_image_comes_once_an_epoch(num: int, size: int, worker: int, sampling: str, workers: int) -> None:
    own = len(range(worker % workers, num, workers)) if sampling == "shard" else num
    if not 1 <= size <= own:
        return
    images = sampler(num, batch_size=size, worker=worker % workers, workers=workers, sampling=sampling)
    assert images.images_per_epoch == own
    drawn = torch.cat([images.indices(step) for step in range(3 * own // size + 1)])
    assert all(len(images.indices(step)) == size for step in range(3))
    for epoch in range(3):
        seen = Counter(drawn[epoch * own : (epoch + 1) * own].tolist())
        assert set(seen.values()) == {1}
        assert len(seen) == own


@given(st.integers(4, 60), st.integers(1, 4), st.integers(0, 99))
def test_shards_are_disjoint_complete_and_even(num: int, workers: int, seed: int) -> None:
    shards = [
        set(
            sampler(
                num, batch_size=num // workers, seed=seed, worker=w, workers=workers, sampling="shard"
            ).pool.tolist()
        )
        for w in range(workers)
    ]
    assert sum(len(shard) for shard in shards) == num
    assert set().union(*shards) == set(range(num))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_images_and_labels_stay_together() -> None:
    images, labels = loader(augment=False).batch(2)
    assert torch.equal(images[:, 0, 0, 0].round().long() % 10, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"`batch_size=0` is outside 1 to 23, the images that a worker draws from"),
        ({"batch_size": 24}, r"`batch_size=24` is outside 1 to 23"),
        ({"batch_size": 9, "sampling": "shard"}, r"`batch_size=9` is outside 1 to 8"),
        ({"sampling": "some"}, r"`sampling='some'` is not one of all, shard"),
    ],
)
def test_what_a_sampler_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler(**options)


def test_shift_by_hand() -> None:
    """A 3x3 image moved by at most one pixel is a window of the image with a black border of one."""
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    border = torch.nn.functional.pad(image, (1, 1, 1, 1))[0, 0]
    places = [(row, column) for row in range(3) for column in range(3)]
    moved = shift(image.expand(9, 2, 3, 3).contiguous(), 1, torch.tensor(places).T)
    assert (moved.dtype, moved.shape) == (torch.uint8, (9, 2, 3, 3))
    for (row, column), one in zip(places, moved, strict=True):
        assert torch.equal(one[0], border[row : row + 3, column : column + 3])
    assert torch.equal(moved[:, 0], moved[:, 1])  # the same in all channels


def test_mirror_by_hand() -> None:
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).view(1, 1, 2, 2)
    out = mirror(image.expand(2, 1, 2, 2), torch.tensor([0, 1]))[:, 0]
    assert out.tolist() == [[[1, 2], [3, 4]], [[2, 1], [4, 3]]]


def colored(pad: int, flip: bool, *, num: int = 40, dtype: torch.dtype = torch.uint8) -> Images:
    pixels = torch.randint(0, 256, (num, 3, 6, 8), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return Images(pixels.to(dtype), torch.arange(num) % 7, 7, (0.49, 0.48, 0.44), (0.2, 0.25, 0.3), pad, flip)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("pad", "flip"), [(0, False), (2, False), (0, True), (3, True)])
def test_a_batch_is_cut_mirrored_and_normalized_as_by_hand(pad: int, flip: bool, channels_last: bool) -> None:
    """Bit for bit: the draws of (seed, worker, step), applied to one image after the other."""
    data = colored(pad, flip).to("cpu", channels_last=channels_last)
    own = Sampler(len(data), batch_size=16, seed=3, worker=1, workers=2)
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (data.mean, data.std))
    for step in (0, 4):
        random = generator("augment", 3, 1, step)
        places = torch.randint(0, 2 * pad + 1, (2, 16), generator=random).T.tolist() if pad else [[0, 0]] * 16
        mirrored = (torch.rand(16, generator=random) < 0.5).tolist() if flip else [False] * 16
        expected = []
        for index, (row, column), flipped in zip(own.indices(step), places, mirrored, strict=True):
            image = torch.nn.functional.pad(data.images[index], (pad,) * 4)[:, row : row + 6, column : column + 8]
            expected.append(((image.flip(2) if flipped else image).float() - mean) / std)
        images, labels = data.loader(own).batch(step)
        assert torch.equal(images, torch.stack(expected))
        assert torch.equal(labels, data.labels[own.indices(step)])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("pad", "flip"), [(0, False), (2, True)])
def test_batches_have_the_memory_format_that_was_asked_for(pad: int, flip: bool, channels_last: bool) -> None:
    data = colored(pad, flip).to("cpu", channels_last=channels_last)
    own = Sampler(len(data), batch_size=16, seed=3, worker=1, workers=2)
    form, other = (torch.channels_last, torch.contiguous_format)[:: 1 if channels_last else -1]
    for images in (data.loader(own).batch(0)[0], next(data.batches(16))[0], next(data.to("cpu").batches(16))[0]):
        assert images.is_contiguous(memory_format=form)
        assert not images.is_contiguous(memory_format=other)
    assert next(colored(pad, flip).batches(16))[0].is_contiguous(memory_format=torch.channels_last)  # the default


def test_images_stay_as_they_are() -> None:
    """Also those that are float32 already, which normalizing does not have to convert."""
    data = colored(0, False, dtype=torch.float32)
    before = data.images.clone()
    for _ in range(2):
        images = torch.cat([images for images, _ in data.batches(16)])
        assert torch.equal(data.images, before)
        assert images.mean().abs() < 1


@pytest.mark.slow  # the first use of fake tensors takes seconds
@pytest.mark.parametrize(("pad", "flip"), [(0, False), (2, True)])
def test_a_batch_does_not_wait_for_a_gpu(pad: int, flip: bool) -> None:
    with fake_gpu() as waits:
        data = colored(pad, flip).to("cuda", channels_last=True)
        loader = data.loader(Sampler(len(data), batch_size=16, seed=3, worker=1, workers=2))
        loader.batch(0)  # mean and spread go to the device once
        waits.clear()
        images, labels = loader.batch(1)
        next(data.batches(16))
        assert {images.device.type, labels.device.type} == {"cuda"}
        assert (waits.found, waits.copies, waits.pinned) == ([], 1, 1)


def test_evaluation_batches_cover_the_set_in_order() -> None:
    data = numbered(10)
    assert [labels.tolist() for _, labels in data.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(list(data.batches(4, limit=2))) == 2
    assert len(list(data.batches(4, limit=99))) == 3
    images, _ = next(data.batches(10))
    assert torch.equal(images[:, 0, 0, 0].round(), torch.arange(10.0))


def test_digits() -> None:
    train, test = load("digits")
    assert (len(train), len(test), train.images.shape[1:]) == (1437, 360, (3, 16, 16))
    assert (train.flip, train.num_classes, num_classes_of("digits")) == (False, 10, 10)
    pixels = train.normalize(train.images)
    assert abs(pixels.mean().item()) < 1e-3
    assert abs(pixels.std().item() - 1) < 1e-3


def test_synthetic_images_bear_their_class() -> None:
    train, test = load("synthetic")
    assert (len(train), len(test)) == (2048, 512)
    assert torch.equal(load("synthetic")[0].images, train.images)
    means = torch.stack([train.images[train.labels == label].float().mean((0, 1, 3)) for label in range(10)])
    marked = (means - means.median(0).values).argmax(1)
    assert torch.equal(marked // 3, torch.arange(10))


def test_unknown_names() -> None:
    for function in (load, num_classes_of):
        with pytest.raises(
            UserError, match=r"`data=mnist` is not known; choose one of digits, cifar10.*voc2007 or voc2012"
        ):
            function("mnist")


CIFAR = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
}


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Path, np.ndarray]:
    """A data set in CIFAR's format with 20 training and 6 test images: its name, the archive, the training pixels
    (num, 3, 32, 32). Torchvision compares MD5 sums; here those of the files that we wrote."""
    from torchvision import datasets

    name = request.param
    dataset_class = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder, archive = CIFAR[name]
    source = tmp_path / "source" / folder
    source.mkdir(parents=True)
    random, key = np.random.default_rng(0), "labels" if name == "cifar10" else "fine_labels"
    sums: dict[str, str] = {}

    def write(file: str, content: object) -> str:
        (source / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((source / file).read_bytes()).hexdigest()

    pixels = []
    for file in [file for file, _ in dataset_class.train_list] + [file for file, _ in dataset_class.test_list]:
        num = 6 if file in ("test_batch", "test") else 20 // len(dataset_class.train_list)
        data = random.integers(0, 256, (num, 3072), dtype=np.uint8)
        pixels += [data] if num != 6 else []
        sums[file] = write(file, {"data": data, key: list(range(num))})
    meta = dataset_class.meta["filename"]
    sums[meta] = write(meta, {dataset_class.meta["key"]: [f"class {i}" for i in range(num_classes_of(name))]})
    with tarfile.open(tmp_path / archive, "w:gz") as tar:
        tar.add(source, folder)
    monkeypatch.setattr(dataset_class, "train_list", [[file, sums[file]] for file, _ in dataset_class.train_list])
    monkeypatch.setattr(dataset_class, "test_list", [[file, sums[file]] for file, _ in dataset_class.test_list])
    monkeypatch.setattr(dataset_class, "meta", {**dataset_class.meta, "md5": sums[meta]})
    return name, tmp_path / archive, np.concatenate(pixels).reshape(-1, 3, 32, 32)


def unpack(archive: Path, into: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")


def test_cifar_from_its_files(cifar: tuple[str, Path, np.ndarray], tmp_path: Path) -> None:
    name, archive, pixels = cifar
    unpack(archive, tmp_path / "data")
    train, test = load(name, tmp_path / "data", download=False)
    assert np.array_equal(train.images.numpy(), pixels)
    assert train.images.is_contiguous()
    assert len(test) == 6
    assert test.labels.tolist() == list(range(6))
    assert (train.num_classes, train.pad, train.flip) == (num_classes_of(name), 4, True)


def test_cifar_is_downloaded_when_missing(
    cifar: tuple[str, Path, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, archive, pixels = cifar
    roots: list[Path] = []

    def download(url: str, root: Path, **options: object) -> None:
        roots.append(Path(root))
        unpack(archive, Path(root))

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    train, _ = load(name, tmp_path / "new" / "data")
    assert len(train) == len(pixels)
    assert roots == [tmp_path / "new" / "data"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_cifar_that_is_not_to_be_had(
    cifar: tuple[str, Path, np.ndarray], damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, archive, _ = cifar
    folder, file = CIFAR[name]
    where = tmp_path / "data"
    if damage == "cut short":
        unpack(archive, where)
        victim = sorted((where / folder).iterdir())[-1]
        victim.write_bytes(victim.read_bytes()[:100])

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no route to host\nand more lines")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    for download, reason in ((False, "downloading is off"), (True, "no route to host")):
        with pytest.raises(UserError) as raised:
            load(name, where, download=download)
        assert str(raised.value) == (
            f"`data={name}` is not complete below {where} and cannot be downloaded ({reason}); "
            f"put the files of {file} into {where / folder}"
        )
