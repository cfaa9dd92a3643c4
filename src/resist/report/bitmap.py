"""Pixel pictures: a map of many cells is one small PNG instead of a million rectangles."""

import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence

CLEAR = 0  # the color number of transparent pixels


def png(rows: Sequence[bytes], palette: Sequence[str]) -> bytes:
    """A PNG with a palette.

    Args:
        rows: Rows of equal length, a byte for each pixel: 0 for a transparent one, i for `palette[i - 1]`.
        palette: At most 255 colors as #rrggbb.
    """
    assert len(palette) < 256
    assert len({len(row) for row in rows}) == 1
    colors = bytes(3) + b"".join(bytes.fromhex(color[1:]) for color in palette)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    parts = ((b"IHDR", header), (b"PLTE", colors), (b"tRNS", b"\0"), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + b64encode(picture).decode()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
