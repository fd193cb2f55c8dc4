"""topk_similarity on the meta device, under torch.vmap and in ONNX."""

import warnings

import pytest
import torch
from fastprompt_kernels import onnx_decompositions, selected_patches, topk_similarity

from tests.kernels.support import DEVICE, on_device

each_implementation = pytest.mark.parametrize("impl", on_device("auto", "reference", "dense", "blocked", "triton"))
K = [[2, 3], [1, 20]]


@pytest.mark.parametrize("impl", ["auto", "reference", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(impl, dtype):
    def shapes(device):
        patches = torch.ones(2, 9, 8, dtype=dtype, device=device, requires_grad=True)
        prompts = torch.ones(2, 3, 8, dtype=dtype, device=device, requires_grad=True)
        values = topk_similarity(patches, prompts, K, impl=impl)
        gradients = torch.autograd.grad(values.sum(), (patches, prompts))
        tensors = [values, *gradients, selected_patches(patches, prompts, K)]
        assert {tensor.device.type for tensor in tensors} == {device}
        return [(tensor.shape, tensor.dtype) for tensor in tensors]

    assert shapes("meta") == shapes("cpu")


@each_implementation
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (2, 1)])
def test_vmap_equals_a_loop_in_values_and_gradients(impl, in_dims):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    patches, prompts, grad = draw(4, 2, 9, 8), draw(4, 2, 3, 8), draw(2, 2, 3)
    inputs = [tensor if dim is not None else tensor[0] for tensor, dim in zip((patches, prompts), in_dims, strict=True)]

    def values_and_gradients(patches, prompts):
        def loss(patches, prompts):
            values = topk_similarity(patches, prompts, K, impl=impl)
            return (values * grad).sum(), values

        gradients, values = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(patches, prompts)
        return (
            topk_similarity(patches, prompts, K, impl=impl),
            values,
            *gradients,
            selected_patches(patches, prompts, K),
        )

    each = [
        [tensor if dim is None else tensor[i] for tensor, dim in zip(inputs, in_dims, strict=True)] for i in range(4)
    ]
    expected = [torch.stack(tensors) for tensors in zip(*(values_and_gradients(*one) for one in each), strict=True)]
    moved = [tensor if dim is None else tensor.movedim(0, dim) for tensor, dim in zip(inputs, in_dims, strict=True)]
    with warnings.catch_warnings():
        if impl != "reference":
            warnings.simplefilter("error")  # torch warns where it falls back to a loop of its own
        actual = torch.vmap(values_and_gradients, in_dims)(*moved)
    for left, right in zip(actual, expected, strict=True):
        # torch multiplies the reference's batch in one product, whose sums have another order.
        torch.testing.assert_close(left, right, **({} if impl == "reference" else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("impl", on_device("auto", "reference", "dense", "blocked"))
def test_gradient_through_vmap_equals_that_of_a_loop(impl):
    patches, prompts = torch.randn(4, 2, 9, 8, device=DEVICE), torch.randn(2, 3, 8, device=DEVICE)
    inputs = [patches.requires_grad_(), prompts.requires_grad_()]
    batched = torch.vmap(lambda one: topk_similarity(one, prompts, K, impl=impl))(patches)
    looped = torch.stack([topk_similarity(one, prompts, K, impl=impl) for one in patches])
    weights = torch.randn_like(looped)
    for left, right in zip(
        *(torch.autograd.grad(values, inputs, weights) for values in (batched, looped)), strict=True
    ):
        torch.testing.assert_close(left, right)


class Both(torch.nn.Module):
    """Values and selection, of inputs whose similarities are often equal."""

    def __init__(self, impl):
        super().__init__()
        self.impl = impl

    def forward(self, patches, prompts):
        return topk_similarity(patches, prompts, K, impl=self.impl), selected_patches(patches, prompts, K)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "reference", "dense", "blocked"])
def test_a_module_in_onnx_gives_the_same(impl):
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    generator = torch.Generator().manual_seed(0)
    patches, prompts = (torch.randint(-2, 3, size, generator=generator) / 2 for size in ((5, 9, 8), (2, 3, 8)))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(Both(impl).eval(), (patches[:2], prompts), dynamic_shapes=({0: batch}, None))
    program = program.run_decompositions(onnx_decompositions())
    written = torch.onnx.export(program, input_names=["patches", "prompts"], dynamo=True, verbose=False)
    session = runtime.InferenceSession(written.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    values, selected = session.run(None, {"patches": patches.numpy(), "prompts": prompts.numpy()})
    torch.testing.assert_close(torch.from_numpy(values), topk_similarity(patches, prompts, K, impl="reference"))
    assert torch.equal(torch.from_numpy(selected), selected_patches(patches, prompts, K))


def test_decomposed_float64_stays_float64():
    patches, prompts = torch.randn(2, 9, 8).double(), torch.randn(2, 3, 8).double()
    program = torch.export.export(Both("auto"), (patches, prompts)).run_decompositions(onnx_decompositions())
    values, _ = program.module()(patches, prompts)
    torch.testing.assert_close(values, topk_similarity(patches, prompts, K, impl="reference"))
    assert "fastprompt" not in str(program.graph)
