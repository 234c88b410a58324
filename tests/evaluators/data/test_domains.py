"""Rows of several domains: the embedded ones, and that evaluators hand the domains on and do nothing else with them."""

from __future__ import annotations

import json
import platform
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from autopeft.evaluators.backbones import LoadedBackbone, load_backbone
from autopeft.evaluators.base import Request
from autopeft.evaluators.data.domains import build
from autopeft.evaluators.data.splits import Splits, load_splits
from autopeft.evaluators.data.topics.build import near_duplicates, words
from autopeft.evaluators.proxies import PROXIES
from autopeft.evaluators.proxies.supernet import Supernet
from autopeft.evaluators.rows import DataConfig
from autopeft.evaluators.tasks import model_inputs
from autopeft.evaluators.training.activations import ActivationCache
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import Lora
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.declaration import AdapterChoice
from autopeft.search_space.domains import Choice
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.training import Training
from tests.evaluators.tasks import test_causal_lm

from ...support.tiny_models import byte_tokenizer, save, seeded, word_tokenizer
from ..training.test_train import LABELS, rows

torch.set_num_threads(1)

# The embedded data

FOLDER = Path(build.__file__).parent
TOPICAL = set(build.CHAPTERS)
EXPECTED = {
    "documentation": TOPICAL,
    "code": TOPICAL,
    "names": set(build.KINDS),
    "errors": set(build.EXCEPTIONS),
}

SOURCE = '''
"""What this module is about, in a few words."""
MAX_SIZE = LIMIT_2 = 3

class HTTPServer(Base):
    """A server of requests, one after the other."""

    def handle_one(self, request, *, client_address=None):
        """Handle it."""
        def nested():
            pass
        # a comment
        self.rawLine = request
        if not request:
            raise ValueError("the request %s is empty" % request)
        raise http.ProtocolError("not a class of the language")

    async def close(self):
        raise TypeError(f"cannot close {self!r} now, " "not yet")

def only_documented():
    """Nothing but this."""

raise OSError("no file {} here".format(name))
raise KeyError(name)
'''


