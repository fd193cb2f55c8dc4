import itertools

import numpy as np
import pytest
import torch

from fastprompt.errors import InputError
from fastprompt.evaluation import (
    accuracy,
    auroc,
    expected_calibration_error,
    fpr_at_recall,
    harmonic_mean,
    mean_per_class_accuracy,
)


def pairwise_auroc(in_scores, out_scores):
    pairs = list(itertools.product(in_scores.tolist(), out_scores.tolist()))
    return sum((o > i) + 0.5 * (o == i) for i, o in pairs) / len(pairs)


def sorted_fpr(in_scores, out_scores, kept):
    """`kept`: how many in-distribution images the threshold must keep."""
    threshold = sorted(in_scores.tolist())[kept - 1]
    return sum(score <= threshold for score in out_scores.tolist()) / len(out_scores)


def test_accuracy_and_mean_per_class_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    predicted = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    assert accuracy(predicted, labels) == pytest.approx(5 / 7)
    # Class 2 has no image: it is predicted once and must not pull the mean down.
    assert mean_per_class_accuracy(predicted, labels) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)


def test_one_class_is_enough():
    zeros = torch.zeros(3, dtype=torch.long)
    assert accuracy(zeros, zeros) == mean_per_class_accuracy(zeros, zeros) == 1.0


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = torch.tensor([True, True, True, False, True, False])
    expected = 4 / 6 * abs(3 / 4 - 0.95) + 2 / 6 * abs(1 / 2 - 0.55)
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_of_certain_and_right_is_zero_even_if_softmax_rounds_up():
    confidence = torch.tensor([1.0, 1.0000001, 1.0])
    assert expected_calibration_error(confidence, torch.ones(3, dtype=torch.bool)) == pytest.approx(0, abs=1e-9)


def test_lower_score_is_in_distribution():
    low, high = torch.linspace(-2, -1.5, 40), torch.linspace(-1.4, -1, 30)
    assert (auroc(low, high), fpr_at_recall(low, high)) == (1.0, 0.0)
    assert (auroc(high, low), fpr_at_recall(high, low)) == (0.0, 1.0)


@pytest.mark.parametrize("levels", [5, 10**6])
def test_random_scores_against_plain_counting(levels):
    generator = torch.Generator().manual_seed(0)
    in_scores = torch.randint(levels, (200,), generator=generator) / levels - 3
    out_scores = torch.randint(levels, (150,), generator=generator) / levels - 2.9
    assert auroc(in_scores, out_scores) == pytest.approx(pairwise_auroc(in_scores, out_scores), abs=1e-6)
    assert fpr_at_recall(in_scores, out_scores) == pytest.approx(sorted_fpr(in_scores, out_scores, 190), abs=1e-6)


