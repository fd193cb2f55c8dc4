"""The benchmarks for pytest-benchmark: ``pytest benchmarks``, with ``--all-shapes`` for those of the command line.

Nothing is checked, and times are those of a call: where peers do a share of the work, or fewer images, that is theirs.
"""

import pytest
import torch

from benchmarks import call_overhead, drop_in
from benchmarks.command_line import BENCHMARKS
from benchmarks.measure import UnavailableError
from benchmarks.similarity import around

CPU = torch.device("cpu")
ROUNDS = 5
SMALL = {
    "topk_similarity": around(
        {"dtype": "float32", "pass": "", "B": 4, "P": 196, "N": 4, "D": 512, "C": 47, "k": 20}, {}
    ),
    "patch_statistics": around({"dtype": "float32", "pass": "", "B": 4, "P": 196, "D": 512, "C": 47}, {}),
    "call_overhead": call_overhead.BENCHMARK.shapes["cpu"],
    "text_encoder": ({"dtype": "float32", "G": 2, "M": 4, "C": 47, "names": "DTD", "sequences": 94},),
    "train_step": ({"dtype": "float32", "B": 4, "C": 47, "names": "DTD", "share": 4},),
    "drop_in": (
        {"dtype": "float32", "layer": drop_in.TEXT_COOP, "B": 0, "C": 47, "n": 1},
        {"dtype": "float32", "layer": drop_in.LOCAL, "B": 4, "C": 47, "n": 4},
    ),
    "conditional": ({"dtype": "float32", "method": "cocoop", "B": 2, "C": 47, "names": "DTD"},),
}


def pytest_generate_tests(metafunc):
    everything = metafunc.config.getoption("--all-shapes")
    cases = [
        pytest.param(of, shape, name, id=f"{of.name}, {name}")
        for of in BENCHMARKS.values()
        for shape in (of.shapes["cpu"] if everything else SMALL[of.name])
        for name in of.implementations
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
