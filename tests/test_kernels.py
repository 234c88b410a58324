"""Every op of `kernels/` against its reference: output and gradients."""

from __future__ import annotations

import pytest
import torch

from autopeft.kernels.packed_lora import packed_lora, packed_lora_reference


@pytest.mark.parametrize("ranks", [(1,), (4, 4), (1, 3, 7)])
def test_packed_lora_is_its_reference(ranks: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    slots, rank = len(ranks), max(ranks)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.double).requires_grad_()

    # x is strided: a slice of a wider tensor.
    inputs = [draw(slots, 5, 13), draw(slots, rank, 11), draw(slots, 9, rank), draw(slots)]
    mask = None
    if len(set(ranks)) > 1:
        mask = (torch.arange(rank)[None, :] < torch.tensor(ranks)[:, None]).double()
    weight = draw(slots, 5, 9).detach()

    def outcome(op) -> list[torch.Tensor]:
        out = op(inputs[0][..., :11], *inputs[1:], mask)
        return [out, *torch.autograd.grad((out * weight).sum(), inputs)]

    for ours, reference in zip(outcome(packed_lora), outcome(packed_lora_reference), strict=True):
        torch.testing.assert_close(ours, reference)
