"""Tasks of lm-evaluation-harness, document by document against lm-eval's own model of transformers (HFLM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from autopeft.evaluators.backbones import load_backbone
from autopeft.evaluators.base import Request
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.harness.documents import Documents, with_documents
from autopeft.evaluators.training.activations import ActivationCache
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import AdapterSpec, Lora, Mixture
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.metrics import ALWAYS, LmEval, MetricError
from autopeft.search_space.problem import Fidelity
from autopeft.studies.exporters import EXPORTERS

from ...support.exported import WORDS, make_recipe, save_model
from ...support.lm_eval_tasks import (
    CHOICES,
    COUNT,
    MEAN,
    TEXTS,
    documents,
    save_documents,
    save_task,
    without_appended_end,
)

pytest.importorskip("lm_eval")

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TASKS: dict[str, dict[str, Any]] = {
    "choices": CHOICES,
    "shots": {**CHOICES, "num_fewshot": 2, "fewshot_config": {"sampler": "default", "split": "validation"}},
    "likelihoods": {
        **{key: CHOICES[key] for key in ("doc_to_text",)},
        "output_type": "loglikelihood",
        "doc_to_target": "answer",
        "process_results": "!function functions.likelihood",
        "metric_list": [{"metric": "likelihood", **MEAN}, {"metric": "greedy", **MEAN}],
    },
    "letters": {
        **TEXTS,
        "process_results": "!function functions.letters",
        "metric_list": [{"metric": "letters", **MEAN}],
    },
    "matches": TEXTS,
}


def llama() -> LlamaForCausalLM:
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **ids, max_position_embeddings=64))


def metric(task: str, **settings: Any) -> LmEval:
    return LmEval(name=f"own-{task}", summary="", task=task, folder="tasks", **settings)


METRICS = [metric("choices", result="acc_norm"), *map(metric, ("shots", "likelihoods", "letters", "matches"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    without_appended_end(save_model("llama", folder / "model", llama))
    rows = documents(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for row in rows[::2]:  # what the plain model says, so that some match
        ids = tokenizer(row["question"], return_tensors="pt")
        text = model.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids["input_ids"].shape[1] :]
        said = tokenizer.decode(text, skip_special_tokens=True).split("w7")[0].split("w12 w3")[0]
        row["answer"] = said or row["answer"]
    (folder / "tasks").mkdir()
    save_documents(folder / "tasks" / "documents.jsonl", rows)
    for name, settings in TASKS.items():
        save_task(folder / "tasks", name, settings)
    return folder


@pytest.fixture(scope="module")
def splits(folder: Path) -> Splits:
    rows = [{"prompt": f"w{i % 9} w5", "completion": " w3 w4" if i % 3 else " w5"} for i in range(24)]
    return with_documents(Splits(rows, rows[:6], rows[:4], None), METRICS, folder)


def evaluator(kind: Any, folder: Path, splits: Splits, metrics: Sequence[LmEval] = METRICS, **settings: Any) -> Any:
    loaded = load_backbone(str(folder / "model"), task="causal-lm")
    return kind(loaded, "causal-lm", splits, 16, (*ALWAYS, *metrics), **settings)


def request(placement: Mapping[str, AdapterSpec], **settings: Any) -> Request:
    training = {"learning_rate": 3e-2, "epochs": 2.0, "batch_size": 8}
    architecture = Architecture.of({site: [spec] for site, spec in placement.items()})
    return Request(candidate=Candidate(architecture=architecture, training=training), **settings)


PLACEMENTS: list[dict[str, AdapterSpec]] = [
    {f"layers.{i}.{role}": Lora(rank=2, alpha=16) for i in range(2) for role in ("attn.q", "mlp.up")},
    {"layers.1.mlp.down": Lora(rank=4, alpha=32)},
]


def by_hflm(model: Any, folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The samples of lm-eval's own evaluation, by task and position of the document."""
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder / "model"), batch_size=5)
    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False).load([*TASKS])
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # as lm-eval's command does
    found = evaluate(lm, tasks, bootstrap_iters=0)
    assert found is not None
    return {task: {sample["doc_id"]: sample for sample in found["samples"][task]} for task in TASKS}


def by_position(splits: Splits, name: str, validation: Sequence[float], test: Sequence[float]) -> dict[int, float]:
    own = splits.documents[name]
    found = {}
    for split, values in (("validation", validation), ("test", test)):
        for document, value in zip(own.requests[split], values, strict=True):
            found[document[0].doc_id] = value
    assert sorted(found) == list(range(COUNT)), "every document is in one part"
    return found


RESULTS = {"choices": "acc_norm", "shots": "acc", "likelihoods": "likelihood", "letters": "letters"}
RESULTS |= {"matches": "exact_match"}


