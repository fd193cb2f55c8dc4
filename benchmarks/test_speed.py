"""The benchmarks in small, for pytest-benchmark: ``pytest benchmarks``."""

import pytest
import torch

from benchmarks import text_encoder, topk_similarity

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text_case():
    shape = {"G": 1, "M": 4, "C": len(text_encoder.NAMES["DTD"]), "names": "DTD"}
    return text_encoder.build(shape, CPU)


@pytest.fixture(scope="module")
def topk_case():
    return topk_similarity.build({"B": 4, "P": 196, "N": 4, "D": 512, "C": 100}, CPU)


@pytest.mark.benchmark(group="text_encoder", min_rounds=3)
@pytest.mark.parametrize("name", ["77 tokens", "longest name", "fastprompt"])
def test_text_encoder(benchmark, text_case, name):
    benchmark(text_case.implementations[name])


@pytest.mark.benchmark(group="topk_similarity")
@pytest.mark.parametrize("name", ["GalLoP eager", "best eager", "fastprompt"])
def test_topk_similarity(benchmark, topk_case, name):
    benchmark(topk_case.implementations[name])
