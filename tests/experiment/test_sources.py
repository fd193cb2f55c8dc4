"""Features of whole data sets."""

import copy

import pytest
import torch

from fastprompt import InputError
from fastprompt.data import load_dataset
from fastprompt.experiment.augmentation import training_source
from fastprompt.experiment.configure import configure


@pytest.mark.parametrize("options", [{}, {"cache": False}, {"augment": True}, {"augment": True, "views": 2}], ids=str)
def test_features_of_another_backbone_are_refused(photos, vit_backbone, tmp_path, options):
    config = configure("coop", data=photos, cache_dir=tmp_path, **options)
    source = training_source(load_dataset(photos).train, vit_backbone, config, progress=False)
    features = source.batch(torch.tensor([3, 0]), torch.Generator())
    assert len(vit_backbone.accept(features)) == 2
    other = copy.copy(vit_backbone)
    other.fingerprint = "1" * 16
    with pytest.raises(InputError, match="got those of another backbone with"):
        other.accept(features)
