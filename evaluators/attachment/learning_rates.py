"""Factors of the learning rates of an attachment's trained tensors, for optimisers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space.runtime.pool import Pool


def rate_factors(attachment: Attachment) -> dict[nn.Parameter, float]:
    """Return the factor of the learning rate of every tensor of `Attachment.trainable`, with a single slot."""
    placed = attachment.architectures[0].placed(attachment.backbone)
    whole = max((spec.rate for site, spec in placed if site.role == "backbone"), default=1.0)
    backbone = set(attachment.model[0].parameters())
    return (
        {v: bank.specs[0].rate_of(name) for bank in attachment.banks for name, v, _ in bank.trained()}
        | {pool.value: _shared_factor(attachment, pool, 0) for pool in attachment.pools.values() if pool.trainable}
        | {parameter: whole for parameter, _ in attachment.trainable() if parameter in backbone}
    )


def slots_of_rows(attachment: Attachment) -> Iterator[tuple[nn.Parameter, bool, list[int], list[float]]]:
    """Yield every tensor of the banks, whether weight decay applies, and for each row its slot and its factor.

    It requires that no two slots share a bank.
    """
    for bank in attachment.banks:
        for name, value, decay in bank.trained():
            yield value, decay, bank.slots_served, [spec.rate_of(name) for spec in bank.specs]
    for pool in attachment.pools.values():
        if pool.trainable:
            yield pool.value, pool.decay, pool.slots, [_shared_factor(attachment, pool, k) for k in pool.slots]


def _shared_factor(attachment: Attachment, pool: Pool, k: int) -> float:
    """Return the largest factor among the adapters of slot k that share a tensor."""
    return max(spec.rate_of(pool.key.name) for _, spec in attachment.architectures[k] if spec.kind == pool.key.kind)
