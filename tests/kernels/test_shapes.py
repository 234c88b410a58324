"""The shapes of docstrings are complete, and a call with others is refused (tests/support/shapes.py)."""

import inspect

import pytest
import torch

from autopeft.search_space.adapters.lora import Lora

from ..support.shapes import argument_shapes, checked, hints_of, kernel_functions, tensor_arguments


@pytest.mark.parametrize(("function", "doc"), [pytest.param(f, d, id=n) for _, n, f, d in kernel_functions()])
def test_every_tensor_of_a_public_kernel_function_has_a_declared_shape(function, doc):
    assert [*argument_shapes(function, doc)] == tensor_arguments(function)
    assert "return" in hints_of(function, doc)


def test_a_call_with_another_shape_is_refused():
    from autopeft.kernels.packed_lora import packed_lora

    x, a, b, scale = torch.ones(2, 3, 8), torch.ones(2, 4, 8), torch.ones(2, 5, 4), torch.ones(2)
    assert packed_lora(x, a, b, scale).shape == (2, 3, 5)
    with pytest.raises(TypeError, match="K T D_in"):
        packed_lora(x[..., :7], a, b, scale)
    with pytest.raises(TypeError, match="K R"):
        packed_lora(x, a, b, scale, torch.ones(2, 5))


def test_a_result_of_another_shape_is_refused():
    def squared(x: "Tensor") -> "Tensor":  # noqa: F821
        """Return the squares of x: [K, D]. Returns [K, D]."""
        return x.square().sum(-1)

    with pytest.raises(TypeError, match="K D"):
        checked(squared, hints_of(squared, inspect.getdoc(squared)))(torch.ones(2, 3))


def test_the_adapter_types_have_the_shapes_of_what_they_override():
    x = torch.ones(1, 3, 8)
    with pytest.raises(TypeError, match="K M D_in"):
        Lora().apply({}, x[0], x, None)
