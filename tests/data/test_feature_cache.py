import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from fastprompt.data import FeatureCache, default_cache_dir, feature_cache, hash_files
from fastprompt.data.shards import Shard, ShardWriter
from fastprompt.errors import InputError
from fastprompt.files import LOCK, TEMPORARY, locked
from tests.data.cached import NAMES, READ, CountingEncoder, direct, encode, shards
from tests.data.images_on_disk import write_image


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
    train = cache.load(paths[:12], encoder, READ, NAMES, progress=False)
    test = cache.load(paths[8:], encoder, READ, NAMES, progress=False)
    assert encoder.images == 23
    assert len(test.tensors["pooled"].shards) == 2  # nothing is opened twice
    torch.testing.assert_close(train.rows(torch.arange(12)), direct(paths[:12]), rtol=0, atol=0)
    torch.testing.assert_close(test.rows(torch.arange(15)), direct(paths[8:]), rtol=0, atol=0)


def bits(files):
    return {file.name: file.read_bytes() for file in files}


def test_what_is_not_asked_for_is_neither_written_nor_read(load, paths, tmp_path):
    features, encoded = load(paths, names=["pooled"])
    assert encoded == 23 and shards(tmp_path) and not shards(tmp_path, "patches")
    assert features.rows(torch.arange(23)).keys() == {"pooled"}
    load(paths)
    for shard in shards(tmp_path, "patches"):
        shard.write_bytes(b"")
    with pytest.raises(InputError, match="is damaged"):
        load(paths)
    for shard in shards(tmp_path, "patches"):
        shard.unlink()
    assert load(paths, names=["pooled"])[1] == 0


def test_a_cache_is_extended_by_what_it_lacks(load, paths, tmp_path):
    """Of 23 images 10 have one tensor, and 5 of these the other."""
    load(paths[:10], names=["pooled"])
    assert load(paths[5:10], names=["patches"])[1] == 5
    before = bits([*shards(tmp_path), *shards(tmp_path, "patches")])
    checksum = load(paths[:10], names=["pooled"])[0].checksum
    features, encoded = load(paths)
    assert encoded == 18, "5 have both"
    torch.testing.assert_close(features.rows(torch.arange(23)), direct(paths), rtol=0, atol=0)
    after = bits([*shards(tmp_path), *shards(tmp_path, "patches")])
    assert before.items() <= after.items(), "what was there stays as it was"
    assert sum(len(Shard.open(file, file.parent.name).digests) for file in shards(tmp_path)) == 23, "no row twice"
    assert sum(len(Shard.open(file, file.parent.name).digests) for file in shards(tmp_path, "patches")) == 23
    assert load(paths[:10], names=["pooled"])[0].checksum == checksum, "runs that read only these go on as before"
    assert load(paths)[1] == 0


def test_rows_of_some_tensors_alone_are_read(load, paths, tmp_path):
    features, _ = load(paths)
    for shard in shards(tmp_path, "patches"):
        os.truncate(shard, 100)
    rows = features.rows(torch.tensor([3, 0]), ["pooled", "tokens"])
    torch.testing.assert_close(rows, {"pooled": direct(paths)["pooled"][[3, 0]]}, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"patches-000000.safetensors: is damaged .it was cut short"):
        features.rows(torch.tensor([3, 0]))


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
        for name in NAMES:
            writer = ShardWriter(folder, name, ())
            writer.add(feature_cache.hash_files(paths, progress=False), encode(READ(paths)))
            writer.flush()
    second.join()
    assert outcome[0][1] == 0
    torch.testing.assert_close(outcome[0][0].rows(torch.arange(23)), direct(paths), rtol=0, atol=0)


def test_what_is_cached_needs_no_lock(load, paths, tmp_path):
    load(paths)
    with locked(FeatureCache(tmp_path / "cache", "key").folder):
        assert load(paths)[1] == 0


def test_what_features_take_is_said_before_they_are_written(tmp_path, paths, monkeypatch, capsys):
    bytes_a_row = 3 * 4 + 3 * 16 * 2
    monkeypatch.setattr(feature_cache, "SAID_BYTES", 23 * bytes_a_row - 1)
    FeatureCache(tmp_path / "a", "key").load(paths, encode, READ, NAMES)
    assert f"features of 23 images: 0.0 GB in {tmp_path / 'a'}" in capsys.readouterr().err
    monkeypatch.setattr(feature_cache, "SAID_BYTES", 23 * 3 * 16 * 2 - 1)
    FeatureCache(tmp_path / "c", "key").load(paths, encode, READ, ["pooled"])
    assert "GB in" not in capsys.readouterr().err
    FeatureCache(tmp_path / "c", "key").load(paths, encode, READ, NAMES)
    assert "features of 23 images: 0.0 GB in" in capsys.readouterr().err, "of the patches alone"
    monkeypatch.setattr(feature_cache, "SAID_BYTES", 23 * bytes_a_row)
    FeatureCache(tmp_path / "b", "key").load(paths, encode, READ, NAMES)
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


def test_bad_arguments(tmp_path, paths):
    cache = FeatureCache(tmp_path / "cache", "key")
    with pytest.raises(InputError, match="expected at least one image, got none"):
        cache.load([], encode, READ, NAMES)
    with pytest.raises(InputError, match=r"image .*none.png: expected a file, got no such file$"):
        cache.load([*paths, tmp_path / "none.png"], encode, READ, NAMES, progress=False)
    with pytest.raises(ValueError, match="encode: expected 23 rows of 'pooled', got 1"):
        cache.load(paths, lambda images: {"pooled": images[:1]}, READ, ["pooled"], progress=False)
    with pytest.raises(InputError, match=r"checkpoint .*none.png: expected a file, got no such file$"):
        hash_files([tmp_path / "none.png"], what="checkpoint")
    assert not (tmp_path / "cache").exists()


def test_a_file_that_changes_before_it_is_read_is_not_cached_as_what_it_was(tmp_path, paths):
    cache, before = FeatureCache(tmp_path / "cache", "key"), paths[3].read_bytes()

    def read(files):
        if paths[3] in files:
            paths[3].write_bytes(paths[4].read_bytes())
        return READ(files)

    with pytest.raises(InputError, match=r"image .*03.png: expected a file that stays as it is, got one that changed"):
        cache.load(paths, encode, read, NAMES, batch_size=2, progress=False)
    paths[3].write_bytes(before)
    rows = cache.load(paths, encode, READ, NAMES, progress=False).rows(torch.arange(23))
    torch.testing.assert_close(rows["pooled"], direct(paths)["pooled"])


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
