"""Which files are pictures: by their suffix, or where that is unusual or missing, by their first bytes."""

import os

# What Pillow decodes. This list is fixed, so that all machines list the same files, whatever was built into theirs.
SUFFIXES = frozenset(
    b".jpg .jpeg .jpe .jfif .jif .mpo .png .apng .webp .gif .bmp .dib .tif .tiff .avif .avifs "
    b".pbm .pgm .ppm .pnm .pfm .jp2 .j2k .j2c .jpc .jpf .jpx .tga .icb .vda .vst .ico .cur .icns .pcx .dcx "
    b".sgi .rgb .rgba .bw .ras .psd .qoi .dds .xbm .xpm .msp".split()
)
# Files of cameras and microscopes in which Pillow finds a small preview, because they begin like a TIFF or JPEG.
PREVIEWS = frozenset(
    b".dng .nef .nrw .cr2 .cr3 .arw .sr2 .orf .rw2 .pef .srw .raf .3fr .iiq .svs .ndpi .scn .thm".split()
)
SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"P4\n", b"P5\n", b"P6\n", b"P4 ", b"P5 ", b"P6 ", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"8BPS\0\1",
    b"qoif", b"DDS |\0\0\0",
)  # fmt: skip


def suffix_of(name: bytes) -> bytes:
    """Return the suffix of a file's name in lower case, with its dot; b"" where it has none."""
    return os.path.splitext(name)[1].lower()


def is_picture(path: bytes) -> bool:
    """Return True for a file with the suffix of a picture, or that begins like one."""
    suffix = suffix_of(path)
    if suffix in SUFFIXES or suffix in PREVIEWS:
        return suffix in SUFFIXES
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return (
        head.startswith(SIGNATURES)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == bytes(4) and len(head) == 16)
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"))
    )