def committed(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def of_domain(domain: str, split: str) -> list[dict[str, str]]:
    return [row for row in committed(split) if row["domain"] == domain]


def test_every_domain_has_labels_of_its_own_in_equal_numbers():
    assert set(build.DOMAINS) == set(EXPECTED)
    for split, most in build.MAX_ROWS.items():
        assert all(list(row) == ["text", "label", "domain"] for row in committed(split))
        for domain, labels in EXPECTED.items():
            counts = Counter(row["label"] for row in of_domain(domain, split))
            assert set(counts) == labels
            assert len(set(counts.values())) == 1
            assert most / 3 < counts.total() <= most


def test_no_text_of_a_domain_has_a_near_duplicate_in_any_split():
    for domain, (_, fewest) in build.DOMAINS.items():
        texts = [row["text"] for split in build.SPLITS for row in of_domain(domain, split)]
        assert all(len(group) == 1 for group in near_duplicates(texts))
        assert all(len(words(text)) >= fewest for text in texts)


def test_the_files_are_loaded_with_their_domains():
    splits = load_splits(DataConfig(source="embedded-domains", max_train_rows=50), "classification")
    assert splits.domains == tuple(sorted(EXPECTED)) == tuple(sorted({row["domain"] for row in splits.train}))
    assert set(splits.labels or ()) == TOPICAL | set(build.KINDS) | set(build.EXCEPTIONS)
    assert splits.warnings == ()
    assert len(splits.train) == 50
    assert len(splits.validation) == len(committed("validation"))
    by_label = load_splits(DataConfig(source="embedded-domains", domain="label"), "classification")
    assert by_label.domains == by_label.labels


def test_what_is_read_of_a_module():
    read = {domain: list(reader(SOURCE.encode(), "files")) for domain, (reader, _) in build.DOMAINS.items()}
    assert read == {
        "documentation": [
            ("What this module is about, in a few words.", "files"),
            ("A server of requests, one after the other.", "files"),
            ("Nothing but this.", "files"),
            ("Handle it.", "files"),
        ],
        "code": [
            (
                "def handle_one(self, request, *, client_address=None): def nested(): pass self.rawLine = request"
                " if not request: raise ValueError('the request %s is empty' % request)"
                " raise http.ProtocolError('not a class of the language')",
                "files",
            ),
            ("async def close(self): raise TypeError(f'cannot close {self!r} now, not yet')", "files"),
        ],
        "names": [
            ("raw line", "attributes"),
            ("http server", "classes"),
            ("max size, limit", "constants"),
            ("only documented, handle one, close, nested", "functions"),
            ("request, client address", "parameters"),
        ],
        "errors": [
            ("no file {} here", "another built-in exception"),
            ("%s", "another built-in exception"),
            ("cannot close %s now, not yet", "TypeError"),
            ("the request %s is empty", "ValueError"),
        ],
    }


def test_a_module_is_in_one_split_of_all_domains():
    found = {
        domain: [
            build.UnselectedText(f"{domain} {module} {i}", "-", f"email/m{module}.py")
            for module in range(20)
            for i in range(9)
        ]
        for domain in build.DOMAINS
    }
    splits = build.split_of_modules(found)
    assert Counter(splits.values()) == {"train": 12, "validation": 4, "test": 4}
    assert build.split_of_modules({domain: own[::-1] for domain, own in found.items()}) == splits


def test_near_duplicates_and_the_many_texts_of_one_module_are_left_out():
    found = [build.UnselectedText("the same words in another order", "a", "x.py")]
    found += [build.UnselectedText("in another order the same words", "a", "y.py")]
    found += [build.UnselectedText("words of two labels here", label, "x.py") for label in "ab"]
    found += [
        build.UnselectedText(f"{one * 2} {one * 3} {other * 4}", "a", "x.py")
        for one in ascii_lowercase
        for other in "yz"
    ]
    selected = build.select(found)
    assert selected == build.select(reversed(found))
    assert sum(row.text.startswith(("the same", "in another")) for row in selected) == 1
    assert not [row for row in selected if "two labels" in row.text]
    assert sum(row.module == "x.py" for row in selected) == build.MAX_PER_MODULE


@pytest.mark.slow
@pytest.mark.skipif(platform.python_version() != build.BUILT_WITH, reason="the library of another Python")
def test_a_rebuild_equals_the_committed_files():
    for split, built in build.build(Path(sysconfig.get_path("stdlib"))).items():
        assert (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8") == build.to_jsonl(built)


# What evaluators make of domains

DOMAINS = ("near", "far")
COUNTS = {"train": 40, "validation": 30, "test": 10}
SHAPE: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}


def told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "domain": DOMAINS[i % 3 == 0]} for i, row in enumerate(rows)]


