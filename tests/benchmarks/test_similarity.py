"""The peers of the similarity kernels: they compute the same, in both passes and precisions."""

import pytest
import torch

from benchmarks import break_even, call_overhead, patch_statistics, similarity, topk_similarity
from benchmarks.measure import UnavailableError, WrongResultError, check
from benchmarks.optional import compiled

CPU = torch.device("cpu")
SMALL = {"B": 3, "P": 49, "N": 4, "D": 512, "C": 200, "k": 20}


def _chosen(module, direction):
    if module is topk_similarity:
        return {name: one for name, one in module.peers().items() if name.endswith("eager") or name == "fastprompt"}
    return dict(zip(("dense eager", "best eager", "fastprompt"), module.computations(direction), strict=True))


@pytest.mark.parametrize("module", [topk_similarity, patch_statistics])
@pytest.mark.parametrize("direction", similarity.PASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_compute_the_same(module, direction, dtype):
    case = module.case({**SMALL, "dtype": dtype, "pass": direction}, CPU, _chosen(module, direction))
    first_calls, left_out = check(case)
    assert len(first_calls) == 3 and not left_out
    assert len(case.truth()) == (1 if direction == "forward" else 3 if module is topk_similarity else 5)


def test_a_kernel_that_takes_one_patch_too_many_is_found():
    def one_more(patches, prompts, k):
        return topk_similarity.topk_mean_dense(patches, prompts, [count + 1 for count in k])

    shape = {**SMALL, "dtype": "bfloat16", "pass": "forward+backward"}
    with pytest.raises(WrongResultError, match="one more: result 0"):
        check(topk_similarity.case(shape, CPU, {"one more": one_more}))


def test_a_baseline_that_is_wrong_is_found(monkeypatch):
    """The truth is a definition in float64, not the code of any peer."""
    real = topk_similarity.topk_mean_dense
    monkeypatch.setattr(
        topk_similarity, "topk_mean_dense", lambda patches, prompts, k: 1.001 * real(patches, prompts, k)
    )
    monkeypatch.setattr(patch_statistics, "score_dense", lambda *inputs: (1.001 * inputs[0] @ inputs[1].T,))
    for module in (topk_similarity, patch_statistics):
        chosen = dict([next(iter(_chosen(module, "forward").items()))])
        case = module.case({**SMALL, "dtype": "float32", "pass": "forward"}, CPU, chosen)
        with pytest.raises(WrongResultError, match="eager: result 0"):
            check(case)


@pytest.mark.parametrize("module", [topk_similarity, patch_statistics])
@pytest.mark.parametrize("direction", similarity.PASSES)
def test_the_truth_is_in_float64_however_images_are_grouped(monkeypatch, module, direction):
    shape = {**SMALL, "dtype": "float32", "pass": direction}
    whole = module.case(shape, CPU, _chosen(module, direction)).truth()
    assert {tensor.dtype for tensor in whole} == {torch.float64}
    monkeypatch.setattr(similarity.truth, "__defaults__", (2,))
    for one, other in zip(module.case(shape, CPU, _chosen(module, direction)).truth(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.compile
def test_code_that_does_not_compile_is_left_out_with_the_reason(monkeypatch, tmp_path):
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nonexistent"))
    with pytest.raises(UnavailableError, match=r"torch\.compile failed: InvalidCxxCompiler: No working C\+\+ compiler"):
        compiled(lambda x: x.sin().sum())(torch.ones(10))


@pytest.mark.parametrize(("direction", "products"), [("forward", 1), ("forward+backward", 3)])
def test_the_floor_makes_the_products_of_its_pass(monkeypatch, direction, products):
    made, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: made.append((a.shape, b.shape)) or real(a, b, out=out))
    patches, prompts = torch.ones(2, 5, 3), torch.ones(4, 7, 3)
    similarity.floors({"pass": direction}, patches, prompts, 56)["floor: products"]()
    assert made == [((28, 3), (3, 10)), ((28, 10), (10, 3)), ((10, 28), (28, 3))][:products]


def test_what_is_made_for_processors_has_no_call_overhead_on_a_gpu(monkeypatch):
    drawn = similarity.draw({**call_overhead.BENCHMARK.shapes["cpu"][0]}, CPU)
    monkeypatch.setattr(similarity, "draw", lambda shape, device: drawn)
    shape, kinds = call_overhead.BENCHMARK.shapes["cuda"][0], ("cpu", "cuda")
    names = [set(call_overhead.build(shape, torch.device(kind)).implementations) for kind in kinds]
    assert names[0] - names[1] == {"impl='blocked'"} and "impl='auto'" in names[1]


def test_around_changes_one_parameter_at_a_time():
    middle = {"pass": "", "B": 2, "C": 3}
    shapes = similarity.around(middle, {"B": (1, 4), "C": (9,)})
    assert [(shape["B"], shape["C"]) for shape in shapes if shape["pass"] == "forward"] == [
        (2, 3),
        (1, 3),
        (4, 3),
        (2, 9),
    ]
    assert [shape["pass"] for shape in shapes] == ["forward"] * 4 + ["forward+backward"] * 4


def test_break_even_says_where_eager_wins(monkeypatch, tmp_path):
    grid = {"IMAGES": (1, 2), "CLASSES": (3, 5), "PATCHES": (24,), "SECONDS": 0.0, "LARGEST": 2 * 24 * 3}
    for name, values in grid.items():
        monkeypatch.setattr(break_even, name, values)
    text = break_even.measure_grid(CPU, tmp_path)
    assert text == (tmp_path / "break_even-cpu.md").read_text()
    assert text.count("| B=2 |") == 4 and text.count("–") == 4  # B=2, C=5 is beyond the largest
    assert len((tmp_path / "break_even.csv").read_text().splitlines()) == 1 + 4 * 3
    row = {"op": "x", "pass": "forward", "P": 4, "B": 1, "C": 3, "dtype": "float32", "device": "y"}
    (one,) = break_even.tables([{**row, "ratio": "0.994"}, {**row, "C": 5, "ratio": "1.250"}])
    assert one.rows[0].cells == ("0.99 (eager wins)", "1.25")
