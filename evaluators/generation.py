"""Greedy texts of a language model, bare or with the adapters of one candidate attached to it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from autopeft.evaluators.attachment.attachment import Attachment

#: Prompts that are continued side by side.
BATCH_SIZE = 32


def ends_of(model: Any, tokenizer: Any, references: Sequence[Sequence[int]]) -> set[int]:
    """Return the tokens after which a text has ended.

    They are those that the tokenizer and the model's generation_config name, and the special tokens that end
    references, because chat templates end a turn by a token of their own, which the training teaches.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    own = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    # A template may write a line break after the end of a turn.
    return {*own, *(token for reference in references for token in reference[-2:] if token in special)} - {None}


@torch.no_grad()
def greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    attachment: Attachment | None = None,
    ends: Collection[int],
    padding: int,
    max_new_tokens: int,
    domains: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the most probable next tokens after each prompt, one at a time, up to one of `ends`, which is included.

    Prompts of a batch are padded on the left with the token `padding`, so that all end at the same position.
    `attachment`: a candidate that is attached to the model as its only slot. `domains`: the domain of each prompt, for
    routers that read it. The tokens are those of transformers' `generate` with one beam and no sampling, whatever
    else the model's own generation_config asks for, such as penalties.
    """
    # A router may decide by the whole text so far. Keys and values of earlier tokens would be those of earlier gates,
    # and a mean over a padded batch would be another one.
    routed = attachment is not None and bool(attachment.routers)
    size = 1 if routed else BATCH_SIZE
    found: list[list[int]] = []
    with _plain_settings(model):
        for start in range(0, len(prompts), size):
            chosen = prompts[start : start + size]
            width = max(map(len, chosen))
            ids = torch.full((len(chosen), width), padding)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(chosen):
                ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            if attachment is not None and domains is not None:
                attachment.routers.tokens.domains = torch.tensor(domains[start : start + size]).to(model.device)
            texts = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=padding,
                use_cache=not routed,
            )
            found += [_until_end(text[width:].tolist(), ends) for text in texts]
    return found


def _until_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Cut off what follows the first end: the padding of a text that ended before others."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


@contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Set the model's generation settings aside, which `generate` would mix into those of the call."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
