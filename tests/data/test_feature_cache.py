import os
import random
import re
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastprompt.data import FeatureCache, ImageTransform, default_cache_dir, feature_cache, load_image, read_batch
from fastprompt.errors import InputError
from fastprompt.files import LOCK, TEMPORARY, locked, write_tensors
from tests.data.images_on_disk import write_image

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


@pytest.fixture
def paths(tmp_path):
    return [write_image(tmp_path / "images" / f"{i:02}.png", seed=i) for i in range(23)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_ROWS", 8)


@pytest.fixture
def load(tmp_path):
    """Load through a newly opened cache, as another process would; returns features and number of images encoded."""

    def load(paths, key="key", encoder=None, batch_size=4):
        encoder = encoder or CountingEncoder()
        cache = FeatureCache(tmp_path / "cache", key)
        return cache.load(paths, encoder, READ, batch_size=batch_size, progress=False), encoder.images

    return load


def shards(tmp_path):
    return sorted((tmp_path / "cache").glob("*/*.safetensors"))


def test_rows_equal_encoding_directly_in_the_order_asked_for(load, paths):
    features, _ = load(paths)
    assert len(features) == 23
    indices = torch.tensor([22, 0, 9, 9, 16, 3])
    rows, expected = features.rows(indices), direct([paths[i] for i in indices])
    assert rows.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(rows[name], tensor, rtol=0, atol=0)
    assert features.rows(indices[:0])["patches"].shape == (0, 3, 16)


def test_each_image_is_encoded_once(load, paths, tmp_path):
    assert load(paths[:10])[1] == 10
    assert load(paths[:10])[1] == 0
    features, encoded = load(paths[::-1])
    assert encoded == 13
    torch.testing.assert_close(features.rows(torch.arange(23)), direct(paths[::-1]), rtol=0, atol=0)
    assert len(shards(tmp_path)) == 4  # 8 + 2, then 8 + 5


def test_one_cache_object_serves_several_splits(tmp_path, paths):
    cache, encoder = FeatureCache(tmp_path / "cache", "key"), CountingEncoder()
    train = cache.load(paths[:12], encoder, READ, progress=False)
    test = cache.load(paths[8:], encoder, READ, progress=False)
    assert encoder.images == 23
    assert len(test.shards) == 2  # nothing is opened twice
    torch.testing.assert_close(train.rows(torch.arange(12)), direct(paths[:12]), rtol=0, atol=0)
    torch.testing.assert_close(test.rows(torch.arange(15)), direct(paths[8:]), rtol=0, atol=0)


def test_equal_files_are_encoded_once(load, paths, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(paths[0].read_bytes())
    features, encoded = load([paths[0], copy, paths[1], paths[0]])
    assert encoded == 2
    torch.testing.assert_close(features.rows(torch.arange(4)), direct([paths[i] for i in (0, 0, 1, 0)]))


def test_a_changed_file_is_encoded_again(load, paths):
    load(paths)
    write_image(paths[5], seed=99)
    features, encoded = load(paths)
    assert encoded == 1
    torch.testing.assert_close(features.rows(torch.tensor([5])), direct([paths[5]]), rtol=0, atol=0)


def test_a_moved_file_is_not_encoded_again(load, paths):
    load(paths)
    assert load([path.rename(path.with_name(f"moved {path.name}")) for path in paths])[1] == 0


def test_another_key_is_another_cache(load, paths):
    load(paths)
    assert load(paths, key="other key")[1] == 23
    assert load(paths)[1] == 0


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), InputError("bad"), RuntimeError("out of memory")])
def test_what_was_encoded_before_an_interruption_is_kept(load, paths, tmp_path, failure):
    with pytest.raises(type(failure)):
        load(paths, encoder=CountingEncoder(failure, fails_at=4))
    features, encoded = load(paths)
    assert encoded == 23 - 3 * 4  # a full shard of 8 and a partly filled one of 4
    torch.testing.assert_close(features.rows(torch.arange(23)), direct(paths), rtol=0, atol=0)
    assert {path.suffix for path in (tmp_path / "cache").glob("*/*")} == {".safetensors"}


