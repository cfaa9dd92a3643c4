"""Text of an XML file, whatever its encoding.

The parser knows UTF-8, UTF-16, Latin-1 and ASCII; labeling tools declare many others, also such as do not exist. So the
text is decoded here: by its byte order mark; by the zero bytes that UTF-16 has between ASCII characters; by what it
declares; or where that is unknown or not true, as UTF-8.
"""

import codecs
import re

DECLARATION = r"""\s*<\?xml[^>]{0,200}?\sencoding\s*=\s*["']([^"'>]{0,99})["']"""
DECLARED = re.compile(DECLARATION.encode())
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
ZEROS = ((b"<\0\0\0", "utf-32-le"), (b"\0\0\0<", "utf-32-be"), (b"<\0", "utf-16-le"), (b"\0<", "utf-16-be"))
# Character sets whose names are used for larger ones, and other names of UTF-8.
WIDER = {
    "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs",
    "utf8mb4": "utf-8", "utf8mb3": "utf-8",
}  # fmt: skip
# Codecs of Python that are not character sets.
NO_CHARACTER_SETS = {"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "mbcs", "oem"}


def decode_xml(data: bytes) -> str:
    """Decode the bytes of an XML file; the text declares UTF-8, or no encoding.

    Raises:
        ValueError: They are not in the encoding that the file declares, nor in UTF-8.
    """
    return re.sub(f"^({DECLARATION})", lambda match: match[1].replace(match[2], "UTF-8"), _decode(data), count=1)


def _decode(data: bytes) -> str:
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return _decoded(data[len(mark) :], encoding, "has the byte order mark of")
    for zeros, encoding in ZEROS:
        if data.lstrip(b" \t\r\n").startswith(zeros):
            return _decoded(data, encoding, "begins as in")
    match = DECLARED.match(data)
    declared = match[1].decode("ascii", "backslashreplace") if match else "utf-8"
    encoding = _codec(declared)
    for attempt in (encoding, "utf-8"):
        try:
            return data.decode(attempt or "utf-8")
        except UnicodeDecodeError as error:
            place = f"byte {error.start + 1:,}"
    unknown = "" if encoding else ", which is unknown,"
    known = f"declares the encoding {declared!r}{unknown} and is not in it nor in UTF-8"
    reason = known if match else "is not UTF-8, and declares no other encoding"
    raise ValueError(f"{reason} ({place}); save it as UTF-8")


def _decoded(data: bytes, encoding: str, why: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{why} {encoding.upper()}, and is not in it (byte {error.start + 1:,}); save it as UTF-8"
        ) from error


def _codec(name: str) -> str | None:
    """The codec for a declared encoding; None where there is none that can be meant.

    Where the declaration can be read as ASCII, as here, the text is not in UTF-16, UTF-32 or EBCDIC.
    """
    name = WIDER.get(name.strip().lower(), name.strip())
    try:
        codec = codecs.lookup(name)
        ascii_like = "<?xml 0=".encode(codec.name) == b"<?xml 0="
    except (LookupError, ValueError):  # of another kind where the name has a zero byte or is not ASCII
        return None
    if codec.name in NO_CHARACTER_SETS or not ascii_like:
        return None
    return WIDER.get(codec.name, codec.name)
