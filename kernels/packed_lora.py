"""Packed LoRA: the low-rank update of K slots on one linear layer.

Letters: K slots, T tokens per slot, D_in, D_out features, R rank (the largest of the slots).
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_lora(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """The update scale * (x A^T) B^T of every slot (Hu et al. 2021, section 4.1).

    x: [K, T, D_in], a: [K, R, D_in], b: [K, D_out, R], scale: [K], mask: [K, R] with 1 for the ranks that a
    slot owns (None: all). Returns [K, T, D_out]. Grouped matrix products are `bmm` because slots are equal in
    length.
    """
    h = torch.bmm(x, a.transpose(1, 2))
    # The scale is applied to the narrow side: R numbers per token and not D_out.
    h = h * (scale[:, None] * mask if mask is not None else scale[:, None].expand(-1, a.shape[1]))[:, None, :]
    return torch.bmm(h, b.transpose(1, 2))


def packed_lora_reference(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same, slot by slot in the obvious way."""
    out = []
    for k in range(x.shape[0]):
        kept = slice(None) if mask is None else mask[k].bool()
        delta = b[k][:, kept] @ a[k][kept]
        out.append(scale[k] * (x[k] @ delta.T))
    return torch.stack(out)
