import sys

import pytest
import torch
from torch import nn

from fastprompt.errors import InputError
from fastprompt.evaluation import (
    Accuracy,
    BaseToNew,
    BaseToNewSummary,
    OodDetection,
    Summary,
    base_to_new,
    evaluate_accuracy,
    ood_detection,
    predict_all,
)
from fastprompt.sources import ImageFeatures


class Source:
    """Images whose pooled feature is the answer that the fake learner will give."""

    def __init__(self, labels, answers, class_names=None):
        self.class_names = class_names
        self.labels = torch.tensor(labels)
        self.answers = torch.tensor(answers, dtype=torch.float32)
        self.asked = []

    def __len__(self):
        return len(self.answers)

    def batch(self, indices, generator=None, reads=None):
        self.asked.append(indices.tolist())
        return ImageFeatures(self.answers[indices], torch.zeros(len(indices), 1, 1)).keep(reads)


class AnswerLearner(nn.Module):
    """Says the class that the feature names, with probability 0.75; its score is the feature itself."""

    reads = frozenset({"pooled"})

    def __init__(self, class_names):
        super().__init__()
        self.class_names = tuple(class_names)
        object.__setattr__(self, "backbone", nn.Linear(1, 1))
        self.weight = nn.Parameter(torch.ones(()))

    def with_class_names(self, class_names):
        return AnswerLearner(class_names)

    def predict(self, features):
        assert not self.training and set(features.tensors) == self.reads
        assert not torch.is_grad_enabled()
        rest = 0.25 / max(len(self.class_names) - 1, 1)
        probabilities = torch.full((len(features), len(self.class_names)), rest)
        probabilities.scatter_(1, features.pooled.long()[:, None], 0.75)
        return probabilities * self.weight

    def ood_reads(self, kind):
        return {"mcm": {"pooled"}, "gl-mcm": {"pooled", "patches"}}[kind]

    def ood_score(self, features, kind="gl-mcm"):
        assert not torch.is_grad_enabled() and set(features.tensors) == self.ood_reads(kind)
        return features.pooled * {"gl-mcm": 1, "mcm": -1}[kind] * self.weight


def test_accuracy_of_known_answers():
    learner = AnswerLearner("abc").train()
    source = Source([0, 0, 1, 1, 1], [0, 1, 1, 1, 2])
    result = evaluate_accuracy(learner, source, batch_size=2, progress=False)
    assert result.top1 == pytest.approx(3 / 5)
    assert result.mean_per_class == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result.calibration_error == pytest.approx(0.15, abs=1e-6)
    assert result.images == 5
    assert source.asked == [[0, 1], [2, 3], [4]]
    assert learner.training, "the learner's mode must be left as it was"


def test_predictions_keep_the_order():
    predictions = predict_all(AnswerLearner("abc"), Source([0] * 4, [2, 0, 1, 2]), batch_size=3, progress=False)
    assert predictions.classes.tolist() == [2, 0, 1, 2]
    assert predictions.confidence.tolist() == [0.75] * 4


def test_mode_is_restored_after_an_error():
    learner = AnswerLearner("ab").train()
    with pytest.raises(RuntimeError):
        evaluate_accuracy(learner, Source([0], [5]), progress=False)
    assert learner.training


def test_new_classes_are_scored_among_their_own_names():
    result = base_to_new(
        AnswerLearner("ab"), Source([0, 1, 1, 0], [0, 1, 1, 1]), Source([0, 2], [2, 2]), ["c", "d", "e"], progress=False
    )
    assert (result.base.top1, result.new.top1) == (0.75, 0.5)
    assert result.harmonic == pytest.approx(0.6)


def test_average_row_takes_the_harmonic_mean_of_the_averages():
    pairs = [(0.9, 0.3), (0.5, 0.7)]
    results = [BaseToNew(Accuracy(base, base, 0, 1), Accuracy(new, new, 0, 1)) for base, new in pairs]
    average = BaseToNewSummary.of(results)
    assert (average.base.mean, average.new.mean) == (pytest.approx(0.7), pytest.approx(0.5))
    assert average.harmonic == pytest.approx(2 * 0.7 * 0.5 / 1.2)
    assert average.harmonic != pytest.approx(sum(result.harmonic for result in results) / 2, abs=0.01)


def test_ood_detection_uses_the_kind_and_the_direction():
    inside, outside = Source([0] * 20, list(range(20))), Source([0] * 5, [18.5, 30, 31, 32, 33])
    result = ood_detection(AnswerLearner("ab"), inside, outside, batch_size=7, progress=False)
    assert (result.auroc, result.fpr95, result.kind) == (pytest.approx(0.99), pytest.approx(0.0), "gl-mcm")
    assert result.fpr_rule == "standard"
    assert ood_detection(AnswerLearner("ab"), inside, outside, fpr_rule="gallop", progress=False) == OodDetection(
        pytest.approx(0.99), 0.2, "gl-mcm", "gallop"
    )
    flipped = ood_detection(AnswerLearner("ab"), inside, outside, "mcm", progress=False)
    assert (flipped.auroc, flipped.fpr95) == (pytest.approx(0.01), pytest.approx(1.0))


def test_summary_is_mean_and_sample_deviation():
    assert Summary.of([0.1, 0.2, 0.6]) == Summary(pytest.approx(0.3), pytest.approx(0.07**0.5), 3)
    assert Summary.of([0.5]) == Summary(0.5, None, 1)
    with pytest.raises(InputError, match="one number a seed"):
        Summary.of([])


def test_progress_bar_only_when_asked_and_on_a_terminal(capsys, monkeypatch):
    source = Source([0, 1], [0, 1])
    evaluate_accuracy(AnswerLearner("ab"), source, progress=False)
    evaluate_accuracy(AnswerLearner("ab"), source, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluate_accuracy(AnswerLearner("ab"), source, progress=False)
    assert capsys.readouterr().err == ""
    evaluate_accuracy(AnswerLearner("ab"), source, progress=True)
    assert "predict" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "answers", "batch_size", "message"),
    [
        ([0, 2], [0, 1], 8, "labels of test images: expected 0 to 1, .*got 0 to 2"),
        ([], [], 8, "test images: expected at least one, got none"),
        ([0], [0], 0, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(labels, answers, batch_size, message):
    with pytest.raises(InputError, match=message):
        evaluate_accuracy(AnswerLearner("ab"), Source(labels, answers), batch_size=batch_size, progress=False)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (("b", "a"), "^class 0 of test images: expected 'a' as in the learner, got 'b'$"),
        (("a", "b", "c"), "^class 2 of test images: expected None as in the learner, got 'c'$"),
        (("a",), "^class 1 of test images: expected 'b' as in the learner, got None$"),
    ],
)
def test_labels_of_other_classes_are_refused(theirs, message):
    with pytest.raises(InputError, match=message):
        evaluate_accuracy(AnswerLearner("ab"), Source([0], [0], theirs), progress=False)
    assert evaluate_accuracy(AnswerLearner(theirs), Source([0], [0], theirs), progress=False).top1 == 1