def with_domains(splits: Splits) -> Splits:
    domains = tuple(sorted(DOMAINS))
    return Splits(told(splits.train), told(splits.validation), told(splits.test), splits.labels, (), domains)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedBackbone, str, Splits]:
    model = seeded(BertForSequenceClassification, BertConfig(**SHAPE, vocab_size=40, num_labels=3, pad_token_id=0))
    folder = save(model, tmp_path_factory.mktemp("bert"), word_tokenizer())
    loaded = replace(load_backbone(folder, task="classification", labels=LABELS), pretrained_head=False)
    return loaded, "classification", Splits(*(rows(split, n) for split, n in COUNTS.items()), LABELS)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedBackbone, str, Splits]:
    train = test_causal_lm.TRAIN[:40]
    tokenizer = byte_tokenizer([row["prompt"] + row["completion"] for row in train])
    ids = {"vocab_size": 300, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    model = seeded(LlamaForCausalLM, LlamaConfig(**SHAPE, **ids))
    folder = save(model, tmp_path_factory.mktemp("llama"), tokenizer)
    return load_backbone(folder, task="causal-lm"), "causal-lm", Splits(train, train[:30], train[:10], None)


@pytest.fixture(params=["classifier", "language_model"])
def given(request: pytest.FixtureRequest) -> tuple[LoadedBackbone, str, Splits]:
    return request.getfixturevalue(request.param)


def architectures(loaded: LoadedBackbone) -> list[Architecture]:
    """Two with a prefix of one layer."""
    sites = [site for site in loaded.backbone.sites if site.role == "attn.v" and (site.layer or 0) >= 1]
    return [Architecture.of({site.name: [Lora(rank=rank)] for site in sites}) for rank in (2, 3)]


def requests(loaded: LoadedBackbone) -> list[Request]:
    training = {"learning_rate": 1e-2, "epochs": 1, "batch_size": 8}
    return [
        Request(candidate=Candidate(architecture=architecture, training=training), test=True)
        for architecture in architectures(loaded)
    ]


@pytest.mark.parametrize("evaluator", [TrainEvaluator, PackedEvaluator])
def test_examples_and_batches_know_their_domains(given, evaluator):
    loaded, task, splits = given
    known = with_domains(splits)
    ours = evaluator(loaded, task, known, 32)
    assert [example["domain"] for example in ours.examples["train"]] == [int(i % 3 != 0) for i in range(40)]
    batch = ours.batch("validation", [4, 0, 3])
    assert batch["domains"].dtype == torch.int64
    assert batch["domains"].tolist() == [1, 0, 0]
    assert set(model_inputs(batch)) == {"input_ids", "attention_mask"}
    without = evaluator(loaded, task, splits, 32)
    assert "domain" not in without.examples["train"][0]
    plain = without.batch("validation", [4, 0, 3])
    assert "domains" not in plain
    torch.testing.assert_close({name: batch[name] for name in plain}, plain, rtol=0, atol=0)


@pytest.mark.parametrize("cached", [True, False])
def test_trainings_are_what_they_are_without_domains(given, cached):
    loaded, task, splits = given

    def outcomes(splits: Splits) -> list[Any]:
        cache = ActivationCache(10**8) if cached else None
        packed = PackedEvaluator(loaded, task, splits, 32, pack=2, cache=cache)
        found = packed.evaluate(requests(loaded))
        if not cached:
            found += TrainEvaluator(loaded, task, splits, 32).evaluate(requests(loaded))
        return [replace(outcome.measurement, wall_s=0.0, train_s=0.0) for outcome in found]

    assert outcomes(with_domains(splits)) == outcomes(splits)


def test_domains_are_repeated_for_every_slot(given, monkeypatch):
    loaded, task, splits = given
    ours = PackedEvaluator(loaded, task, with_domains(splits), 32, cache=ActivationCache(10**8))
    seen: list[dict[str, torch.Tensor]] = []
    score = ours.task.scores

    def scores(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        seen.append(batch)
        return score(model, batch)

    monkeypatch.setattr(ours.task, "scores", scores)
    ours.evaluate(requests(loaded))
    packed = [batch for batch in seen if len(batch["targets"]) == 16]
    assert packed
    for batch in packed:
        first, second = batch["domains"].view(2, -1)
        assert torch.equal(first, second)
        assert torch.equal(*batch["targets"].view(2, 8, -1))


@pytest.mark.slow
def test_measured_costs_and_proxies_take_such_batches(classifier):
    loaded, task, splits = classifier
    ours, plain = (PackedEvaluator(loaded, task, s, 32, pack=2) for s in (with_domains(splits), splits))
    candidate = requests(loaded)[0].candidate
    measured = frozenset({"peak_memory_bytes"})
    assert ours.costs(candidate, measured).values == plain.costs(candidate, measured).values
    assert set(ours.costs(candidate, frozenset({"latency_s", "step_s"})).values) >= {"latency_s", "step_s"}
    for proxy in PROXIES.values():
        assert proxy(ours).scores(architectures(loaded)) == proxy(plain).scores(architectures(loaded)), proxy.name


def test_supernets_take_such_batches(classifier):
    loaded, task, splits = classifier
    space = SearchSpace(
        backbone=loaded.backbone,
        adapters={"lora": AdapterChoice(kind="lora", at=("attn.v",), fields={"rank": Choice.of([2, 3])})},
    )

    def scores(splits: Splits) -> list[float]:
        evaluator = PackedEvaluator(loaded, task, splits, 32, pack=2)
        supernet = Supernet(evaluator, space, Training(learning_rate=1e-2, batch_size=8), seed=0, distil=True)
        supernet.train(lambda step: architectures(loaded), 3)
        return supernet.scores(architectures(loaded))

    assert scores(with_domains(splits)) == scores(splits)
