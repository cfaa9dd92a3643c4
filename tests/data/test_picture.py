"""Pictures of every mode are read as they look, or refused by name in one line; none becomes black or white."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import vockit
from resist.data.picture import read
from resist.data.voc import load_voc
from resist.errors import UserError

RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))


def deep(scale: float, dtype: str) -> Image.Image:
    return Image.fromarray((RAMP * scale).astype(dtype))


SCALED = {
    "16 bits.png": deep(65535, "uint16"),
    "16 bits.tif": deep(65535, "uint16"),
    "16 bits.jp2": deep(65535, "uint16"),
    "16 bits.pgm": deep(65535, "uint16"),
    "big endian.tif": deep(65535, ">u2"),
    "16 bits in 32.tif": deep(65535, "int32"),
    "8 bits in 32.tif": deep(255, "int32"),
    "32 bits.tif": deep(2**31 - 1, "int32"),
    "float to 1.tif": deep(1, "float32"),
    "float to 255.tif": deep(255, "float32"),
    "float to 65535.tif": deep(65535, "float32"),
}


@pytest.mark.parametrize("name", SCALED)
def test_deep_pictures_are_scaled_by_their_range(tmp_path: Path, name: str) -> None:
    SCALED[name].save(tmp_path / name)
    found = np.array(read(tmp_path / name))
    assert found.shape == (8, 64, 3)
    np.testing.assert_allclose(found[..., 1], RAMP * 255, atol=1)


def tiff(values: np.ndarray, *, bits: int, sample_format: int, photometric: int = 1) -> bytes:
    """An uncompressed TIFF of one strip, for what Pillow reads and does not write."""
    height, width = values.shape
    data = values.tobytes()
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
            (277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample_format)]  # fmt: skip
    entries = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, kind, value in tags
    )
    return (
        b"II*\0" + (8 + len(data)).to_bytes(4, "little") + data + len(tags).to_bytes(2, "little") + entries + bytes(4)
    )


def test_what_a_tiff_declares_is_its_range(tmp_path: Path) -> None:
    file, expected = tmp_path / "declared.tif", RAMP * 255
    for dtype, top, options in (
        ("<u4", 2**32 - 1, {"bits": 32, "sample_format": 1}),
        ("<i2", 2**15 - 1, {"bits": 16, "sample_format": 2}),
        ("<u2", 2**16 - 1, {"bits": 16, "sample_format": 1}),
    ):
        file.write_bytes(tiff((RAMP * top).astype(dtype), **options))
        np.testing.assert_allclose(np.array(read(file))[..., 0], expected, atol=1)
    file.write_bytes(tiff((RAMP * 65535).astype("<u2"), bits=16, sample_format=1, photometric=0))
    np.testing.assert_allclose(np.array(read(file))[..., 0], 255 - expected, atol=1)  # white is 0
    packed = np.zeros((8, 96), np.uint8)  # 12 bits, two pixels in three bytes
    values = (RAMP * 4095).astype(np.uint16)
    packed[:, 0::3] = values[:, 0::2] >> 4
    packed[:, 1::3] = (values[:, 0::2] & 15) << 4 | values[:, 1::2] >> 8
    packed[:, 2::3] = values[:, 1::2] & 255
    content = tiff(packed, bits=12, sample_format=1)
    width = (256).to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little")
    file.write_bytes(content.replace(width + (96).to_bytes(4, "little"), width + (64).to_bytes(4, "little")))
    np.testing.assert_allclose(np.array(read(file))[..., 0], expected, atol=1)


REFUSED = {
    "12 bits in 16.png": (deep(4095, "uint16"), "its pixels, 16 bits, go from 0 to 4,095, almost black in a range to"),
    "8 bits in 16.png": (deep(255, "uint16"), "its pixels, 16 bits, go from 0 to 255, almost black in a range to 65,"),
    "large.tif": (deep(2**20, "int32"), "its pixels, 32 bits, go from 0 to 1.04858e+06, almost black in a range to"),
    "too large.tif": (deep(1e9, "float32"), "its pixels, float, go from 0 to 1e+09, which is above every known range"),
    "dark.tif": (deep(0.01, "float32"), "its pixels, float, go from 0 to 0.01, almost black in a range to 1"),
    "below 0.tif": (
        Image.fromarray((RAMP - 0.5).astype("float32")),
        "go from -0.5 to 0.5, and only finite numbers",
    ),
    "negative.tif": (
        Image.fromarray((RAMP * 3000 - 1000).astype("int32")),
        "go from -1,000 to 2,000, and only finite numbers",
    ),
    "nan.tif": (Image.fromarray(np.full((4, 4), np.nan, "float32")), "go from nan to nan, and only finite numbers"),
    "inf.tif": (Image.fromarray(np.full((4, 4), np.inf, "float32")), "go from inf to inf, and only finite numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_deep_pictures_of_an_unknown_range_are_refused(tmp_path: Path, name: str) -> None:
    picture, reason = REFUSED[name]
    picture.save(tmp_path / name)
    remedy = "; convert it to 8 bits or delete it, or give `skip_bad_files`"
    with pytest.raises(UserError, match=rf"^{tmp_path / name}: .*{re.escape(reason)}.*{remedy}$"):
        read(tmp_path / name)


def test_black_is_black_however_deep(tmp_path: Path) -> None:
    for dtype in ("uint16", "int32", "float32"):
        deep(0, dtype).save(tmp_path / "black.tif")
        assert read(tmp_path / "black.tif").getextrema() == ((0, 0),) * 3


COLOR = (210, 120, 40)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("P", "gif"), ("CMYK", "tif"), ("CMYK", "jpg"), ("YCbCr", "jpg"),
     ("RGBA", "webp"), ("RGB", "bmp"), ("RGBA", "tif"), ("RGB", "ppm"), ("RGB", "jp2"), ("RGB", "tga")],
)  # fmt: skip
def test_colors_are_those_of_the_picture(tmp_path: Path, mode: str, suffix: str) -> None:
    file = tmp_path / f"picture.{suffix}"
    picture = Image.new("RGB", (16, 16), COLOR)
    (picture.quantize() if mode == "P" else picture.convert(mode)).save(file)
    found = read(file)
    assert (found.mode, found.size) == ("RGB", (16, 16))
    assert max(abs(a - b) for a, b in zip(found.getpixel((8, 8)), COLOR, strict=True)) < 12


def test_gray_black_and_white_and_16_bit_color(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.new("LA", (4, 4), (90, 200)).save(file)
    assert read(file).getpixel((1, 1)) == (90, 90, 90)
    half = Image.new("1", (4, 4))
    half.paste(1, (0, 0, 2, 4))
    half.save(file)
    assert [read(file).getpixel((x, 0)) for x in (0, 3)] == [(255,) * 3, (0,) * 3]


def test_alpha_is_ignored_unless_it_is_the_picture(tmp_path: Path) -> None:
    file, shape = tmp_path / "picture.png", Image.new("L", (8, 8), 0)
    shape.paste(255, (0, 0, 4, 8))
    colors = Image.new("RGB", (8, 8), COLOR)
    colors.paste((1, 2, 3), (0, 0, 8, 4))
    colors.putalpha(shape)
    colors.save(file)
    assert [read(file).getpixel(at) for at in ((7, 7), (7, 0), (0, 7))] == [COLOR, (1, 2, 3), COLOR]
    for ink, paper in (((0, 0, 0), (255, 255, 255)), ((255, 255, 255), (0, 0, 0))):
        drawing = Image.new("RGB", (8, 8), ink)
        drawing.putalpha(shape)
        for mode in ("RGBA", "LA"):
            drawing.convert(mode).save(file)
            assert [read(file).getpixel(at) for at in ((0, 0), (7, 7))] == [ink, paper]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.paste(1, (0, 0, 4, 8))
    palette.save(file, transparency=0)
    assert [read(file).getpixel(at) for at in ((0, 0), (7, 7))] == [(200, 10, 10), (0, 0, 0)]


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png"])
def test_the_first_frame_of_several(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"frames.{suffix}"
    frames = [Image.new("RGB", (8, 8), color) for color in (COLOR, (0, 0, 255), (0, 255, 0))]
    frames[0].save(file, save_all=True, append_images=frames[1:])
    assert max(abs(a - b) for a, b in zip(read(file).getpixel((4, 4)), COLOR, strict=True)) < 12


def test_the_orientation_in_exif_is_ignored(tmp_path: Path) -> None:
    """As torchvision's data sets do."""
    file, picture = tmp_path / "picture.jpg", Image.new("RGB", (16, 8), COLOR)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(file, exif=exif)
    assert read(file).size == (16, 8)
    with Image.open(file) as stored:
        assert ImageOps.exif_transpose(stored).size == (8, 16)


