from pathlib import Path

import pytest

from fastprompt.data import FeatureCache, feature_cache
from tests.data.cached import NAMES, READ, CountingEncoder
from tests.data.images_on_disk import write_image


@pytest.fixture
def class_folders(tmp_path):
    """Return a function that writes {folder: number of images} under a root and returns the root."""

    def write(counts: dict[str, int], root: str = "pets") -> Path:
        folder = tmp_path / root
        folder.mkdir(exist_ok=True)
        for seed, (name, count) in enumerate(counts.items()):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                write_image(folder / name / f"{i:03}.png", seed=1000 * seed + i)
        return folder

    return write


@pytest.fixture
def paths(tmp_path, small_shards):
    return [write_image(tmp_path / "images" / f"{i:02}.png", seed=i) for i in range(23)]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_ROWS", 8)


@pytest.fixture
def load(tmp_path):
    """Load through a newly opened cache, as another process would; returns features and number of images encoded."""

    def load(paths, key="key", encoder=None, batch_size=4, names=NAMES):
        encoder = encoder or CountingEncoder()
        cache = FeatureCache(tmp_path / "cache", key)
        return cache.load(paths, encoder, READ, names, batch_size=batch_size, progress=False), encoder.images

    return load
