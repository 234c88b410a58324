"""Overlap of generated texts with their references, computed by the packages that papers use, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from typing_extensions import override

from autopeft.search_space.metrics.texts import ShareOfTexts


@dataclass(frozen=True, slots=True, kw_only=True)
class RougeL(ShareOfTexts):
    """ROUGE-L, the F-measure of the longest common subsequence of words (Lin 2004), as rouge-score has it.

    Without a stemmer. The package reads letters a to z and digits alone: a text in another alphabet has no words.
    """

    package: ClassVar[str] = "rouge_score"

    name: str = "rouge-l"
    summary: str = "ROUGE-L of the generated texts of the validation rows: F-measure of the longest common subsequence"

    @override
    def of(self, prompts: Sequence[str], generated: Sequence[str], references: Sequence[str]) -> Sequence[float]:
        scorer = _rouge()
        pairs = zip(generated, references, strict=True)
        return [float(scorer.score(reference, own)["rougeL"].fmeasure) for own, reference in pairs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chrf(ShareOfTexts):
    """chrF, an F-score of character n-grams (Popović 2015), of each sentence, as sacrebleu has it, from 0 to 1."""

    package: ClassVar[str] = "sacrebleu"

    name: str = "chrf"
    summary: str = "chrF of the generated texts of the validation rows: F-score of character n-grams, mean over rows"

    @override
    def of(self, prompts: Sequence[str], generated: Sequence[str], references: Sequence[str]) -> Sequence[float]:
        return _shares(_chrf(), generated, references)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bleu(ShareOfTexts):
    """BLEU (Papineni et al. 2002) of each sentence, as sacrebleu has it, from 0 to 1.

    It is the mean over rows and not the BLEU of the corpus, because a mean has a standard error and paired differences
    without a resampling of the rows. Smoothing is exponential, and n-grams that are longer than the text do not count
    (sacrebleu's `effective_order`).
    """

    package: ClassVar[str] = "sacrebleu"

    name: str = "bleu"
    summary: str = "sentence BLEU of the generated texts of the validation rows, mean over rows"

    @override
    def of(self, prompts: Sequence[str], generated: Sequence[str], references: Sequence[str]) -> Sequence[float]:
        return _shares(_bleu(), generated, references)


def _shares(metric: Any, generated: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return sacrebleu's scores of sentences as shares; rounding may take a perfect text a little beyond 1."""
    pairs = zip(generated, references, strict=True)
    return [min(1.0, float(metric.sentence_score(own, [reference]).score) / 100) for own, reference in pairs]


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)
