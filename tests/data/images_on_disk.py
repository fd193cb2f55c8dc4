import struct
import zlib

import numpy as np
from PIL import Image


def write_image(path, seed=0, size=(12, 10)):
    """Write noise, different for every seed; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_png(path, size, bits, color, rows):
    """Write a PNG of which Pillow makes none; rows are bytes with a 0 in front of each, size is (width, height)."""
    header = struct.pack(">IIBBBBB", *size, bits, color, 0, 0, 0)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return path


def write_tiff(path, size, bits, levels, *, samples=1, kind=1, photometric=1):
    """Write an uncompressed little-endian TIFF; levels are bytes, kind is 1 unsigned, 2 signed, 3 floating point."""
    depths, kinds = (struct.pack(f"<{samples}H", *[value] * samples) for value in (bits, kind))
    more = 8 + 2 + 9 * 12 + 4  # where what does not fit into the directory begins
    tags = [
        (256, 3, 1, size[0]),
        (257, 3, 1, size[1]),
        (258, 3, samples, bits if samples == 1 else more),
        (259, 3, 1, 1),
    ]
    tags += [(262, 3, 1, photometric), (273, 4, 1, more + 12), (277, 3, 1, samples), (279, 4, 1, len(levels))]
    tags += [(339, 3, samples, kind if samples == 1 else more + 6)]
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4)
    path.write_bytes(content + depths.ljust(6, b"\0") + kinds.ljust(6, b"\0") + levels)
    return path
