"""Linear cross-entropy against its reference: losses, hits, gradient, and that no tensor has the size of all logits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autopeft.kernels import counts
from autopeft.kernels import linear_cross_entropy as module
from autopeft.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(tokens: int, features: int, vocabulary: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(tokens + 1000 * vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "hidden": normal(tokens, features).requires_grad_(),
        "weight": normal(vocabulary, features),
        "targets": torch.randint(0, vocabulary, (tokens,), generator=generator),
        "bias": normal(vocabulary) if bias else None,
    }


def outcome(op, inputs: dict, **more: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, hits, and the gradient of a sum in which every token has a weight of its own."""
    losses, correct = op(**inputs, **more)
    assert losses.dtype == correct.dtype == torch.float32
    assert not correct.requires_grad
    factor = torch.linspace(-2.0, 3.0, len(losses))
    (gradient,) = torch.autograd.grad((losses * factor).sum(), inputs["hidden"])
    assert gradient.dtype == inputs["hidden"].dtype
    return losses, correct, gradient


def assert_same(inputs: dict, **more: int) -> None:
    ours, reference = outcome(linear_cross_entropy, inputs, **more), outcome(linear_cross_entropy_reference, inputs)
    for own, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "features", "vocabulary"), [(1, 1, 1), (1, 8, 37), (13, 7, 101), (64, 16, 128)])
def test_it_is_its_reference(tokens: int, features: int, vocabulary: int, bias: bool) -> None:
    for chunk in (1, 5, 13, 1000):
        assert_same(draw(tokens, features, vocabulary, bias), chunk=chunk)
    assert_same(draw(tokens, features, vocabulary, bias))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 200), st.integers(1, 50), st.booleans())
def test_any_shape(tokens: int, features: int, vocabulary: int, chunk: int, bias: bool) -> None:
    assert_same(draw(tokens, features, vocabulary, bias), chunk=chunk)


def test_no_tokens() -> None:
    losses, correct, gradient = outcome(linear_cross_entropy, draw(0, 4, 9))
    assert losses.shape == correct.shape == (0,)
    assert gradient.shape == (0, 4)


def test_strided_inputs() -> None:
    inputs = draw(14, 22, 90)
    wide, weight = inputs["hidden"], inputs["weight"]
    inputs |= {"hidden": wide[::2, 1::2], "weight": weight.T.contiguous().T[:, ::2], "targets": inputs["targets"][::2]}
    assert not inputs["hidden"].is_contiguous()
    assert not inputs["weight"].is_contiguous()
    assert_same(inputs, chunk=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = draw(200, 32, 500, bias=True, dtype=dtype)
    inputs["hidden"] = (inputs["hidden"].detach() / 4).requires_grad_()
    ours, reference = outcome(linear_cross_entropy, inputs, chunk=64), outcome(linear_cross_entropy_reference, inputs)
    for own, expected in zip(ours[::2], reference[::2], strict=True):
        assert (own.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()
    assert (ours[1] != reference[1]).float().mean() <= 0.02, "two logits may round to the same number"


def given_logits(logits: Tensor, targets: list[int], bias: Tensor | None = None) -> dict:
    """Inputs with these logits: hidden states under the identity."""
    weight = torch.eye(logits.shape[1])
    return {"hidden": logits.requires_grad_(), "weight": weight, "targets": torch.tensor(targets), "bias": bias}


def test_ties_go_to_the_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]]).repeat(4, 1)
    inputs = given_logits(logits, [0, 1, 2, 3])
    assert_same(inputs)
    assert linear_cross_entropy(**inputs)[1].tolist() == [0, 1, 0, 0]


def test_large_logits_and_closed_columns() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]])
    assert_same(given_logits(logits, [1, 2, 0]))
    closed = torch.tensor([0.0, float("-inf"), 0.0])
    inputs = given_logits(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), [0, 2], closed)
    assert_same(inputs)
    assert all(part.isfinite().all() for part in outcome(linear_cross_entropy, inputs))


def test_a_broken_token_breaks_no_other() -> None:
    inputs = draw(9, 6, 40)
    whole = outcome(linear_cross_entropy, inputs, chunk=4)
    with torch.no_grad():
        inputs["hidden"][2] = float("nan")
    broken = outcome(linear_cross_entropy, inputs, chunk=4)
    others = [0, 1, *range(3, 9)]
    assert broken[0][2].isnan()
    for own, expected in zip(broken, whole, strict=True):
        torch.testing.assert_close(own[others], expected[others], rtol=0, atol=0)


def test_what_is_not_trained() -> None:
    inputs = draw(5, 4, 9)
    with torch.no_grad():
        losses, _ = linear_cross_entropy(**inputs)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, linear_cross_entropy_reference(**inputs)[0].detach())
    inputs["weight"].requires_grad_()
    with pytest.raises(ValueError, match="no gradient for weight and bias: they have to be frozen"):
        linear_cross_entropy(**inputs)
    inputs["weight"].requires_grad_(False)
    # A second derivative would lack the softmax's own: there is none in place of a wrong one.
    (gradient,) = torch.autograd.grad(linear_cross_entropy(**inputs)[0].sum(), inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_opcheck() -> None:
    for bias in (False, True):
        inputs = draw(7, 5, 11, bias)
        torch.library.opcheck(module._op, (*inputs.values(), 3, True))
        torch.library.opcheck(module._op, (inputs["hidden"].detach(), *list(inputs.values())[1:], 3, False))


def test_the_logits_of_all_tokens_are_never_held() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max([largest, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
            return result

    inputs = {name: tensor if tensor is None else tensor.detach() for name, tensor in draw(96, 3, 500).items()}
    with Watch():
        linear_cross_entropy_reference(**inputs)
    assert largest == 96 * 500
    largest = 0
    with Watch():  # an op is one step to such a mode, so it is what the op does that is called
        module._in_chunks(module._softmax, **inputs, chunk=8, with_gradient=True)
    assert largest == 8 * 500


def test_chunks_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(module, "_op", lambda *args: seen.append(args[4]) or (args[2], args[2], None))
    for vocabulary in (1000, 2**15, 2**18):
        linear_cross_entropy(torch.zeros(2, 1), torch.zeros(vocabulary, 1), torch.zeros(2, dtype=torch.long))
    assert seen == [16777, 512, 256]


def test_chunks_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    sizes = {vocabulary: module.chunk_rows(vocabulary, gpu) for vocabulary in (32000, 50257, 128256, 131072, 152064)}
    assert sizes == {32000: 2048, 50257: 1280, 128256: 512, 131072: 512, 152064: 384}
    assert module.chunk_rows(2**20, gpu) == 256


def test_counts_by_hand() -> None:
    """5 tokens in chunks of 3 and 2, 7 features, 11 words in bfloat16."""
    half = torch.bfloat16
    assert module.softmax_count(3, 11, half) == counts.Count(9 * 33, 3 * 2 * 33)
    assert module.softmax_count(3, 11, half, with_gradient=False) == counts.Count(5 * 33, 2 * 33)
    softmax = module.softmax_count(5, 11, half)
    product = counts.Count(2 * 5 * 7 * 11, 2 * (5 * 7 + 2 * 7 * 11 + 5 * 11))
    assert module.linear_cross_entropy_count(5, 7, 11, half, 3) == product + product + softmax
    softmax = module.softmax_count(5, 11, half, with_gradient=False)
    assert module.linear_cross_entropy_count(5, 7, 11, half, 3, with_gradient=False) == product + softmax