@pytest.mark.parametrize("count", [20, 40, 100, 260, 1000])
def test_threshold_keeps_exactly_95_percent_where_that_is_possible(count):
    scores = torch.arange(count).float()
    assert fpr_at_recall(scores, scores + 0.5) == pytest.approx(sorted_fpr(scores, scores + 0.5, count * 95 // 100))


def test_threshold_keeps_at_least_95_percent_otherwise():
    scores = torch.arange(10).float()  # 9 of 10 are too few
    assert fpr_at_recall(scores, scores) == pytest.approx(1.0)
    assert fpr_at_recall(scores, scores, recall=0.9) == pytest.approx(0.9)


def published_fpr(in_scores, out_scores, recall=0.95):
    """The steps of GalLoP's and GL-MCM's code, on all thresholds from the loosest that keeps every known image."""
    values = np.concatenate([-in_scores.double().numpy(), -out_scores.double().numpy()])
    known = np.arange(len(values)) < len(in_scores)
    order = np.argsort(values, kind="mergesort")[::-1]
    values, known = values[order], known[order]
    thresholds = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    kept = np.cumsum(known)[thresholds]
    wrong = 1 + thresholds - kept
    loosest = np.searchsorted(kept, kept[-1])
    kept, wrong = kept[loosest::-1], wrong[loosest::-1]
    return wrong[np.argmin(np.abs(kept / kept[0] - recall))] / len(out_scores)


@pytest.mark.parametrize("levels", [3, 12, 60, 10**6])
def test_gallops_rule_against_the_steps_of_its_code(levels):
    generator = torch.Generator().manual_seed(levels)
    for n in [*range(1, 60), 200, 1000]:
        in_scores = torch.randint(levels, (n,), generator=generator) / levels - 2
        out_scores = torch.randint(levels, (77,), generator=generator) / levels - 1.8
        ours = fpr_at_recall(in_scores, out_scores, rule="gallop")
        assert ours == pytest.approx(published_fpr(in_scores, out_scores), abs=1e-12), n


def test_gallops_rule_counts_up_to_the_next_known_image():
    known = torch.arange(100).float()  # 95 are kept, up to the score 94
    unknown = torch.tensor([50, 94, 94.5, 94.9, 95, 96, 200, 201])
    assert fpr_at_recall(known, unknown) == pytest.approx(2 / 8)
    assert fpr_at_recall(known, unknown, rule="gallop") == 4 / 8
    assert fpr_at_recall(known[:5], unknown, rule="gallop") == 0  # 5 of 5 are nearer to 95 % than 4
    assert fpr_at_recall(known[:5], torch.tensor([4.0, 4.1]), rule="gallop") == 0.5
    assert fpr_at_recall(known[:12], torch.tensor([10.5, 11.5]), rule="gallop") == 0.5  # 11 of 12 are kept
    assert auroc(known, unknown) == pytest.approx(pairwise_auroc(known, unknown))


@pytest.mark.parametrize("n, gap", [(100, 0.0095), (10_000, 0.0001)])
def test_gallops_rule_is_higher_on_average_by_what_the_documentation_says(n, gap):
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(200):
        scores = torch.rand(2, n, generator=generator, dtype=torch.float64)
        gaps.append(fpr_at_recall(*scores, rule="gallop") - fpr_at_recall(*scores))
    assert min(gaps) > -1e-6
    assert np.mean(gaps) == pytest.approx(gap, rel=0.2)


def test_close_scores_stay_apart():
    in_scores = torch.tensor([50.0, 51.0, 52.0])  # a sigmoid in float32 makes all of these 1
    assert auroc(in_scores, in_scores + 10) == 1.0
    assert auroc(in_scores, in_scores[:1].expand(3)) == pytest.approx(1 / 6)


def test_harmonic_mean():
    assert harmonic_mean(0.8047, 0.7169) == pytest.approx(0.7583, abs=5e-5)
    assert harmonic_mean(0.0, 0.0) == 0.0


def test_bad_input_is_one_sentence():
    with pytest.raises(InputError, match=r"in_scores .* got shape \(0,\)"):
        auroc(torch.empty(0), torch.ones(2))
    with pytest.raises(InputError, match=r"out_scores .* 1 NaN among 2"):
        fpr_at_recall(torch.ones(2), torch.tensor([0.0, float("nan")]))
    with pytest.raises(InputError, match=r"out_scores .* 1 NaN among 2"):
        fpr_at_recall(torch.ones(2), torch.tensor([0.0, float("nan")]), rule="gallop")
    for rule in ("standard", "gallop"):
        with pytest.raises(InputError, match="recall: expected a share between 0 and 1, got 95"):
            fpr_at_recall(torch.zeros(2), torch.ones(2), recall=95, rule=rule)
    with pytest.raises(InputError, match=r"rule: expected one of \('standard', 'gallop'\), got 'mcm'"):
        fpr_at_recall(torch.ones(2), torch.ones(2), rule="mcm")
    with pytest.raises(InputError, match=r"\(2,\) and \(3,\)"):
        accuracy(torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long))
