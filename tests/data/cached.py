"""What tests of the feature cache share: an encoder that counts, and features without a cache."""

from functools import partial

import torch

from fastprompt.data import ImageTransform, load_image, read_batch

NAMES = ("pooled", "patches")
HALF = (0.5, 0.5, 0.5)
TRANSFORM = ImageTransform(4, HALF, HALF)
READ = partial(read_batch, transform=TRANSFORM)


class CountingEncoder:
    """Counts images; optionally fails in a call."""

    def __init__(self, failure=None, fails_at=None, encode=None):
        self.images, self.calls, self.failure, self.fails_at = 0, 0, failure, fails_at
        self.encode = encode or globals()["encode"]

    def __call__(self, images):
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.failure
        self.images += len(images)
        return self.encode(images)


def encode(images):
    return {"pooled": images.mean(dim=(2, 3)), "patches": images.flatten(2).half()}


def direct(paths):
    return encode(torch.stack([TRANSFORM(load_image(path)) for path in paths]))


def shards(tmp_path, name="pooled"):
    """Files of one tensor."""
    return sorted((tmp_path / "cache").glob(f"*/{name}-*.safetensors"))
