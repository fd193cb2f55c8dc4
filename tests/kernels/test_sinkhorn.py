"""sinkhorn: every implementation against the formula in float64, the stopping rule against the published loop."""

import pytest
import torch
from fastprompt_kernels import iterations_until, sinkhorn, sinkhorn_changes
from fastprompt_kernels.sinkhorn import blocked
from fastprompt_kernels.testing import assert_as_accurate, poisoned_memory

from .support import Seen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_implementation = pytest.mark.parametrize("impl", ["reference", "blocked", "triton"])
COST = torch.ones(2, 3, 4)


def draw_cost(shape, dtype=torch.float32, seed=0, spread=0.6):
    """Costs as differences of cosines have them."""
    generator = torch.Generator().manual_seed(seed)
    return (1 - spread * torch.rand(shape, generator=generator)).to(DEVICE, dtype)


def published(cost, eps=0.1, iterations=100, tolerance=None):
    """The plain loop of PLOT with its unshifted kernel: the plan and the iterations made."""
    kernel, (M, N) = (-cost / eps).exp(), cost.shape[-2:]
    rows, columns = torch.ones_like(cost[..., 0]), torch.ones_like(cost[..., 0, :])
    made, change = 0, torch.inf
    while made < iterations and not (tolerance is not None and change < tolerance):
        before, made = rows, made + 1
        rows = 1 / M / (kernel * columns[..., None, :]).sum(-1)
        columns = 1 / N / (kernel * rows[..., None]).sum(-2)
        change = (rows - before).abs().mean().item()
    return rows[..., None] * kernel * columns[..., None, :], made


def in_log_domain(cost, eps, iterations):
    """The formula for any eps."""
    (M, N), cost = cost.shape[-2:], cost / eps
    columns = torch.zeros_like(cost[..., :1, :])
    for _ in range(iterations):
        rows = -torch.tensor(float(M)).log() - (columns - cost).logsumexp(-1, keepdim=True)
        columns = -torch.tensor(float(N)).log() - (rows - cost).logsumexp(-2, keepdim=True)
    return (rows + columns - cost).exp()


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "iterations"),
    [((5, 49, 4), 30), ((2, 3, 10, 6), 7), ((3, 196, 3), 5), ((40, 1, 5), 3), ((6, 5, 1), 2), ((4, 4), 1)],
)
def test_error_rule(impl, dtype, shape, iterations):
    cost = draw_cost(shape, dtype)
    oracle = published(cost.double(), iterations=iterations)[0]
    with poisoned_memory():
        actual = sinkhorn(cost, iterations=iterations, impl=impl)
    # The exponents of a row are wrong by their rounding, and so, in parts of themselves, are the numbers of a plan.
    terms = oracle * (1 + (cost.amax() - cost.amin()).item() / 0.1)
    assert_as_accurate(actual, published(cost.float(), iterations=iterations)[0], oracle, terms)


@each_implementation
@pytest.mark.parametrize("eps", [1 / 30, 0.1, 3.0])
def test_cosines_of_any_size_at_small_eps(impl, eps):
    cost = draw_cost((30, 12, 4), spread=2.0)
    plan = sinkhorn(cost, eps=eps, iterations=30, impl=impl)
    torch.testing.assert_close(plan.double(), in_log_domain(cost.double(), eps, 30), rtol=1e-4, atol=1e-8)


@each_implementation
def test_marginals(impl):
    plan = sinkhorn(draw_cost((8, 49, 4)), iterations=30, impl=impl)
    torch.testing.assert_close(plan.sum(-2), torch.full((8, 4), 1 / 4, device=DEVICE), rtol=1e-6, atol=0)
    torch.testing.assert_close(plan.sum(-1), torch.full((8, 49), 1 / 49, device=DEVICE), rtol=1e-5, atol=0)
    assert (plan >= 0).all()


