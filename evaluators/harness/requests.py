"""Requests of lm-eval to the study's model: to tokens, and what candidates side by side respond to them.

A likelihood is the loss of an example of `causal-lm`, so it is computed as all losses are: for all candidates of a pack
at a time, with their shared lower layers. Texts are those of `greedy_of_slots`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.harness.documents import LIKELIHOOD, Document, Documents
from autopeft.evaluators.tasks import Example, Task
from autopeft.evaluators.tasks.base import IGNORED
from autopeft.evaluators.texts import SCORED
from autopeft.search_space.metrics import Columns, LmEval, MetricError, Quality

if TYPE_CHECKING:
    from autopeft.evaluators.attachment.attachment import Attachment

#: `TrainingEvaluator.columns`.
Score = Callable[["Attachment", str, Sequence[int], int], list[Columns]]
#: Tokens of a text, where the task does not say.
MAX_NEW_TOKENS = 256


def requests_of(splits: Splits, metrics: Sequence[Quality], task: Task, model: Any) -> list[Requests]:
    """Return the requests of each metric with a task of lm-eval. Raises MetricError for one without documents."""
    wanted = [metric.name for metric in metrics if isinstance(metric, LmEval)]
    for name in wanted:
        if name not in splits.documents:
            raise MetricError(f"{name} cannot be computed: there are no documents of its task")
    return [Requests(splits.documents[name], task, model) for name in wanted]


class Prompt:
    """The tokens of a prompt, the texts before which its answer ends, and the most tokens of the answer."""

    def __init__(self, ids: list[int], stops: tuple[str, ...], most: int) -> None:
        self.ids = ids
        self.stops = stops
        self.most = most


class Requests:
    """The requests of a metric's documents to the model of a study.

    What the model has no positions for is cut off at the beginning of a prompt, as lm-eval does; `cut` is the number of
    those requests. Raises DataError for requests of which nothing would be left.
    """

    def __init__(self, documents: Documents, task: Task, model: Any) -> None:
        self.documents = documents
        self.name = documents.metric.name
        self.model = model
        self.tokenizer = task.processor
        self.limit = task.limit(model)
        self.cut = 0
        found = documents.requests
        if documents.metric.chat_template:
            if not getattr(self.tokenizer, "chat_template", None):
                raise DataError([f"the metric {self.name}: the model's tokenizer has no chat template"])
            found = documents.built(partial(_as_chat, self.tokenizer))
        self.parts = found
        #: Examples of the likelihoods by the name of their split in evaluators, and the prompts of the texts.
        self.examples: dict[str, list[Example]] = {self.key(split): [] for split in SCORED}
        self.prompts: dict[str, list[Prompt]] = {split: [] for split in SCORED}
        problems: set[str] = set()
        encoder = _encoder(self.tokenizer)
        for split, parts in found.items():
            for request in (request for document in parts for request in document):
                try:
                    if request.request_type == LIKELIHOOD:
                        ((_, context, continuation),) = encoder.loglikelihood([request], disable_tqdm=True)
                        self.examples[self.key(split)].append(self._example(context, continuation))
                    else:
                        self.prompts[split].append(self._prompt(encoder, *request.args))
                except ValueError as error:
                    problems.add(f"the metric {self.name} ({documents.metric.place}): {error}")
        if problems:
            raise DataError(sorted(problems))

    def key(self, split: str) -> str:
        """Return the name of the examples of a split among those of an evaluator."""
        return f"{self.name}/{split}"

    @property
    def generates(self) -> bool:
        """Whether there are texts to generate."""
        return any(self.prompts.values())

    def _example(self, context: list[int], continuation: list[int]) -> Example:
        if not continuation:
            raise ValueError("a document has a choice or target without a token")
        if len(continuation) >= self.limit:
            raise ValueError(f"a choice or target has more tokens than the {self.limit:,} positions of the model")
        ids = self._cut([*context, *continuation], self.limit)
        return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - len(continuation)) + continuation}

    def _prompt(self, encoder: Any, text: str, settings: dict[str, Any]) -> Prompt:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        normal = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        end = self.tokenizer.eos_token
        most = normal["max_gen_toks"]
        if most >= self.limit:
            raise ValueError(
                f"texts of {most:,} tokens (max_gen_toks of its generation_kwargs) leave nothing for a prompt of the"
                f" {self.limit:,} positions of the model"
            )
        if not (ids := encoder.tok_encode(text)):
            raise ValueError("a document has a prompt without a token")
        return Prompt(self._cut(ids, self.limit - most), tuple(handle_stop_sequences(normal["until"], eos=end)), most)

    def _cut(self, ids: list[int], most: int) -> list[int]:
        self.cut += len(ids) > most
        return ids[-most:]

    def warnings(self) -> Iterator[str]:
        """Yield what is lost of the requests."""
        if self.cut:
            what = f"the model's {self.limit:,} positions cut off the beginning of the prompt of {self.cut:,} requests"
            yield f"{self.name}: {what}"

    def columns(
        self, score: Score, attachment: Attachment, split: str, chosen: Sequence[int], batch_size: int
    ) -> list[Columns]:
        """Return the column of the metric for every slot over these documents of a split.

        `score`: returns the columns of every slot over examples. `batch_size`: requests of a slot at a time, at most.
        Raises MetricError.
        """
        parts = self.parts[split]
        likelihoods, texts = self._places(parts, chosen)
        scored: list[Iterator[Any]] = [iter(())] * attachment.num_slots
        written = scored
        if likelihoods:
            columns = score(attachment, self.key(split), likelihoods, batch_size)
            counts = [sum(map(IGNORED.__ne__, self.examples[self.key(split)][i]["labels"])) for i in likelihoods]
            scored = [
                iter(
                    [
                        (-loss * count, share == 1.0)
                        for loss, share, count in zip(own["loss"], own["accuracy"], counts, strict=True)
                    ]
                )
                for own in columns
            ]
        if texts:
            prompts = [self.prompts[split][i] for i in texts]
            written = list(map(iter, self._texts(attachment, prompts, batch_size)))
        documents = [parts[i] for i in chosen]
        kinds = [request.request_type == LIKELIHOOD for document in documents for request in document]
        return [
            {self.name: self.documents.values(documents, [next(own if kind else other) for kind in kinds])}
            for own, other in zip(scored, written, strict=True)
        ]

    @staticmethod
    def _places(parts: Sequence[Document], chosen: Collection[int]) -> tuple[list[int], list[int]]:
        """Return the places of the requests of the chosen documents among the likelihoods, and among the texts."""
        found: tuple[list[int], list[int]] = ([], [])
        ends = [0, 0]
        for i, document in enumerate(parts):
            for request in document:
                kind = int(request.request_type != LIKELIHOOD)
                if i in chosen:
                    found[kind].append(ends[kind])
                ends[kind] += 1
        return found

    def _texts(self, attachment: Attachment, prompts: Sequence[Prompt], batch_size: int) -> list[list[str]]:
        """Return the greedy text of every slot after each prompt, up to where it says to stop."""
        from lm_eval.models.utils import postprocess_generated_text

        from autopeft.evaluators.generation import ends_of

        ends = ends_of(self.model, self.tokenizer, ())
        found = [[""] * len(prompts) for _ in range(attachment.num_slots)]
        for stops, most in dict.fromkeys((prompt.stops, prompt.most) for prompt in prompts):
            own = [i for i, prompt in enumerate(prompts) if (prompt.stops, prompt.most) == (stops, most)]
            slots = self._greedy(attachment, [prompts[i].ids for i in own], ends, stops, most, batch_size)
            for texts, tokens in zip(found, slots, strict=True):
                for i, ids in zip(own, tokens, strict=True):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    texts[i] = postprocess_generated_text(text, list(stops), None)
        return found

    def _greedy(
        self,
        attachment: Attachment,
        prompts: Sequence[Sequence[int]],
        ends: Collection[int],
        stops: Sequence[str],
        most: int,
        batch_size: int,
    ) -> list[list[list[int]]]:
        from lm_eval.models.utils_hf import stop_sequences_criteria

        from autopeft.evaluators.generation import greedy_of_slots

        attachment.eval()
        found = greedy_of_slots(
            self.model,
            prompts,
            attachment=attachment,
            ends=ends,
            padding=self.tokenizer.pad_token_id,
            max_new_tokens=most,
            batch_size=batch_size,
            stopping=partial(stop_sequences_criteria, self.tokenizer, list(stops)),
        )
        attachment.train()
        return found

    def seconds(self, attachment: Attachment, batch_size: int, within_s: float) -> float:
        """Return the seconds of a text after a prompt of median length; see `text_seconds`. Texts may end before."""
        from autopeft.evaluators.costs.timing import now, text_seconds

        prompts = sorted(self.prompts["validation"], key=lambda prompt: len(prompt.ids))
        size = min(batch_size, len(prompts))
        chosen = [prompt.ids for prompt in prompts[(len(prompts) - size) // 2 :][:size]]

        def generate(count: int, tokens: int) -> None:
            self._greedy(attachment, chosen[(size - count) // 2 :][:count], (), (), tokens, batch_size)

        return text_seconds(generate, size, prompts[0].most, within_s, lambda: now(self.model.device))


def _as_chat(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Return a chat as a prompt; without a `add_generation_prompt`, the last message goes on."""
    text: str = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    return text


def _encoder(tokenizer: Any) -> Any:
    """Return lm-eval's own division of requests into tokens, by this tokenizer.

    Its `loglikelihood` returns for each request the texts and the tokens of context and continuation.
    """
    from lm_eval.api.model import TemplateLM

    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    first = next(token for token in known if token is not None)

    class Encoder(TemplateLM):  # type: ignore[misc]
        eot_token_id = tokenizer.eos_token_id
        prefix_token_id = first

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None:
                add_special_tokens = not string.startswith(tokenizer.decode(first))
            ids: list[int] = tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
            # The end that some tokenizers append is none here: the continuation follows.
            appended = add_special_tokens and ids and ids[-1] == tokenizer.eos_token_id
            return ids[:-1] if appended and not string.endswith(tokenizer.eos_token) else ids

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[Any]:
            return requests

        # Abstract in lm-eval, and never called: `Documents` refuses the first kind, and `Requests` has the second.
        loglikelihood_rolling = generate_until = None

    return Encoder()
