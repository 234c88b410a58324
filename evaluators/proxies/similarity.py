"""Layer importance by similarity: the change of direction of the residual stream in a sub-layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from autopeft.evaluators.base import Progress
from autopeft.evaluators.proxies.importance import Branch, Importance


class Similarity(Importance):
    """importance = 1 - cos(x, x + c), averaged over all tokens.

    If the norm follows the sum (BERT), x + c is its input.
    """

    name: ClassVar[str] = "similarity"
    summary: ClassVar[str] = "adapters where sub-layers change the residual stream most"
    source: ClassVar[str] = "He et al. 2024, What Matters in Transformers (LLM-Drop), similarity-based metric"

    @torch.no_grad()
    @override
    def measure(self, branches: Sequence[Branch], progress: Progress) -> list[float]:
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
            total += torch.stack(hooks.sums).double().cpu()
            num_tokens += int(tokens.sum())
            progress(done, len(minibatches))
        importances: list[float] = (total / num_tokens).tolist()
        return importances


class _Hooks:
    """Measures one forward pass. `sums`: per branch, the sum of 1 - cos(x, x + c) over the masked `tokens` [N, T]."""

    def __init__(self, model: Any, branches: Sequence[Branch], tokens: Tensor) -> None:
        self.sums = [torch.zeros(()) for _ in branches]
        self._tokens = tokens
        self._x: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        for n, branch in enumerate(branches):
            enter, leave = self._of(n)
            self._handles.append(model.get_submodule(branch.entrance).register_forward_pre_hook(enter))
            self._handles.append(model.get_submodule(branch.exit).register_forward_hook(leave))

    def _of(self, n: int) -> tuple[Any, Any]:
        def enter(module: Any, args: tuple[Tensor, ...]) -> None:
            self._x[n] = args[0]

        def leave(module: Any, args: tuple[Tensor, ...], c: Tensor) -> None:
            x = self._x.pop(n)[self._tokens].float()
            self.sums[n] = (1.0 - F.cosine_similarity(x, x + c[self._tokens].float(), dim=-1)).sum()

        return enter, leave

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
