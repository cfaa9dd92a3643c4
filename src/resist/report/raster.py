"""A PNG file from rows of colour numbers, with nothing but zlib: one small picture for a million rectangles."""

import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence

CLEAR = 0  # the colour number that lets the page shine through


def png(rows: Sequence[bytes], palette: Sequence[str]) -> bytes:
    """A PNG with a palette of #rrggbb, at most 255 of them.

    rows: equally long, a byte for each pixel: 0 for a clear one, i for `palette[i - 1]`.
    """
    assert len(palette) < 256
    assert len({len(row) for row in rows}) == 1
    colours = bytes(3) + b"".join(bytes.fromhex(colour[1:]) for colour in palette)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    parts = ((b"IHDR", header), (b"PLTE", colours), (b"tRNS", b"\0"), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + b64encode(picture).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
