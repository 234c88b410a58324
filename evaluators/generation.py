"""Greedy texts of a language model, bare or with the adapters of candidates attached to it, side by side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from autopeft.evaluators.attachment.attachment import Attachment

#: Returns criteria of transformers that end the generation of a batch, by the width of its prompts and its size.
Stopping = Callable[[int, int], Any]
#: Prompts of a candidate that are continued side by side.
BATCH_SIZE = 32
#: Texts of all candidates that grow side by side: their keys and values take memory in every layer.
MOST_ROWS = 128


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
    """Like `greedy_of_slots`, for the bare model or for a candidate that is attached to it as its only slot."""
    settings: dict[str, Any] = {"ends": ends, "padding": padding, "max_new_tokens": max_new_tokens, "domains": domains}
    (texts,) = greedy_of_slots(model, prompts, attachment=attachment, **settings)
    return texts


@torch.no_grad()
def greedy_of_slots(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    attachment: Attachment | None,
    ends: Collection[int],
    padding: int,
    max_new_tokens: int,
    domains: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    stopping: Stopping | None = None,
) -> list[list[list[int]]]:
    """Return, for every slot, the most probable next tokens after each prompt, one at a time.

    A text ends with one of `ends`, which is included, or after `max_new_tokens`. K slots continue the same prompts side
    by side, [K * N, T], with one key/value cache. Prompts of a batch are padded on the left with the token `padding`,
    so that all end at the same position. `attachment`: the candidates that are attached to the model, in evaluation
    mode; None for the bare model, as one slot. `domains`: the domain of each prompt, for routers that read it.
    `batch_size`: prompts of a slot at a time, at most. `stopping`: ends the texts of a batch earlier. The tokens are
    those of transformers' `generate` with one beam and no sampling, whatever else the model's own generation_config
    asks for, such as penalties.
    """
    slots = 1 if attachment is None else attachment.num_slots
    # A router may decide by the whole text so far. Keys and values of earlier tokens would be those of earlier gates,
    # and a mean over a padded batch, or over the texts of another candidate, would be another one.
    routed = attachment is not None and bool(attachment.routers)
    found: list[list[list[int]]] = []
    with _plain_settings(model):
        if attachment is not None and routed:
            for one in _each_alone(attachment):
                found.append([])
                for i, prompt in enumerate(prompts):
                    if domains is not None:
                        one.routers.tokens.domains = torch.tensor([domains[i]]).to(model.device)
                    ids, mask = _padded([prompt], padding)
                    cached = not one.routers
                    found[-1] += _continued(model, ids, mask, ends, padding, max_new_tokens, stopping, use_cache=cached)
            return found
        found = [[[] for _ in prompts] for _ in range(slots)]
        # Prompts of similar lengths need little padding; the longest come first, so that a lack of memory shows early.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        size = max(1, min(batch_size, MOST_ROWS // slots))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            ids, mask = _padded([prompts[i] for i in chosen], padding)
            ids, mask = ids.repeat(slots, 1), mask.repeat(slots, 1)
            texts = iter(_continued(model, ids, mask, ends, padding, max_new_tokens, stopping, use_cache=True))
            for k in range(slots):
                for i in chosen:
                    found[k][i] = next(texts)
    return found


def _each_alone(attachment: Attachment) -> Iterator[Attachment]:
    """Yield each slot as the only candidate that is attached to the model, with experts averaged if they are now."""
    from autopeft.evaluators.attachment.attachment import Attachment as OfOne

    averaged = any(state.averaged for _, state, _ in attachment.routers.served)
    model, backbone = attachment.model[0], attachment.backbone
    for k, architecture in enumerate(attachment.architectures):
        with attachment.bare(), OfOne(model, backbone, [architecture], [0], draw=False) as one:
            one.load_state(attachment.state(k))
            one.eval()
            with one.routers.averaged() if averaged else nullcontext():
                yield one


def _padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of prompts, padded on the left, and their mask: [N, T] each."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _continued(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    ends: Collection[int],
    padding: int,
    max_new_tokens: int,
    stopping: Stopping | None,
    *,
    use_cache: bool,
) -> list[list[int]]:
    texts = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding,
        stopping_criteria=stopping and stopping(ids.shape[1], len(ids)),
        use_cache=use_cache,
    )
    return [_until_end(text[ids.shape[1] :].tolist(), ends) for text in texts]


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
