"""Texts of any length, gathered in packets of one size."""

from collections.abc import Callable

from resist.sync.transport import PACKET_BYTES

LENGTH_BYTES = 8  # at the beginning of a packet


def gather_texts(text: str, gather: Callable[[bytes, int], list[bytes]]) -> list[str]:
    """Gather the texts of all processes: at once if all fit into a packet, else by a second call for the whole texts.

    Args:
        text: Text of this process.
        gather: Returns the contents of all processes, cut or padded to a number of bytes.

    Returns:
        The text of each process, in the order of the processes.
    """
    encoded = text.encode("utf-8", "surrogateescape")
    packets = gather(len(encoded).to_bytes(LENGTH_BYTES, "big") + encoded, PACKET_BYTES)
    sizes = [int.from_bytes(packet[:LENGTH_BYTES], "big") for packet in packets]
    if max(sizes) <= PACKET_BYTES - LENGTH_BYTES:
        padded = [packet[LENGTH_BYTES:] for packet in packets]
    else:
        padded = gather(encoded, max(sizes))
    return [one[:size].decode("utf-8", "surrogateescape") for one, size in zip(padded, sizes, strict=True)]
