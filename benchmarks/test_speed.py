"""The benchmarks for pytest-benchmark: ``pytest benchmarks``, with ``--all-shapes`` for those of the command line."""

import pytest
import torch

from benchmarks import call_overhead, conditional, patch_statistics, text_encoder, topk_similarity, train_step
from benchmarks.measure import UnavailableError
from benchmarks.similarity import around

CPU = torch.device("cpu")
ROUNDS = 5
MODULES = (topk_similarity, patch_statistics, call_overhead, text_encoder, train_step, conditional)
SMALL = {
    "topk_similarity": around(
        {"dtype": "float32", "pass": "", "B": 4, "P": 196, "N": 4, "D": 512, "C": 47, "k": 20}, {}
    ),
    "patch_statistics": around({"dtype": "float32", "pass": "", "B": 4, "P": 196, "D": 512, "C": 47}, {}),
    "call_overhead": call_overhead.BENCHMARK.shapes["cpu"],
    "text_encoder": ({"dtype": "float32", "G": 2, "M": 4, "C": 47, "names": "DTD", "sequences": 94},),
    "train_step": ({"dtype": "float32", "B": 4, "C": 47, "names": "DTD", "share": 4},),
    "conditional": ({"dtype": "float32", "method": "cocoop", "B": 2, "C": 47, "names": "DTD"},),
}


def pytest_generate_tests(metafunc):
    everything = metafunc.config.getoption("--all-shapes")
    cases = [
        pytest.param(module.BENCHMARK, shape, name, id=f"{module.BENCHMARK.name}, {name}")
        for module in MODULES
        for shape in (module.BENCHMARK.shapes["cpu"] if everything else SMALL[module.BENCHMARK.name])
        for name in module.BENCHMARK.implementations
    ]
    metafunc.parametrize(("of", "shape", "name"), cases)


def test_speed(benchmark, of, shape, name):
    case = of.build(shape, CPU)
    assert set(case.implementations) <= set(of.implementations)  # none is forgotten
    if name not in case.implementations:
        pytest.skip(f"{name} is not measured with {shape}")
    run = case.implementations[name]
    try:
        run()
    except UnavailableError as error:
        pytest.skip(str(error))
    benchmark.group = f"{of.name}: {', '.join(f'{key}={value}' for key, value in shape.items())}"
    benchmark.pedantic(run, rounds=ROUNDS, iterations=case.calls)