@pytest.mark.parametrize("trained", [False, True])
def test_each_document_has_the_value_of_lm_evals_own_model(
    folder: Path, splits: Splits, tmp_path: Path, trained: bool
) -> None:
    own = evaluator(TrainEvaluator, folder, splits)
    if trained:
        (outcome,) = own.evaluate([request(PLACEMENTS[0], test=True, keep_weights=True)])
        recipe = make_recipe("llama", folder / "model", PLACEMENTS[0])
        EXPORTERS["merged"].export(recipe, dict(outcome.weights), tmp_path / "merged", allow_lossy=True)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        validation, test = outcome.measurement.per_example, outcome.measurement.test_per_example
        assert outcome.measurement.values["own-choices"] == pytest.approx(sum(validation["own-choices"]) / 7)
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        with own.attached([Architecture.of({})], [0]) as bare:
            (scores,) = own.final_scores(bare, [True])
        validation, test = scores.validation, scores.test
    for task, theirs in by_hflm(plain, folder).items():
        name = f"own-{task}"
        ours = by_position(splits, name, validation[name], test[name])
        expected = {position: float(sample[RESULTS[task]]) for position, sample in theirs.items()}
        assert ours == pytest.approx(expected, abs=6e-5 if trained else 1e-5), task
        assert len(set(expected.values())) > 1 or trained, "they differ"
        for document in (each for part in splits.documents[name].requests.values() for each in part):
            assert [one.args for one in document] == theirs[document[0].doc_id]["arguments"], "the same prompts"


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_candidate_in_a_pack_has_the_values_that_it_has_alone(folder: Path, splits: Splits, cached: bool) -> None:
    alone = evaluator(TrainEvaluator, folder, splits)
    packed = evaluator(PackedEvaluator, folder, splits, cache=ActivationCache(10**7) if cached else None)
    packed.mixes_depths = True
    requests = [request(placement, test=True) for placement in PLACEMENTS]
    values = []
    for ours, theirs in zip(packed.evaluate(requests), alone.evaluate(requests), strict=True):
        for each in METRICS:
            for split in ("per_example", "test_per_example"):
                expected = getattr(theirs.measurement, split)[each.name]
                assert getattr(ours.measurement, split)[each.name] == pytest.approx(expected, abs=1e-4), each.name
        values.append(ours.measurement.values["own-likelihoods"])
    assert values[0] != pytest.approx(values[1], abs=1e-3), "they differ"


def test_a_mixture_that_routes_by_the_whole_text_has_its_own_gates(folder: Path, splits: Splits) -> None:
    metrics = [metric("likelihoods"), metric("letters")]
    mixture = {"layers.1.mlp.up": Mixture(expert=Lora(rank=2, alpha=16), experts=2, router="token", top_k=1)}
    requests = [request(mixture), request(PLACEMENTS[0])]
    alone = evaluator(TrainEvaluator, folder, splits, metrics).evaluate(requests)
    packed = evaluator(PackedEvaluator, folder, splits, metrics).evaluate(requests)
    for ours, theirs in zip(packed, alone, strict=True):
        for each in metrics:
            expected = theirs.measurement.per_example[each.name]
            assert ours.measurement.per_example[each.name] == pytest.approx(expected, abs=1e-3)


def test_at_rungs_only_candidates_that_may_stop_there_have_it(folder: Path, splits: Splits) -> None:
    own = evaluator(PackedEvaluator, folder, splits, METRICS[:1])
    requests = [request(placement, fidelity=Fidelity(rungs=(0.5,))) for placement in PLACEMENTS]
    for outcome in own.evaluate(requests):
        assert outcome.measurement.rungs[0][1].keys() == {"loss", "accuracy"}
    stopped, _ = own.evaluate(requests, select=lambda share, found: [1])
    assert stopped.measurement.values.keys() == {"loss", "accuracy", "own-choices"}


def test_validation_and_test_documents_of_a_task_are_the_two_parts(folder: Path, tmp_path: Path) -> None:
    files = {
        split: save_documents(tmp_path / f"{split}.jsonl", documents(seed, count))
        for split, seed, count in (("validation", 2, 9), ("test", 3, 6))
    }
    save_task(tmp_path / "tasks", "both", CHOICES, dataset_kwargs={"data_files": files}, test_split="test")
    whole = Documents(metric("both"), tmp_path)
    assert [each[0].doc for each in whole.requests["validation"]] == documents(2, 9)
    assert [each[0].doc for each in whole.requests["test"]] == documents(3, 6)
    part = Documents(metric("both", max_rows=8), tmp_path)
    assert {split: len(found) for split, found in part.requests.items()} == {"validation": 4, "test": 4}
    assert all(each[0].doc in documents(2, 9) for each in part.requests["validation"])
    halves = Documents(metric("choices", max_rows=8), folder)
    assert {split: len(found) for split, found in halves.requests.items()} == {"validation": 4, "test": 4}
    again = Documents(metric("choices", max_rows=8), folder)
    assert dict(again.digests()) == dict(halves.digests())


