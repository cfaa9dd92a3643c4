"""Reader of pictures: any file that Pillow decodes, as RGB with 8 bits a channel.

As torchvision does, it takes the first frame of an animation and the first page of a file with several, and ignores the
alpha channel and the orientation in EXIF. Deep pictures, whose pixels have more than 8 bits, are scaled:

    16 bits (and 12, in TIFF)    by the full range of the format
    32 bits, float               by the smallest of 1 (float only), 255 and 65,535 that holds all values, or by the full
                                 range of 32 bits

A deep picture whose largest value is below a sixteenth of that would become almost black, and it is refused: its true
range cannot be known. So is one with negative or infinite values.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from resist.data.naming import REMEDY, shown
from resist.errors import UserError, first_line

# Formats of Pillow that start other programs, or that it names but does not decode.
EXCLUDED = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
# A deep picture has to use at least this part of its range.
LEAST_USED = 1 / 16
CONVERT = "convert it to 8 bits or delete it, or give `skip_bad_files`"
# Part of the range by which a float picture may exceed it, as after resampling; it is clipped.
SLACK = 0.02
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339


class _RefusedError(ValueError):
    """A picture that can be decoded, but not shown with 8 bits a channel."""


def read(path: Path) -> Image.Image:
    """Read a picture as RGB with 8 bits a channel.

    Raises:
        UserError: The file is not a picture, incomplete, or cannot be read or scaled. The message begins with its name.
    """
    return use(path, as_rgb)


def size_of(path: Path) -> tuple[int, int]:
    """Read the (width, height) of a picture in pixels from its header.

    Raises:
        UserError: The file is not a picture, or cannot be read. The message begins with its name.
    """
    return use(path, lambda picture: picture.size)


def use(path: Path, action: Callable[[Image.Image], Any]) -> Any:
    """Open a picture and return `action` of it; every error becomes a UserError that begins with the file."""
    if not path.is_file():  # reading a pipe would wait forever
        raise _bad(path, "not a file" if path.exists() else "not found")
    with _quiet:
        try:
            with Image.open(path, formats=formats()) as picture:
                return action(picture)
        except _RefusedError as error:
            raise _bad(path, str(error), CONVERT) from error
        except UnidentifiedImageError as error:
            empty = path.stat().st_size == 0
            raise _bad(path, "the file is empty" if empty else "not a picture that Pillow reads") from error
        except Exception as error:  # it is not documented which exceptions the decoders raise
            raise _bad(path, f"cannot be read ({getattr(error, 'strerror', None) or first_line(error)})") from error


class _Quiet:
    """Context without warnings, of any number of threads at once, which `warnings.catch_warnings` does not allow."""

    def __init__(self) -> None:
        self._lock, self._inside, self._context = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._context.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")  # about unusual palettes and damaged comments, which do no harm

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._context.close()


_quiet = _Quiet()


def _bad(path: Path, reason: str, remedy: str = REMEDY) -> UserError:
    return UserError(f"{shown(path)}: {reason}; {remedy}")


def problem_of(error: UserError, path: Path) -> str:
    """Return the reason in an error of `read`, without the file's name and the remedy."""
    reason = str(error).removeprefix(f"{shown(path)}: ")
    return reason.removesuffix(f"; {REMEDY}").removesuffix(f"; {CONVERT}")


@cache
def formats() -> tuple[str, ...]:
    """Return the formats that this Pillow decodes, the usual ones first."""
    Image.init()
    return tuple(name for name in Image.ID if name not in EXCLUDED)


def as_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB with 8 bits a channel.

    Raises:
        ValueError: It has more than 8 bits a channel, and its range cannot be known.
    """
    if picture.mode[0] in "IF":  # I;16, I;16B, I, F
        return _scaled(picture)
    if picture.mode in ("RGBa", "La"):  # colors multiplied by alpha, which convert to nothing else
        picture = picture.convert(picture.mode.upper())
    colors = picture.convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        return _with_shape(colors, picture.convert("RGBA").getchannel("A"))
    return colors


def _with_shape(colors: Image.Image, alpha: Image.Image) -> Image.Image:
    """`colors`; where they are one color, and the alpha channel is the picture, on a background in contrast to it."""
    extrema: Any = colors.getextrema()
    (low, high), flat = alpha.getextrema(), all(low == high for low, high in extrema)
    if not flat or low == high:
        return colors
    dark = sum(low for low, _ in extrema) < 3 * 128
    background = Image.new("RGB", colors.size, "white" if dark else "black")
    return Image.composite(colors, background, alpha)


def _scaled(picture: Image.Image) -> Image.Image:
    tags: Any = getattr(picture, "tag_v2", {})  # of TIFF
    values = np.asarray(picture)
    if picture.mode == "I" and picture.format == "TIFF" and tags.get(TIFF_SAMPLE_FORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)  # Pillow reads them as signed
    low, high = float(values.min()), float(values.max())
    slack = SLACK if picture.mode == "F" else 0.0
    depth = "16 bits" if picture.mode.startswith("I;16") else "32 bits" if picture.mode == "I" else "float"
    pixels = f"its pixels, {depth}, go from {low:,g} to {high:,g}"
    if not np.isfinite([low, high]).all() or low < -slack * high:
        raise _RefusedError(f"{pixels}, and only finite numbers from 0 on can be scaled")
    full = _full_scale(picture, values, high / (1 + slack), tags.get(TIFF_BITS, (16,))[0])
    if full is None:
        raise _RefusedError(f"{pixels}, which is above every known range")
    if 0 < high < full * LEAST_USED:
        raise _RefusedError(f"{pixels}, almost black in a range to {full:,.0f}")
    scaled = Image.fromarray((values * (255 / full)).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    # Pillow inverts only pictures of up to 8 bits in which 0 is white.
    return ImageChops.invert(scaled) if tags.get(TIFF_PHOTOMETRIC) == 0 else scaled


def _full_scale(picture: Image.Image, values: np.ndarray, high: float, tiff_bits: int) -> float | None:
    """The value of white; None where the largest value, `high`, is above every known range."""
    if picture.mode.startswith("I;16"):
        return 2.0 ** min(tiff_bits, 16) - 1
    if picture.format in ("PNG", "PPM"):  # read with 16 bits, whatever the mode
        return 65535.0
    if picture.mode == "I" and tiff_bits == 16 and picture.format == "TIFF":  # signed
        return 32767.0
    steps = (1.0, 255.0, 65535.0) if picture.mode == "F" else (255.0, 65535.0, float(np.iinfo(values.dtype).max))
    return next((step for step in steps if high <= step), None)
