"""DoRA on frozen weights with rows of zeros, which have no direction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space.adapters import Dora
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.backbones.linear import weight_of
from autopeft.testing.adapters import noisy
from autopeft.testing.models import tiny, tokens

ZEROS = 3
LINEARS = {"bert": "attn.v", "llama-causal": "attn.v", "gpt2": "attn.qkv"}
every_family = pytest.mark.parametrize("family", LINEARS)


def with_zero_rows(family: str) -> tuple[nn.Module, Backbone, list[str]]:
    """A tiny model whose linears of one role start with `ZEROS` rows of zeros, and the names of these sites."""
    model, backbone = tiny(family)
    sites = [site for site in backbone.sites if site.role == LINEARS[family]]
    for site in sites:
        weight_of(model.get_submodule(site.module))[:ZEROS] = 0.0
    return model, backbone, [site.name for site in sites]


@every_family
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_zero_rows_train_in_a_pack(family: str, dropout: float) -> None:
    model, backbone, names = with_zero_rows(family)
    before = model(tokens()).logits
    architectures = [Architecture.of({name: [Dora(rank=rank, dropout=dropout)] for name in names}) for rank in (1, 4)]
    with Attachment(model, backbone, architectures, [1, 2], pretrained_head=True) as attachment:
        optimizer = torch.optim.AdamW([parameter for parameter, _ in attachment.trainable()], lr=0.01)
        for step in range(3):
            attachment.eval()
            logits = model(tokens().repeat(2, 1)).logits
            if step == 0:
                torch.testing.assert_close(logits, before.repeat(2, *[1] * (before.dim() - 1)), atol=1e-5, rtol=0)
            attachment.train()
            optimizer.zero_grad()
            loss = model(tokens().repeat(2, 1)).logits.square().mean()
            loss.backward()
            assert loss.isfinite()
            for parameter, _ in attachment.trainable():
                assert parameter.grad is None or parameter.grad.isfinite().all()
            optimizer.step()
        for k in (0, 1):
            state = attachment.state(k)
            for name in names:
                assert not state[f"{name}/dora/m"][:ZEROS].any(), "a row of zeros stays as it is"
                assert not state[f"{name}/dora/B"][:ZEROS].any()
                assert state[f"{name}/dora/B"][ZEROS:].all()


@every_family
@pytest.mark.parametrize("empty", [False, True], ids=["B of noise", "B of zeros"])
def test_merged_zero_rows_are_unmerged(family: str, empty: bool) -> None:
    model, backbone, names = with_zero_rows(family)
    with Attachment(model, backbone, [Architecture.of({name: [Dora(rank=2)] for name in names})], [1]) as attachment:
        state = noisy(attachment)
        if empty:
            for name in names:
                state[f"{name}/dora/B"][:ZEROS] = 0.0
        attachment.load_state(state)
        attachment.eval()
        apart = model(tokens()).logits
        assert apart.isfinite().all()
        apart.square().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p, _ in attachment.trainable())
        with attachment.merged(), attachment.bare():
            torch.testing.assert_close(model(tokens()).logits, apart, atol=1e-5, rtol=1e-5)


def test_an_adapter_without_zero_rows_is_equal() -> None:
    spec, generator = Dora(rank=2), torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((5, 4), (2, 4), (5, 2)))
    weight[:2] = b[1:3] = 0.0  # V has no direction in row 1
    values = {"A": a, "B": b, "m": torch.arange(1.0, 6.0)}
    other = spec.without_zero_rows(values, weight)
    direction = weight + spec.scale * (other["B"] @ other["A"])
    assert direction.norm(dim=1).all()
    quotient = other["m"][:, None] * direction / direction.norm(dim=1, keepdim=True)
    merged, _ = spec.merge(values, weight, None)
    assert torch.equal(merged[1], torch.zeros(4))
    torch.testing.assert_close(merged[0], values["m"][0] * (b[0] @ a) / (b[0] @ a).norm())
    torch.testing.assert_close(quotient, merged)
    assert torch.equal(other["B"][2:], b[2:])