def test_a_chat_template_writes_the_prompt(folder: Path, splits: Splits, tmp_path: Path) -> None:
    from autopeft.evaluators.harness.requests import Requests

    own = evaluator(TrainEvaluator, folder, splits, [])
    chat = with_documents(splits, [metric("letters", chat_template=True)], folder).documents["own-letters"]
    with pytest.raises(DataError, match="the model's tokenizer has no chat template"):
        Requests(chat, own.task, own.model)
    template = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    own.task.processor.chat_template = template
    prompts = Requests(chat, own.task, own.model).prompts["validation"]
    own.task.processor.chat_template = None
    texts = [own.task.processor.decode(prompt.ids) for prompt in prompts]
    assert texts == [f"w1 {each[0].doc['question']} w2 w3" for each in chat.requests["validation"]]


def test_long_prompts_lose_their_beginning_as_in_lm_eval(folder: Path, splits: Splits, tmp_path: Path) -> None:
    from autopeft.evaluators.harness.requests import Requests

    own = evaluator(TrainEvaluator, folder, splits, [])
    rows = documents(4)
    rows[3]["question"] = " ".join(f"w{i % 40}" for i in range(70))
    (tmp_path / "tasks").mkdir()
    save_documents(tmp_path / "tasks" / "documents.jsonl", rows)
    save_task(tmp_path / "tasks", "letters", TASKS["letters"])
    requests = Requests(Documents(metric("letters"), tmp_path), own.task, own.model)
    (warning,) = requests.warnings()
    assert warning == "own-letters: the model's 64 positions cut off the beginning of the prompt of 1 requests"
    longest = max((p for part in requests.prompts.values() for p in part), key=lambda p: len(p.ids))
    assert own.task.processor.decode(longest.ids).split() == rows[3]["question"].split()[-(64 - 9) :]


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"task": "mine"}, r"tasks has no task 'mine'; did you mean 'mine2'\?"),
    ({}, {"folder": "elsewhere"}, "has no folder .*elsewhere"),
    ({}, {"result": "f2"}, "has no metric 'f2'; known: acc, acc_norm"),
    ({}, {"result": "acc,strict"}, "has no filter 'strict'"),
    ({}, {"maximise": False}, "has a better acc where it is larger: give own the direction maximise"),
    ({"metric_list": [{"metric": "f1"}, {"metric": "acc", **MEAN}]}, {}, r"aggregates f1 by .*: take acc$"),
    (
        {"output_type": "loglikelihood", "doc_to_target": "answer", "metric_list": [{"metric": "perplexity"}]},
        {},
        "aggregates perplexity by perplexity, and only means",
    ),
    (
        {
            "output_type": "loglikelihood_rolling",
            "process_results": "!function functions.likelihood",
            "metric_list": [{"metric": "likelihood", **MEAN}],
        },
        {},
        "has requests of the type loglikelihood_rolling",
    ),
    ({**TEXTS, "generation_kwargs": {"do_sample": True}}, {}, "samples texts, and those of candidates are greedy"),
    (
        {**TEXTS, "generation_kwargs": {"num_beams": 3}},
        {},
        "generation_kwargs that greedy texts have no use for",
    ),
    ({"doc_to_text": "{{ question.nothing() }}"}, {}, "cannot be loaded: UndefinedError"),
    ({"validation_split": "nothing"}, {}, "cannot be loaded: KeyError"),
    ({"dataset_kwargs": {"data_files": {"validation": "/nowhere/x.jsonl"}}}, {}, "cannot be loaded: .*nowhere"),
    ({"unsafe_code": True}, {}, "runs generated programs, which only pass-at-1 does"),
    ({"process_results": "!function functions.letters"}, {}, "raised TypeError"),
    ({"process_results": "!function functions.likelihood"}, {}, "has acc None for a document, not a finite number"),
]


@pytest.mark.parametrize(("changes", "settings", "what"), BAD)
def test_what_cannot_be_measured_is_refused_by_name(
    changes: dict[str, Any], settings: dict[str, Any], what: str, tmp_path: Path
) -> None:
    save_task(tmp_path / "tasks", "mine2", CHOICES, **changes)
    with pytest.raises(DataError, match=what):
        Documents(LmEval(**{"name": "own", "summary": "", "task": "mine2", "folder": "tasks", **settings}), tmp_path)


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_documents_are_refused(count: int, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    save_documents(tmp_path / "tasks" / "documents.jsonl", documents(1, count))
    save_task(tmp_path / "tasks", "mine", CHOICES)
    what = "has 1 documents for the test scores; a score needs 2" if count else "cannot be loaded: "
    with pytest.raises(DataError, match=what):
        Documents(metric("mine"), tmp_path)


def test_a_metric_without_its_documents_cannot_be_computed(folder: Path) -> None:
    rows = [{"prompt": f"w{i}", "completion": " w3"} for i in range(8)]
    with pytest.raises(MetricError, match="own-choices cannot be computed: there are no documents of its task"):
        evaluator(TrainEvaluator, folder, Splits(rows, rows, rows, None), METRICS[:1])