def test_an_interruption_while_writing_leaves_no_shard_and_loses_nothing(load, paths, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def interrupted_once(descriptor):
        fsync(descriptor)
        if calls.append(descriptor) or len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        load(paths)
    assert load(paths)[1] == 23 - 8
    assert {path.suffix for path in (tmp_path / "cache").glob("*/*")} == {".safetensors"}


def test_unfinished_files_of_a_killed_process_are_swept(load, paths, tmp_path):
    load(paths[:4])
    (shards(tmp_path)[0].parent / f".000001.safetensors.0123{TEMPORARY}").write_bytes(b"half a shard")
    assert load(paths)[1] == 19
    assert {path.suffix for path in (tmp_path / "cache").glob("*/*")} == {".safetensors"}


def test_what_a_killed_process_left_in_a_full_cache_is_swept(load, paths, tmp_path):
    load(paths)
    folder = shards(tmp_path)[0].parent
    for name in (LOCK, f".000001.safetensors.0123{TEMPORARY}"):
        (folder / name).write_bytes(b"half")
    assert load(paths)[1] == 0
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}


def test_who_waited_for_another_process_finds_its_features(load, paths, tmp_path, caplog):
    folder = FeatureCache(tmp_path / "cache", "key").folder
    outcome = []
    with locked(folder):
        second = threading.Thread(target=lambda: outcome.append(load(paths)))
        second.start()
        while f"waiting for process {os.getpid()} on" not in caplog.text:
            assert second.is_alive()
            time.sleep(0.01)
        writer = feature_cache._ShardWriter(folder)
        writer.add(feature_cache.hash_files(paths, progress=False), encode(READ(paths)))
    second.join()
    assert outcome[0][1] == 0
    torch.testing.assert_close(outcome[0][0].rows(torch.arange(23)), direct(paths), rtol=0, atol=0)


def test_what_is_cached_needs_no_lock(load, paths, tmp_path):
    load(paths)
    with locked(FeatureCache(tmp_path / "cache", "key").folder):
        assert load(paths)[1] == 0


def test_any_flipped_bit_is_noticed_or_does_not_matter(load, paths, tmp_path):
    """In bytes all over the file: of the header, of digests and checksums, of features."""
    expected = load(paths[:8])[0].rows(torch.arange(8))
    (shard,) = shards(tmp_path)
    whole, noticed = shard.read_bytes(), 0
    for place in random.Random(0).sample(range(len(whole)), 200):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        shard.write_bytes(broken)
        try:
            features, encoded = load(paths[:8])
            rows = features.rows(torch.arange(8))
        except InputError as error:
            assert f"feature cache {shard}: is damaged" in str(error)
            noticed += 1
        else:
            assert all(torch.equal(rows[name], tensor) for name, tensor in expected.items())
            for later in shards(tmp_path)[1:]:  # what a broken digest hid was encoded anew
                assert encoded
                later.unlink()
    assert noticed > 100


def test_a_file_that_was_cut_short_after_it_was_opened_is_an_error(load, paths, tmp_path):
    features, _ = load(paths)
    for shard in shards(tmp_path):
        os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(InputError, match=r"is damaged .it was cut short.; delete the file"):
        features.rows(torch.arange(23))
    for shard in shards(tmp_path):
        shard.unlink()
    with pytest.raises(InputError, match=r"is damaged .No such file or directory."):
        features.rows(torch.arange(23))


def test_a_file_of_another_cache_is_refused(load, paths, tmp_path):
    load(paths[:4])
    (first,) = shards(tmp_path)
    load(paths[:4], key="other")
    (other,) = set(shards(tmp_path)) - {first}
    other.replace(first)
    with pytest.raises(InputError, match=r"is damaged .it belongs to another cache"):
        load(paths[:4])


