"""Documents of a task of lm-eval: one part compares candidates, and the other one is for the final test.

Nothing but this folder needs lm-eval, and it is imported where a study names a task of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.errors import DataError, first_line
from autopeft.evaluators.texts import SCORED, check_packages
from autopeft.search_space.metrics import LmEval, MetricError
from autopeft.search_space.spelling import did_you_mean

#: The types of requests that are computed; a multiple choice is several of the first.
LIKELIHOOD, TEXT = "loglikelihood", "generate_until"
#: A score of one document has no standard error.
LEAST_DOCUMENTS = 2
#: Documents of a part on which the task's own code is tried before a study.
MOST_TRIED = 16
#: What a request for a text may say; the texts are greedy.
_GREEDY = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "do_sample", "temperature"}

#: The requests of one document (lm-eval's `Instance`), and a template that writes a chat as a prompt.
Document = Sequence[Any]
Template = Callable[..., str]


def with_documents(splits: Splits, metrics: Iterable[LmEval], folder: Path) -> Splits:
    """Return the splits with the documents of these metrics. `folder`: that of the study.

    Raises DataError with every problem of a task, and MissingPackageError.
    """
    return replace(splits, documents={**splits.documents, **{m.name: Documents(m, folder) for m in metrics}})


class Documents:
    """The documents of a metric's task, with their requests, and the values of responses to these.

    The validation documents of the task compare candidates and its test documents are for the final test. If it has
    only one of them, random halves are, always the same ones. Prompts, also with examples, are those of lm-eval on the
    same documents.
    """

    def __init__(self, metric: LmEval, folder: Path) -> None:
        check_packages([metric])
        self.metric = metric
        self.task = _task(metric, folder)
        try:
            self.result, self.filter, problems = self._results()
            problems += _refused(self.task)
            if not problems:
                self._chosen = self._drawn()
                #: The documents by the split with which they are scored, without a chat template.
                self.requests = self.built()
                problems += [*self._too_few(), *dict.fromkeys(self._unknown_requests())] or self._tried()
        except MetricError as error:
            raise DataError([str(error)]) from error
        except (Exception, SystemExit) as error:  # of the task's own code
            problems = [f"cannot be used: {type(error).__name__}: {first_line(error)}"]
        if problems:
            raise DataError([f"the {metric.place} {what}" for what in problems])

    def _results(self) -> tuple[str, str, list[str]]:
        """Return the metric of the task, the filter (empty for the first one), and the problems of this metric."""
        from lm_eval.api.registry import get_aggregation

        named, _, chosen = (self.metric.result or "").partition(",")
        known, higher = self.task.aggregation(), self.task.higher_is_better()
        means = [name for name, aggregation in known.items() if aggregation is get_aggregation("mean")]
        result = named or next(iter(known), "")
        take = f": take {' or '.join(means)}" if means else ""
        if result not in known:
            return result, chosen, [f"has no metric {result!r}{did_you_mean(result, known) if named else ''}"]
        if result not in means:
            what = f"aggregates {result} by {getattr(known[result], '__name__', 'a function')}"
            return result, chosen, [f"{what}, and only means over documents can be compared in pairs{take}"]
        if higher.get(result, self.metric.maximise) != self.metric.maximise:
            wanted = "minimise" if self.metric.maximise else "maximise"
            what = f"has a better {result} where it is {'smaller' if self.metric.maximise else 'larger'}"
            return result, chosen, [f"{what}: give {self.metric.name} the direction {wanted}"]
        return result, chosen, []

    def _drawn(self) -> list[list[tuple[int, str, Any]]]:
        """Return position, split and document of those that are used, in the order of each of the task's own sets."""
        task, most = self.task, self.metric.max_rows
        if task.has_validation_docs() and task.has_test_docs():
            own = {"validation": list(task.validation_docs()), "test": list(task.test_docs())}
            size = None if most is None else math.ceil(most / 2)
            return [[(i, split, docs[i]) for i in sorted(_order(len(docs))[:size])] for split, docs in own.items()]
        docs = list(task.eval_docs)
        order = _order(len(docs))[:most]
        compared = set(order[: (len(order) + 1) // 2])
        return [[(i, "validation" if i in compared else "test", docs[i]) for i in sorted(order)]]

    def built(self, template: Template | None = None) -> dict[str, list[Document]]:
        """Return the requests of each document by split, as lm-eval makes them. `template`: that of a chat."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        task, chat = self.task, template is not None
        found: dict[str, list[Document]] = {split: [] for split in SCORED}
        for documents in self._chosen:
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # as lm-eval does before the task's documents
            for position, split, document in documents:
                context = task.fewshot_context(
                    document,
                    num_fewshot=task.config.num_fewshot or 0,
                    system_instruction=None,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=True,
                    chat_template=template,
                    gen_prefix=task.doc_to_prefix(document),
                )
                made = task.construct_requests(
                    doc=document,
                    ctx=context,
                    metadata=(task.config.task, position, task.config.repeats),
                    apply_chat_template=chat,
                    chat_template=template,
                )
                found[split].append(made if isinstance(made, list) else [made])
        return found

    def _too_few(self) -> Iterator[str]:
        for split, documents in self.requests.items():
            if len(documents) < LEAST_DOCUMENTS:
                what = f"a score needs {LEAST_DOCUMENTS} at least, to have a standard error"
                yield f"has {len(documents)} documents for the {split} scores; {what}"

    def _unknown_requests(self) -> Iterator[str]:
        """Yield why requests cannot be computed."""
        for request in (request for documents in self.requests.values() for each in documents for request in each):
            if request.request_type == TEXT:
                settings = request.args[1]
                if settings.get("do_sample") or settings.get("temperature"):
                    yield "samples texts, and those of candidates are greedy: set do_sample: false, without temperature"
                elif unknown := sorted(settings.keys() - _GREEDY):
                    yield f"has generation_kwargs that greedy texts have no use for: {', '.join(unknown)}"
            elif request.request_type != LIKELIHOOD:
                what = f"{LIKELIHOOD}, multiple_choice and {TEXT} are computed"
                yield f"has requests of the type {request.request_type}, and only {what}"

    def _tried(self) -> list[str]:
        """Compute values of poor responses; return the problem of the filter, if it has one. Raises MetricError."""
        for documents in self.requests.values():
            tried = documents[:MOST_TRIED]
            poor = [(-1.0, False) if each.request_type == LIKELIHOOD else "" for one in tried for each in one]
            self._respond(tried, poor)
            filters = list(tried[0][0].filtered_resps)
            self.filter = self.filter or filters[0]
            if self.filter not in filters:
                return [f"has no filter {self.filter!r}{did_you_mean(self.filter, filters)}"]
            self.values(tried, poor)
        return []

    def _respond(self, documents: Sequence[Document], responses: Iterable[Any]) -> None:
        """Give responses to the requests of documents, and apply the task's filters."""
        requests = [request for document in documents for request in document]
        for request, response in zip(requests, responses, strict=True):
            # Each repetition of a greedy response is the same.
            request.resps, request.filtered_resps = [response] * (request.repeats or 1), {}
        self.task._instances = requests
        self.task.apply_filters()

    def values(self, documents: Sequence[Document], responses: Iterable[Any]) -> list[float]:
        """Return the value of each document, [N], by the responses to their requests, in order. Raises MetricError.

        A response is a pair for a likelihood, its logarithm and whether the continuation is the greedy one, or a text.
        """
        try:
            self._respond(documents, responses)
            found = [
                self.task.process_results(document[0].doc, [each.filtered_resps[self.filter] for each in document])
                for document in documents
            ]
        except Exception as error:
            raise MetricError(f"{self._where} raised {type(error).__name__}: {first_line(error)}") from error
        return [self._number(values) for values in found]

    def _number(self, values: Mapping[str, Any]) -> float:
        value = values.get(self.result)
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise MetricError(f"{self._where} has {self.result} {value!r:.40} for a document, not a finite number")
        return number

    @property
    def _where(self) -> str:
        return f"the metric {self.metric.name} ({self.metric.place})"

    def digests(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield a name of each part, with the number of its documents and the digest of them and of their requests."""
        for split, documents in self.requests.items():
            hashed = hashlib.sha256()
            for each in documents:
                text = json.dumps([each[0].doc, [one.args for one in each]], sort_keys=True, default=str)
                hashed.update(text.encode() + b"\n")
            yield f"{self.metric.name} {split}", {"rows": len(documents), "digest": hashed.hexdigest()}


def _order(count: int) -> list[int]:
    order = list(range(count))
    Random("documents").shuffle(order)
    return order


def _task(metric: LmEval, folder: Path) -> Any:
    """Return the task. Raises DataError for a task that there is not, and for one that cannot be loaded."""
    path = None if metric.folder is None else folder / Path(metric.folder).expanduser()
    if path is not None and not path.is_dir():
        raise DataError([f"the {metric.place} has no folder {path}"])
    from lm_eval.tasks import TaskManager

    try:
        manager = TaskManager(include_path=path and str(path), include_defaults=path is None)
        if metric.task in (*manager.all_groups, *manager.all_tags):
            raise DataError([f"{metric.task} is a group of tasks of lm-eval: name one task"])
        if metric.task not in manager.all_subtasks:
            where = "lm-eval" if path is None else str(path)
            what = did_you_mean(metric.task, manager.all_subtasks)
            raise DataError([f"{where} has no task {metric.task!r}{what}"])
        (task,) = manager.load([metric.task])["tasks"].values()
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        what = f"cannot be loaded: {type(cause).__name__}: {first_line(cause)}"
        raise DataError([f"the {metric.place} {what}"]) from error
    return task


def _refused(task: Any) -> Iterator[str]:
    if getattr(task, "UNSAFE_CODE", False):
        yield "runs generated programs, which only pass-at-1 does here"
    if getattr(task, "MULTIMODAL", False):
        yield "has images or sounds, and causal-lm reads texts only"
