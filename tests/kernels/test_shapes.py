"""The shapes of docstrings are complete, and a call with others is refused (tests/support/shapes.py)."""

import inspect

import pytest
import torch

from autopeft.search_space.adapters.lora import Lora
from autopeft.search_space.routers import Router, Sigmoid, Token

from ..support.shapes import (
    DECLARED_BY,
    argument_shapes,
    checked,
    hints_of,
    kernel_functions,
    returns_tensors,
    tensor_arguments,
    tensor_methods,
)


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


def test_two_results_have_shapes_of_their_own():
    def folded(weight: "Tensor", bias: "Tensor | None") -> "tuple[Tensor, Tensor | None]":  # noqa: F821
        """Return both. weight: [D_out, ...], bias: [D_out]. Returns [D_out, ...] and [D_out]."""
        return weight, bias

    call = checked(folded, hints_of(folded, inspect.getdoc(folded)))
    for weight in (torch.ones(3, 2), torch.ones(3)):
        assert call(weight, None) == (weight, None)

    def swapped(weight, bias):
        return bias, weight

    with pytest.raises(TypeError, match="D_out"):
        checked(swapped, hints_of(folded, inspect.getdoc(folded)))(torch.ones(3, 2), torch.ones(3))


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=f"{owner.__name__}.{name}")
        for owner in DECLARED_BY
        for name, method in tensor_methods(owner).items()
    ],
)
def test_every_tensor_of_a_method_of_adapters_and_routers_has_a_declared_shape(method):
    doc = inspect.getdoc(method) or ""
    assert sorted(argument_shapes(method, doc)) == sorted(tensor_arguments(method))
    assert ("return" in hints_of(method, doc)) == returns_tensors(method)


def test_the_adapter_types_have_the_shapes_of_what_they_override():
    x = torch.ones(1, 3, 8)
    with pytest.raises(TypeError, match="K M D_in"):
        Lora().apply({}, x[0], x, None)
    with pytest.raises(TypeError, match="D_out"):
        Lora(rank=1).merge({"A": torch.ones(1, 3), "B": torch.ones(2, 1)}, torch.ones(2, 3), torch.ones(3))


def test_the_routers_have_the_shapes_of_what_they_override():
    x, logits = torch.ones(2, 3, 8), torch.ones(2, 4, 3)
    with pytest.raises(TypeError, match="K M D_in"):
        Token().logits(None, {"router": torch.ones(2, 4, 8)}, x[0], None)
    with pytest.raises(TypeError, match="K E C"):
        Sigmoid().shares(logits, logits, torch.ones(2, 3, 4, dtype=torch.bool))


def test_a_router_with_logits_of_another_shape_is_refused():
    class Transposed(Token):
        def logits(self, mixture, p, x, call):
            return super().logits(mixture, p, x, call).mT.flatten(1)

    declared = inspect.unwrap(vars(Router)["logits"])
    wrong = checked(Transposed.logits, hints_of(declared, inspect.getdoc(declared)))
    with pytest.raises(TypeError, match="K E C"):
        wrong(Transposed(), None, {"router": torch.ones(2, 4, 8)}, torch.ones(2, 3, 8), None)


def test_a_verdict_is_remembered_for_its_shapes_alone() -> None:
    def folded(x: "Tensor") -> "Tensor":  # noqa: F821
        """Sum x: [K, D]. Returns [K]."""
        return x.sum(-1) if x.sum() > 0 else x

    call = checked(folded, hints_of(folded, inspect.getdoc(folded)))
    for _ in range(2):
        assert call(torch.ones(2, 3)).shape == (2,)
        with pytest.raises(TypeError, match="K"):  # the same arguments, another result
            call(-torch.ones(2, 3))
        with pytest.raises(TypeError, match="K D"):
            call(torch.ones(2))