def test_features_of_another_width_are_refused(load, paths):
    load(paths[:4])
    wider = lambda images: encode(torch.cat([images, images], dim=1))  # noqa: E731
    with pytest.raises(InputError, match=r"is damaged .its features have other shapes or types than those of 000000"):
        load(paths, encoder=CountingEncoder(encode=wider))


def test_equal_bits_have_equal_checksums_and_others_not(load, paths):
    assert load(paths)[0].checksum == load(paths)[0].checksum == load(paths, key="again", batch_size=7)[0].checksum
    assert load(paths[::-1])[0].checksum != load(paths)[0].checksum
    nudged = CountingEncoder(encode=lambda images: {**encode(images), "pooled": images.mean(dim=(2, 3)) + 1e-7})
    assert load(paths, key="nudged", encoder=nudged)[0].checksum != load(paths)[0].checksum


def test_what_features_take_is_said_before_they_are_written(tmp_path, paths, monkeypatch, capsys):
    bytes_a_row = 3 * 4 + 3 * 16 * 2
    monkeypatch.setattr(feature_cache, "SAID_BYTES", 23 * bytes_a_row - 1)
    FeatureCache(tmp_path / "a", "key").load(paths, encode, READ)
    assert f"features of 23 images: 0.0 GB in {tmp_path / 'a'}" in capsys.readouterr().err
    monkeypatch.setattr(feature_cache, "SAID_BYTES", 23 * bytes_a_row)
    FeatureCache(tmp_path / "b", "key").load(paths, encode, READ)
    assert "GB in" not in capsys.readouterr().err


def test_a_disk_without_room_is_said_and_nothing_is_written(tmp_path, paths, load, monkeypatch):
    free = 23 * (3 * 4 + 3 * 16 * 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free - 1))
    with pytest.raises(
        InputError, match=r"expected 0.00 GB for the features of 23 images, got 0.00 GB of free disk: choo"
    ):
        load(paths)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))
    assert load(paths)[1] == 23


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_damaged_shard_is_named(load, paths, tmp_path, keep):
    load(paths)
    shard = shards(tmp_path)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    sentence = rf"^feature cache {re.escape(str(shard))}: is damaged \(.*\); delete the file, and its images"
    with pytest.raises(InputError, match=sentence):
        load(paths)
    shard.unlink()
    assert 0 < load(paths)[1] <= 8


def test_a_shard_that_does_not_list_its_rows_is_refused(load, paths, tmp_path):
    load(paths[:4])
    write_tensors(shards(tmp_path)[0], {"pooled": torch.zeros(2, 3)})
    with pytest.raises(InputError, match="is damaged"):
        load(paths)


def test_bad_arguments(tmp_path, paths):
    cache = FeatureCache(tmp_path / "cache", "key")
    with pytest.raises(InputError, match="expected at least one image, got none"):
        cache.load([], encode, READ)
    with pytest.raises(InputError, match=r"image .*none.png: cannot be read \(No such file or directory\)"):
        cache.load([*paths, tmp_path / "none.png"], encode, READ, progress=False)
    with pytest.raises(ValueError, match="encode: expected 23 rows of 'pooled', got 1"):
        cache.load(paths, lambda images: {"pooled": images[:1]}, READ, progress=False)
    assert not (tmp_path / "cache").exists()


def test_default_folder(monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path.home() / "mine"
    monkeypatch.delenv("FASTPROMPT_CACHE")
    assert default_cache_dir() == Path("/xdg/fastprompt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache/fastprompt"
    monkeypatch.setenv("FASTPROMPT_CACHE", "~nobody-of-that-name/mine")
    with pytest.raises(InputError, match="expected the name of a user behind ~"):
        default_cache_dir()
    with pytest.raises(InputError, match="expected the name of a user behind ~"):
        FeatureCache("~nobody-of-that-name/mine", "key")
