from pathlib import Path

import pytest

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
