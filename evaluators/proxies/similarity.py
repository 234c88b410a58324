"""Layer importance by similarity: a sub-layer matters as much as it turns the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from autopeft.evaluators.proxies.importance import Branch, Importance


class Similarity(Importance):
    """importance = 1 - cos(x, x + c), the mean over all tokens.

    Where the norm follows the sum (BERT), x + c is taken ahead of it.
    """

    name: ClassVar[str] = "similarity"
    summary: ClassVar[str] = "adapters where sub-layers change the residual stream most"
    source: ClassVar[str] = "He et al. 2024, What Matters in Transformers (LLM-Drop), similarity-based metric"

    @torch.no_grad()
    def measure(self, branches, progress):
        evaluator = self.evaluator
        total = torch.zeros(len(branches), dtype=torch.float64)
        num_tokens = 0
        for done, indices in enumerate(minibatches := self.minibatches(), 1):
            batch = evaluator.batch("train", indices)
            tokens = batch["attention_mask"].bool()
            hooks = _Hooks(evaluator.model, branches, tokens)
            try:
                evaluator.task.scores(evaluator.model, batch)
            finally:
                hooks.remove()
            total += torch.stack(hooks.turns).double().cpu()
            num_tokens += int(tokens.sum())
            progress(done, len(minibatches))
        return (total / num_tokens).tolist()


class _Hooks:
    """`turns`: the sum of 1 - cos(x, x + c) over the `tokens` [N, T], for each branch."""

    def __init__(self, model: Any, branches: Sequence[Branch], tokens: Tensor) -> None:
        self.turns = [torch.zeros(()) for _ in branches]
        self._tokens = tokens
        self._x: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        for n, branch in enumerate(branches):
            enter, leave = self._of(n)
            self._handles.append(model.get_submodule(branch.entrance).register_forward_pre_hook(enter))
            self._handles.append(model.get_submodule(branch.exit).register_forward_hook(leave))

    def _of(self, n: int) -> tuple[Any, Any]:
        def enter(module: Any, args: tuple) -> None:
            self._x[n] = args[0]

        def leave(module: Any, args: tuple, c: Tensor) -> None:
            x = self._x.pop(n)[self._tokens].float()
            self.turns[n] = (1.0 - F.cosine_similarity(x, x + c[self._tokens].float(), dim=-1)).sum()

        return enter, leave

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
