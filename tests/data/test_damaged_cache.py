"""Whatever happens to the files of a feature cache is noticed."""

import os
import random
import re

import pytest
import torch

from fastprompt.errors import InputError
from fastprompt.files import write_tensors
from tests.data.cached import CountingEncoder, encode, shards


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
    with pytest.raises(
        InputError, match=r"is damaged .its features have other shapes or types than those of patches-000000"
    ):
        load(paths, encoder=CountingEncoder(encode=wider))


def test_equal_bits_have_equal_checksums_and_others_not(load, paths):
    assert load(paths)[0].checksum == load(paths)[0].checksum == load(paths, key="again", batch_size=7)[0].checksum
    assert load(paths[::-1])[0].checksum != load(paths)[0].checksum
    nudged = CountingEncoder(encode=lambda images: {**encode(images), "pooled": images.mean(dim=(2, 3)) + 1e-7})
    assert load(paths, key="nudged", encoder=nudged)[0].checksum != load(paths)[0].checksum


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
