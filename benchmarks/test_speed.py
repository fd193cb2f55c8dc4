"""The benchmarks for pytest-benchmark: ``pytest benchmarks``, with ``--all-shapes`` for those of the command line."""

import pytest
import torch

from benchmarks import call_overhead, patch_statistics, text_encoder, topk_similarity
from benchmarks.measure import UnavailableError
from benchmarks.similarity import PASSES, around

CPU = torch.device("cpu")
ROUNDS = 5
MODULES = (topk_similarity, patch_statistics, call_overhead, text_encoder)
SMALL = {
    "topk_similarity": around(
        {"dtype": "float32", "pass": "", "B": 4, "P": 196, "N": 4, "D": 512, "C": 47, "k": 20}, {}
    ),
    "patch_statistics": around({"dtype": "float32", "pass": "", "B": 4, "P": 196, "D": 512, "C": 47}, {}),
    "call_overhead": call_overhead.BENCHMARK.shapes["cpu"],
    "text_encoder": ({"dtype": "float32", "G": 2, "M": 4, "C": 47, "names": "DTD"},),
}
NAMES = {
    "topk_similarity": tuple(topk_similarity.peers()),
    "patch_statistics": tuple(patch_statistics.peers(PASSES[0])),
    "call_overhead": ("definition", "impl='reference'", "impl='auto'", "impl='blocked'"),
    "text_encoder": ("77 tokens", "77 tokens, torch.compile", "longest name", "fastprompt"),
}


def pytest_generate_tests(metafunc):
    everything = metafunc.config.getoption("--all-shapes")
    cases = [
        pytest.param(module.BENCHMARK, shape, name, id=f"{module.BENCHMARK.name}, {name}")
        for module in MODULES
        for shape in (module.BENCHMARK.shapes["cpu"] if everything else SMALL[module.BENCHMARK.name])
        for name in NAMES[module.BENCHMARK.name]
    ]
    metafunc.parametrize(("of", "shape", "name"), cases)


def test_speed(benchmark, of, shape, name):
    case = of.build(shape, CPU)
    if name not in case.implementations:
        pytest.skip(f"{name} is not measured with {shape}")
    run = case.implementations[name]
    try:
        run()
    except UnavailableError as error:
        pytest.skip(str(error))
    benchmark.group = f"{of.name}: {', '.join(f'{key}={value}' for key, value in shape.items())}"
    benchmark.pedantic(run, rounds=ROUNDS, iterations=case.calls)
