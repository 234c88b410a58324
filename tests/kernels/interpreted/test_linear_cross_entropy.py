"""The Triton kernel of linear cross-entropy on the CPU, under Triton's interpreter.

It has to be switched on before Triton is imported, for the whole process:
TRITON_INTERPRET=1 pytest tests/kernels/interpreted
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import torch
from torch import Tensor

from autopeft.kernels import linear_cross_entropy as module
from autopeft.kernels import slot_products
from autopeft.kernels.linear_cross_entropy import linear_cross_entropy_reference

from ..test_linear_cross_entropy import draw, given_logits, poisoned  # noqa: F401

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several turns of a loop at vocabularies that the interpreter is quick with."""
    monkeypatch.setattr(module, "softmax_block", lambda vocabulary: min(1024, 1 << (vocabulary - 1).bit_length()))


@torch.no_grad()
def launch(inputs: dict, chunk: int = 5, with_gradient: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return module._op(**inputs, chunk=chunk, with_gradient=with_gradient)


def test_triton_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but float64, and not where it is switched off."""
    calls, own = [], module._softmax_triton
    monkeypatch.setattr(module, "_softmax_triton", lambda *args: calls.append(1) or own(*args))
    inputs = draw(3, 4, 9)
    module.linear_cross_entropy(**inputs, chunk=2)
    assert len(calls) == 2
    with slot_products.without_triton():
        module.linear_cross_entropy(**inputs)
    module.linear_cross_entropy(**draw(3, 4, 9, dtype=torch.float64))
    assert len(calls) == 2


def test_the_block_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [module.softmax_block(vocabulary) for vocabulary in (1, 37, 2345, 151936)] == [16, 64, 4096, 4096]
    assert_same(draw(2, 3, 4097))


def reference(inputs: dict) -> tuple[Tensor, Tensor, Tensor]:
    losses, correct = linear_cross_entropy_reference(**inputs)
    return losses.detach(), correct, torch.autograd.grad(losses.sum(), inputs["hidden"])[0]


def assert_same(inputs: dict, chunk: int = 5) -> None:
    ours = launch(inputs, chunk)
    for own, expected in zip(ours, reference(inputs), strict=True):
        torch.testing.assert_close(own, expected)
    losses, correct, gradient = launch(inputs, chunk, with_gradient=False)
    torch.testing.assert_close((losses, correct), ours[:2], rtol=0, atol=0)
    assert gradient.numel() == 0


# One block that is not full, one that is, several with an odd rest.
@pytest.mark.parametrize("vocabulary", [1, 37, 1024, 2345])
@pytest.mark.parametrize("tokens", [1, 7])
def test_it_is_its_reference(tokens: int, vocabulary: int) -> None:
    for bias in (False, True):
        assert_same(draw(tokens, 6, vocabulary, bias))


def test_strided_inputs() -> None:
    inputs = draw(8, 12, 50)
    inputs |= {"hidden": inputs["hidden"][::2, ::2], "weight": inputs["weight"][:, 1::2]}
    assert_same(inputs | {"targets": inputs["targets"][::2]}, chunk=3)


def test_ties_go_to_the_first() -> None:
    """Within a lane, across lanes and across blocks."""
    logits = torch.zeros(4, 2050)
    logits[:, [1030, 5, 7, 2049]] = 3.0  # 1030 is in the lane of 6
    inputs = given_logits(logits, [5, 7, 1030, 2049])
    assert_same(inputs)
    assert launch(inputs, with_gradient=False)[1].tolist() == [1, 0, 0, 0]
    logits = logits.detach().clone()
    logits[:, 5] = 0.0
    logits[:, 1031] = 3.0  # in the lane of 7
    assert_same(given_logits(logits, [7, 1031, 1030, 0]))


def test_large_logits_and_closed_columns() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]])
    assert_same(given_logits(logits, [1, 2, 0]))
    inputs = draw(3, 4, 9, bias=True)
    inputs["bias"][[0, 4]] = float("-inf")
    assert_same(inputs | {"targets": torch.tensor([1, 2, 8])})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = draw(6, 8, 300, bias=True, dtype=dtype)
    for own, expected in zip(launch(inputs)[::2], reference(inputs)[::2], strict=True):
        assert (own.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()


def test_what_is_not_a_number_stays_in_its_row() -> None:
    inputs = draw(4, 3, 20)
    whole = launch(inputs)
    with torch.no_grad():
        inputs["hidden"][1] = float("nan")
    inputs["targets"][2] = 20  # one beyond the vocabulary
    losses, correct, gradient = launch(inputs)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert correct[2] == 0
    for own, expected in zip((losses, correct, gradient), whole, strict=True):
        torch.testing.assert_close(own[[0, 3]], expected[[0, 3]], rtol=0, atol=0)
