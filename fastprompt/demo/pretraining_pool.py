"""The pictures that pretraining draws from: rendered once, kept as patches, cropped to windows around the object."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastprompt.demo.captions import pretraining_scene
from fastprompt.demo.scenes import IMAGE_SIZE, Scene, render

PRETRAINING_SEED = 710_000  # first number of every generator behind pretraining; the data set has another
PATCH = 16  # pixels
GRID = IMAGE_SIZE // PATCH
_CHUNK = 1000  # pictures that a worker renders at a time


@dataclass(frozen=True)
class Pool:
    """Rendered scenes.

    Attributes:
        patches: (n, GRID * GRID, PATCH * PATCH * 3) uint8, pixels row by row with the channels last.
        centres: (n, 2) column and row of the patch in which the named object's centre lies.
        scenes: what each picture shows.
    """

    patches: Tensor
    centres: np.ndarray
    scenes: tuple[Scene, ...]


def cut_patches(pixels: np.ndarray) -> np.ndarray:
    """Images (n, S, S, 3) to patches (n, GRID * GRID, PATCH * PATCH * 3)."""
    cut = pixels.reshape(-1, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(-1, GRID * GRID, PATCH * PATCH * 3)


def _render_chunk(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, list[Scene]]:
    pixels = np.empty((stop - start, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    centres, scenes = np.empty((stop - start, 2), np.int64), []
    for row, number in enumerate(range(start, stop)):
        rng = np.random.default_rng((PRETRAINING_SEED, number))
        scenes.append(pretraining_scene(rng))
        picture, (left, top, right, bottom) = render(scenes[-1], rng)
        pixels[row] = np.asarray(picture)
        centres[row] = (left + right) // 2 // PATCH, (top + bottom) // 2 // PATCH
    return cut_patches(pixels), centres.clip(0, GRID - 1), scenes


def render_pool(images: int, workers: int) -> Pool:
    """Renders the pool in `workers` processes; the pool does not depend on their number."""
    starts = range(0, images, _CHUNK)
    stops = [min(start + _CHUNK, images) for start in starts]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as workers_pool:
        chunks = workers_pool.map(_render_chunk, starts, stops)
        parts = list(tqdm(chunks, total=len(stops), desc="rendering the pool", unit=f"{_CHUNK} scenes"))
    return Pool(
        patches=torch.from_numpy(np.concatenate([patches for patches, _, _ in parts])),
        centres=np.concatenate([centres for _, centres, _ in parts]),
        scenes=tuple(scene for _, _, scenes in parts for scene in scenes),
    )


def windows(centres: np.ndarray, side: int, rng: np.random.Generator) -> Tensor:
    """Patch indices (B, side * side) of a random square window for each picture, around its named object.

    Where the grid allows, the object's centre is not in the outermost ring of the window.
    """
    highest = np.minimum(np.maximum(centres - 1, 0), GRID - side)
    lowest = np.minimum(np.maximum(centres - side + 2, 0), GRID - side)
    corner = lowest + (rng.random(centres.shape) * (highest - lowest + 1)).astype(np.int64)
    columns, rows = (corner[:, axis, None] + np.arange(side) for axis in (0, 1))
    return torch.from_numpy((rows[:, :, None] * GRID + columns[:, None, :]).reshape(len(centres), -1))


def mirror(patches: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The same windows seen in a mirror: patches (B, n, PATCH * PATCH * 3) and their indices (B, n)."""
    flipped = patches.unflatten(2, (PATCH, PATCH, 3)).flip(3).flatten(2)
    return flipped, index // GRID * GRID + GRID - 1 - index % GRID
