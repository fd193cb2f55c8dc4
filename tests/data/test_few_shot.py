import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprompt.data import LabelledImages, few_shot, select_classes
from fastprompt.errors import InputError


def labelled(labels, n_classes=None):
    names = tuple(f"class {c}" for c in range(n_classes or max(labels) + 1))
    return LabelledImages(tuple(Path(f"{i}.png") for i in range(len(labels))), tuple(labels), names)


labels = st.lists(st.integers(0, 7), min_size=1, max_size=120)
shots = st.integers(1, 12)
seeds = st.integers(0, 2**32)
samplers = st.sampled_from(["exact", "published", "stratified"])


@given(labels, shots, seeds, samplers)
def test_a_draw_is_a_subset_without_repeats_grouped_by_class(labels, shots, seed, sampler):
    images = labelled(labels)
    drawn = few_shot(images, shots, seed, sampler)
    assert drawn.class_names == images.class_names
    assert len(set(drawn.paths)) == len(drawn)
    assert set(zip(drawn.paths, drawn.labels, strict=True)) <= set(zip(images.paths, images.labels, strict=True))
    if sampler != "published":
        assert list(drawn.labels) == sorted(drawn.labels) or len(drawn) == len(images)


def published_draw(items, shots, seed):
    """What CoOp's code does with (path, label) of a split file: seed Python's generator, then sample class by class."""
    state = random.getstate()
    random.seed(seed)
    classes = defaultdict(list)
    for item in items:
        classes[item[1]].append(item)
    drawn = []
    for some in classes.values():
        drawn.extend(random.sample(some, shots) if len(some) >= shots else some)
    random.setstate(state)
    return drawn


@given(labels, shots, seeds)
def test_published_draws_are_those_of_coops_code(labels, shots, seed):
    images = labelled(labels)
    drawn = few_shot(images, shots, seed, "published")
    expected = published_draw(list(zip(images.paths, images.labels, strict=True)), shots, seed)
    assert list(zip(drawn.paths, drawn.labels, strict=True)) == expected


def test_published_draws_are_written_down():
    """So that another Python, or a change of ours, is noticed; classes count in the order in which they occur."""
    images = labelled([1] * 30 + [0] * 300)
    drawn = few_shot(images, 4, 1, "published")
    assert [int(path.stem) for path in drawn.paths] == [4, 18, 27, 25, 62, 160, 90, 283]


def test_published_draws_of_base_classes_are_made_among_all_classes():
    """As CoOp's code does: a class further down takes its share of the stream."""
    images = labelled([3, 0, 1, 2] * 9)
    base = select_classes(few_shot(images, 2, 5, "published"), "base")
    drawn = published_draw(list(zip(images.paths, images.labels, strict=True)), 2, 5)
    assert list(base.paths) == [path for path, label in drawn if label < 2]
    assert base.paths != few_shot(select_classes(images, "base"), 2, 5, "published").paths
    for seed in range(5):  # of "exact", the order does not matter
        exact = few_shot(select_classes(images, "base"), 2, seed)
        assert select_classes(few_shot(images, 2, seed), "base") == exact


@given(labels, shots, seeds)
def test_exact_takes_k_a_class_and_fewer_only_where_there_are_fewer(labels, shots, seed):
    drawn = Counter(few_shot(labelled(labels), shots, seed).labels)
    assert drawn == {label: min(count, shots) for label, count in Counter(labels).items()}


@given(labels, shots, seeds)
def test_exact_draws_are_nested(labels, shots, seed):
    images = labelled(labels)
    assert set(few_shot(images, shots, seed).paths) <= set(few_shot(images, shots + 1, seed).paths)


@given(labels, shots, seeds)
def test_stratified_keeps_proportions_to_less_than_one_image(labels, shots, seed):
    images = labelled(labels)
    drawn = Counter(few_shot(images, shots, seed, "stratified").labels)
    total = min(shots * len(images.class_names), len(images))
    assert sum(drawn.values()) == total
    for label, count in Counter(labels).items():
        assert abs(drawn[label] - total * count / len(images)) < 1


def test_stratified_gives_the_largest_remainders_the_spare_images():
    # 6 of 10 images: shares 3.6, 1.8, 0.6 round down to 3, 1, 0, and the two spare ones go to .8 and a .6.
    images = labelled([0] * 6 + [1] * 3 + [2])
    counts = {tuple(np.bincount(few_shot(images, 2, s, "stratified").labels, minlength=3)) for s in range(20)}
    assert counts == {(4, 2, 0), (3, 2, 1)}


@given(labels, shots, seeds, samplers)
def test_draws_depend_on_the_seed_and_not_on_the_global_rng(labels, shots, seed, sampler):
    images = labelled(labels)
    np.random.seed(0)  # noqa: NPY002 (the global generators are the point)
    random.seed(0)
    first = few_shot(images, shots, seed, sampler)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    assert few_shot(images, shots, seed, sampler) == first


@pytest.mark.parametrize("sampler", ["exact", "published", "stratified"])
def test_seeds_differ_and_reach_every_image(sampler):
    images = labelled([0] * 30 + [1] * 30)
    draws = [few_shot(images, 4, seed, sampler).paths for seed in range(100)]
    assert len(set(draws)) == 100
    assert {path for draw in draws for path in draw} == set(images.paths)


@pytest.mark.parametrize("shots", [None, 0])
def test_no_shots_means_all_images(shots):
    images = labelled([1, 0, 1])
    assert few_shot(images, shots, 0) is images


def test_a_class_left_empty_is_said(caplog):
    few_shot(labelled([0] * 50 + [1]), 1, 0, "stratified")
    assert "1 of 2 classes have no image among the few shots" in caplog.text
    caplog.clear()
    few_shot(labelled([0] * 50 + [1]), 1, 0, "exact")
    assert not caplog.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((-1, 0), "shots: expected at least 1, or 0 for all images, got -1"),
        ((1, -3), "seed: expected at least 0, got -3"),
        ((1, 0, "random"), "sampler: expected one of .'exact', 'published', 'stratified'., got 'random'"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        few_shot(labelled([0]), *arguments)


@given(labels, st.integers(8, 11))
def test_base_and_new_split_the_classes_after_the_first_half(labels, n_classes):
    images = labelled(labels + list(range(n_classes)), n_classes)
    base, new = select_classes(images, "base"), select_classes(images, "new")
    half = (n_classes + 1) // 2
    assert base.class_names == images.class_names[:half]
    assert new.class_names == images.class_names[half:]
    assert set(base.paths).isdisjoint(new.paths)
    named = {path: images.class_names[label] for path, label in zip(images.paths, images.labels, strict=True)}
    found = {p: part.class_names[c] for part in (base, new) for p, c in zip(part.paths, part.labels, strict=True)}
    assert found == named
    assert select_classes(images, "all") is images


def test_classes_that_cannot_be_selected():
    with pytest.raises(InputError, match="classes: expected 'all', 'base' or 'new', got 'old'"):
        select_classes(labelled([0]), "old")
    with pytest.raises(InputError, match="the new half of the 2 classes has no image"):
        select_classes(labelled([0, 0], 2), "new")