@each_implementation
@pytest.mark.parametrize("size", [1e1, 1e3, 1e6])
def test_costs_beyond_the_kernel_give_no_0_over_0(impl, size):
    cost = size * torch.randn(20, 17, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cost[:, :, 2] += size * 10  # a column that is the worst of every row
    for tolerance in (None, 1e-2):
        plan = sinkhorn(cost, iterations=20, tolerance=tolerance, impl=impl)
        torch.testing.assert_close(plan.sum(-2), torch.full((20, 5), 1 / 5, device=DEVICE), rtol=1e-5, atol=0)
        assert plan.isfinite().all()


@each_implementation
@pytest.mark.parametrize(("shape", "seed"), [((6, 5, 49, 4), 0), ((3, 10, 4), 1), ((50, 10, 2), 2), ((5, 1, 1), 3)])
def test_stopping_rule_is_the_published_one(impl, shape, seed):
    cost = draw_cost(shape, seed=seed)
    for tolerance in (1.0, 1e-2, 1e-3):
        expected, made = published(cost.double(), tolerance=tolerance)
        changes = sinkhorn_changes(cost, iterations=20, impl=impl)
        assert int((changes < tolerance).nonzero()[0]) + 1 == made
        plan = sinkhorn(cost, iterations=20, tolerance=tolerance, impl=impl)
        assert torch.equal(plan, sinkhorn(cost, iterations=made, impl=impl))
        torch.testing.assert_close(plan.double(), expected, rtol=2e-5, atol=0)
    # No more than asked for where the rule does not stop before.
    assert torch.equal(sinkhorn(cost, iterations=1, tolerance=1e-9, impl=impl), sinkhorn(cost, iterations=1, impl=impl))


@pytest.mark.parametrize(
    ("made", "expected"),
    [(1, [8]), (8, [8]), (9, [8, 16]), (17, [8, 16, 32]), (65, [8, 16, 32, 64, 100]), (100, [8, 16, 32, 64, 100])],
)
def test_iterations_until_looks_further_until_it_has_seen_enough(made, expected):
    changes, looks = torch.ones(100), []
    changes[made - 1 :] = 1e-3

    def look(count):
        looks.append(count)
        return changes[:count]

    assert iterations_until(1e-2, 100, look) == made
    assert looks == expected
    assert iterations_until(1e-4, 20, look) == 20


def test_changes_of_parts_make_those_of_the_whole():
    cost = draw_cost((6, 10, 4))
    whole = sinkhorn_changes(cost, iterations=12)
    parts = torch.stack([sinkhorn_changes(part, iterations=12) for part in cost.split(2)]).mean(0)
    torch.testing.assert_close(parts, whole)


@each_implementation
def test_not_a_number_stays_in_its_problem_and_stops_nothing(impl):
    cost = draw_cost((4, 10, 3))
    clean = sinkhorn(cost, iterations=9, impl=impl)
    cost[1, 2, 0] = torch.nan
    others = torch.tensor([0, 2, 3], device=DEVICE)
    for tolerance in (None, 1e-2):
        plan = sinkhorn(cost, iterations=9, tolerance=tolerance, impl=impl)
        assert torch.equal(plan[others], clean[others])
        assert plan[1].isnan().all()


@each_implementation
def test_no_problems(impl):
    assert sinkhorn(COST[:0].to(DEVICE), tolerance=1e-2, impl=impl).shape == (0, 3, 4)
    assert sinkhorn_changes(COST[:0].to(DEVICE), iterations=3, impl=impl).tolist() == [0, 0, 0]


@each_implementation
def test_dtypes_strides_and_gradients(impl):
    cost = draw_cost((4, 5, 3, 6)).permute(0, 3, 1, 2)
    plan = sinkhorn(cost.requires_grad_(), iterations=5, impl=impl)
    assert not plan.requires_grad
    assert torch.equal(plan, sinkhorn(cost.detach().contiguous(), iterations=5, impl=impl))
    assert sinkhorn(cost.bfloat16(), iterations=5, impl=impl).dtype == torch.float32
    if impl != "triton":
        assert sinkhorn(cost.double(), impl=impl).dtype == torch.float64
        assert sinkhorn_changes(cost.double(), impl=impl).dtype == torch.float64


def test_blocked_holds_a_tile_at_a_time(monkeypatch):
    tile = 7 * 49 * 4 * 4
    monkeypatch.setattr(blocked, "TILE_BYTES", tile)
    monkeypatch.setattr(blocked, "LITTLE", 2**40)  # what other threads do is not seen
    cost = draw_cost((100, 49, 4))
    with Seen() as seen:
        changes = blocked.changes(cost, 0.1, 20)
    assert seen.largest == tile
    torch.testing.assert_close(changes, sinkhorn_changes(cost, iterations=20, impl="reference"))
    plan = blocked.plan(cost, 0.1, 20, 1e-2)
    torch.testing.assert_close(plan, sinkhorn(cost, iterations=20, tolerance=1e-2, impl="reference"))


@pytest.mark.parametrize("tolerance", [None, 1e-2])
def test_the_host_does_not_wait_for_the_kernel(tolerance):
    from fastprompt_kernels.sinkhorn import triton

    with Seen() as seen:
        triton.plan(draw_cost((5, 10, 4)), 0.1, 20, tolerance)
    assert "aten::empty.memory_format" in seen.names
    assert not seen.names & {"aten::_local_scalar_dense", "aten::nonzero"}


@pytest.mark.compile
@each_implementation
@pytest.mark.parametrize("tolerance", [None, 1e-2])
def test_opcheck_and_compile(impl, tolerance):
    cost = draw_cost((2, 3, 5, 4))
    torch.library.opcheck(torch.ops.fastprompt.sinkhorn.default, (cost, 0.1, 5, tolerance, impl))
    torch.library.opcheck(torch.ops.fastprompt.sinkhorn_changes.default, (cost, 0.1, 5, impl))

    def scores(similarity):
        plan = sinkhorn(1 - similarity, iterations=5, tolerance=tolerance, impl=impl)
        return (similarity * plan).sum((-1, -2))

    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cost), scores(cost))
    expected = scores(cost)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(scores(cost), expected)


@pytest.mark.parametrize(
    ("cost", "keywords", "error", "sentence"),
    [
        (COST.long(), {}, TypeError, "cost must be a floating-point tensor, got torch.int64"),
        ([[1.0]], {}, TypeError, "cost must be a floating-point tensor, got list"),
        (COST[0, 0], {}, ValueError, r"cost must have shape \(..., M, N\) with M and N at least 1, got \(4,\)"),
        (COST[:, :0], {}, ValueError, r"with M and N at least 1, got \(2, 0, 4\)"),
        (COST, {"eps": 0.0}, ValueError, "eps must be a finite number above 0, got 0.0"),
        (COST, {"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        (COST, {"tolerance": 0.0}, ValueError, "tolerance must be a number above 0 or None, got 0.0"),
        (COST, {"impl": "cuda"}, ValueError, "impl must be one of 'auto', .*, got 'cuda'"),
        (COST.double(), {"impl": "triton"}, ValueError, r"not torch\.float64"),
        (COST.expand(2, 3, 4)[:, :1].expand(2, 5000, 4), {"impl": "triton"}, ValueError, "at most 4096 .*, not 32768"),
    ],
)
def test_arguments_that_do_not_fit(cost, keywords, error, sentence):
    with pytest.raises(error, match=sentence):
        sinkhorn(cost.to(DEVICE) if isinstance(cost, torch.Tensor) else cost, **keywords)