def test_content_counts_and_not_the_name(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), COLOR).save(content, "PNG")
    for name in ("photo.jpg", "photo", "PHOTO.AVIF"):
        (tmp_path / name).write_bytes(content.getvalue())
        assert read(tmp_path / name).getpixel((0, 0)) == COLOR


def test_no_other_program_is_started_for_a_file(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match=r"picture\.png: not a picture that Pillow reads; fix"):
        read(file)


@pytest.mark.parametrize("deep_name", ["16 bits.png", "float to 1.tif"])
def test_photographs_of_voc_follow_the_same_rule(tmp_path: Path, deep_name: str) -> None:
    vockit.draw(tmp_path)
    file = tmp_path / "VOCdevkit/VOC2007/JPEGImages/000001.jpg"
    SCALED[deep_name].resize((96, 72)).save(file, deep_name[-3:].replace("tif", "tiff"))
    train, _ = load_voc("voc2007", tmp_path, image_size=72)
    image = next(item for item in (train[0, seed][0] for seed in range(9)) if item[0, 0, 0] < item[0, 0, -1]).float()
    assert image.shape == (3, 72, 96)
    torch.testing.assert_close(image[0, 0, [0, 48, 95]], torch.tensor([0.0, 128.0, 255.0]), atol=3, rtol=0)
    deep(1000, "uint16").resize((96, 72)).save(file, "png")
    with pytest.raises(UserError, match=rf"^{file}: its pixels, 16 bits, go from 0 to 1,00"):
        load_voc("voc2007", tmp_path, image_size=72)[0][0, 0]
    assert len(load_voc("voc2007", tmp_path, image_size=72, skip_bad_files=True)[0]) == 3
