"""What `fit` and the protocols take beside sources: data sets and loaders of torch, features in memory."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from fastprompt import CoOp, InputError, as_source, evaluate_accuracy, ood_detection
from fastprompt.sources import CachedSource
from fastprompt.training import TrainingSettings, fit

NAMES = ("cat", "dog", "polar bear")
SETTINGS = TrainingSettings(epochs=2, batch_size=4, warmup_epochs=0)


class Pairs(torch.utils.data.Dataset):
    """Items in a list, which counts how often each is read."""

    def __init__(self, items):
        self.items, self.read = items, [0] * len(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.read[index] += 1
        return self.items[index]


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 2])


@pytest.fixture
def learner(vit_backbone):
    torch.manual_seed(0)
    return CoOp(vit_backbone, NAMES)


def trained(learner, images):
    fit(learner, images, SETTINGS, progress=False)
    return learner.context.detach().clone()


@pytest.mark.parametrize(
    "given",
    [
        lambda x, y, f: TensorDataset(x, y),
        lambda x, y, f: DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True, drop_last=True),
        lambda x, y, f: DataLoader(TensorDataset(x, y), batch_size=5),
        lambda x, y, f: (f, y),
        lambda x, y, f: [f, y.tolist()],
    ],
    ids=["dataset", "shuffled loader", "loader", "features", "features and a list"],
)
def test_fit_trains_alike_on_whatever_it_is_given(learner, pixels, labels, given):
    start, features = learner.context.detach().clone(), learner.backbone.encode_images(pixels)
    expected = trained(learner, CachedSource(features, labels))
    assert not torch.equal(expected, start)
    with torch.no_grad():
        learner.context.copy_(start)
    torch.testing.assert_close(trained(learner, given(pixels, labels, features)), expected, rtol=0, atol=1e-6)


def test_every_image_is_read_once_however_many_epochs(learner, pixels, labels):
    images = Pairs(list(zip(pixels, labels.tolist(), strict=True)))
    fit(learner, DataLoader(images, batch_size=4, shuffle=True), SETTINGS, progress=False)
    assert images.read[1:] == [1] * 8 and images.read[0] <= 2, "one more look at the first tells its type"


def test_a_sampler_that_chooses_images_is_kept(learner, pixels, labels):
    sampler = WeightedRandomSampler([0, 0, 1, 0, 0, 0, 0, 0, 0], num_samples=5)
    source = as_source(DataLoader(TensorDataset(pixels, labels), sampler=sampler), learner, progress=False)
    assert source.labels.tolist() == [2] * 5


def test_protocols_take_loaders(learner, pixels, labels):
    images = TensorDataset(pixels, labels)
    result = evaluate_accuracy(learner, DataLoader(images, batch_size=2, shuffle=True), progress=False)
    truth = learner.predict(learner.backbone.encode_images(pixels)).argmax(1) == labels
    assert result.images == 9 and result.top1 == pytest.approx(truth.double().mean().item())
    detection = ood_detection(learner, images, images, progress=False)
    assert detection.auroc == pytest.approx(0.5)


def test_a_line_says_what_is_encoded(learner, pixels, labels, capsys):
    fit(learner, TensorDataset(pixels, labels), SETTINGS)
    evaluate_accuracy(learner, TensorDataset(pixels, labels))
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "encoding" in line] == ["encoding training images", "encoding test images"]


class Stream(IterableDataset):
    def __iter__(self):
        yield from [(torch.zeros(3, 32, 32), 1)] * 3


def test_a_stream_is_taken_in_its_own_order(learner):
    assert as_source(Stream(), learner, progress=False).labels.tolist() == [1, 1, 1]


WRONG = {
    "path": ("photos", r"training images: expected feature_source\(images, backbone\), .* got str"),
    "pixels": (torch.zeros(2, 3, 32, 32), r"expected feature_source.*got a tensor of shape \(2, 3, 32, 32\)"),
    "pixels and labels": ((torch.zeros(2, 3, 32, 32), [0, 1]), "expected feature_source.*got a tuple of 2"),
    "items": (Pairs([(torch.zeros(3, 32, 32),)]), r"expected items \(image, label\), got a tuple of 1"),
    "strings": (Pairs([("cat.jpg", 0)]), r"images as tensors \(3, S, S\), got str: .*image_transform\(backbone\)"),
    "size": (
        Pairs([(torch.zeros(3, 8, 8), 0)]),
        r"expected a tensor \(B, 3, 32, 32\), got shape \(1, 3, 8, 8\)",
    ),
    "names": (Pairs([(torch.zeros(3, 32, 32), "cat")]), r"labels: expected integers \(n,\).*got .*cat"),
    "one-hot": (Pairs([(torch.zeros(3, 32, 32), torch.eye(3)[0])]), r"labels: expected integers .*got shape \(1, 3\)"),
    "empty": (Pairs([]), "training images: expected at least one image, got an empty Pairs"),
    "range": (Pairs([(torch.zeros(3, 32, 32), 7)]), "labels of training images: expected 0 to 2, .*got 7 to 7"),
    "batches": (
        DataLoader(Pairs([(torch.zeros(3, 32, 32), 0)]), collate_fn=lambda items: items),
        r"expected batches of \(images, labels\), got a list of 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_set_of_labelled_images_gets_a_sentence(learner, case):
    given, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        fit(learner, given, SETTINGS, progress=False)


def test_settings_and_features_of_another_kind_get_a_sentence(learner, pixels, labels):
    features = learner.backbone.encode_images(pixels)
    with pytest.raises(InputError, match=r"settings: expected TrainingSettings, such as .*got Recipe"):
        fit(learner, (features, labels), learner.recipes["default"], progress=False)
    with pytest.raises(InputError, match=r"features: expected ImageFeatures\(pooled .*got Tensor"):
        CachedSource(features.pooled, labels)
    with pytest.raises(InputError, match=r"labels: expected integers .*of torch\.float64"):
        CachedSource(features, labels.double() / 2)
    with pytest.raises(InputError, match="labels must be as many as the 9 cached images, not 2"):
        CachedSource(features, [0, 1])
