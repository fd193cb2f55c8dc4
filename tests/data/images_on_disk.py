import numpy as np
from PIL import Image


def write_image(path, seed=0, size=(12, 10)):
    """Write noise, different for every seed; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
