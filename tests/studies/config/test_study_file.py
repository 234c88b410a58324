"""The study file: what is valid, and one line with a place for everything that is not."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from autopeft.evaluators.training.registry import EVALUATORS
from autopeft.search_space.adapters import ADAPTERS
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.domains import Choice, Float, Int
from autopeft.search_space.metrics import QUALITIES
from autopeft.search_space.problem import METRICS
from autopeft.search_space.spaces.presets import PRESETS
from autopeft.search_space.spaces.rules import left_out
from autopeft.search_space.training import Training
from autopeft.searchers import SEARCHERS
from autopeft.studies.config.fingerprint import differences, fingerprint
from autopeft.studies.config.loading import load_study, study_from_mapping
from autopeft.studies.config.problem import problem_for, space_for
from autopeft.studies.config.schema import json_schema
from autopeft.studies.config.sections.inputs import DataSettings, ModelSettings
from autopeft.studies.config.sections.search import ConstraintSettings
from autopeft.studies.config.sections.training import TrainingSettings
from autopeft.studies.config.source import StudyFileError
from autopeft.testing.spaces import encoder

TEMPLATE = Path(__file__).resolve().parents[3] / "studies" / "config" / "templates" / "study.yaml"
MINIMAL = """\
study: small
space:
  adapters:
    lora:
      rank: [0, 4, 8]
"""


@pytest.fixture
def load(tmp_path):
    def load(text=MINIMAL, *overrides, **environment):
        path = tmp_path / "study.yaml"
        path.write_text(text)
        return load_study(path, overrides, environment)

    return load


@pytest.fixture
def problems(load, tmp_path):
    """The problems of a text, without the folder of the file."""

    def problems(text=MINIMAL, *overrides, **environment):
        with pytest.raises(StudyFileError) as caught:
            load(text, *overrides, **environment)
        return [line.replace(f"{tmp_path}/", "") for line in caught.value.problems]

    return problems


def backbone(num_layers=4, roles=("attn.q", "attn.v", "mlp.up")):
    sites = [
        Site(
            name=f"layers.{layer}.{role}", layer=layer, role=role, module=f"{layer}.{role}",
            input_module=f"{layer}.{role}", in_features=8, out_features=8, bias=True,
        )
        for layer in range(num_layers) for role in roles
    ]  # fmt: skip
    return Backbone(
        id="tiny", revision=None, family="bert", sites=tuple(sites), hidden_size=8, num_layers=num_layers,
        num_params=10_000, head_modules=(), num_head_params=0, causal=False,
    )  # fmt: skip


# Valid files


def test_defaults(load):
    study = load()
    assert (study.seed, study.task, study.search.searcher, study.search.trials) == (
        0,
        "classification",
        "bo",
        40,
    )
    assert space_for(study, backbone()).training["learning_rate"] == Float(low=5e-4, high=1e-2, log=True)
    assert [(o.name, o.maximise) for o in study.objectives_list()] == [
        ("accuracy", True),
        ("num_params", False),
    ]


def test_template_is_valid_and_differs_where_it_must(load):
    """It says the defaults, but for what makes a first study end in minutes."""
    study = load_study(TEMPLATE, environment={})
    assert not left_out(space_for(study, encoder())), "it contains what many run by hand"
    minimal = load().model_copy(update={"study": study.study})
    different = {"space", "constraints", "data", "training", "search", "baselines", "finalists"}
    assert study.model_dump(exclude=different) == minimal.model_dump(exclude=different)


def test_settings_that_the_template_only_mentions_are_valid_too(load):
    text = re.sub(r"^( *)# (?=[a-z_]+: )", r"\1", TEMPLATE.read_text(), flags=re.MULTILINE)
    study = load(text, "data.source=files")
    mentioned = (study.model.revision, study.data.test, study.search.timeout_s, study.output)
    assert mentioned == ("main", "test.jsonl", 3600, "runs/my-study")


def test_the_study_of_autopeft(load):
    """The numbers of the paper; what it only mentions is valid too."""
    template = TEMPLATE.with_name("autopeft.yaml")
    study = load_study(template, environment={})
    search = study.search
    assert (search.searcher, search.trials, search.initial, search.batch, search.rungs) == ("bo", 200, 100, 4, ())
    assert (study.space.preset, study.finalists.seeds) == ("autopeft", 5)
    assert [objective.name for objective in study.objectives] == ["accuracy", "num_params"]
    text = re.sub(r"^( *)# (?=[a-z_]+: )", r"\1", template.read_text(), flags=re.MULTILINE)
    mentioned = load(text, "data.source=files").search
    assert mentioned.start == ({"parallel.size": 48},)
    assert mentioned.prior == "../earlier-study"


def test_domains(load):
    text = (
        MINIMAL
        + """\
      alpha: {low: 8, high: 32}
      dropout: [0, 0.1]
      init: kaiming
training:
  epochs: 3
  batch_size: {low: 8, high: 32, step: 8}
  schedule: [linear, cosine]
"""
    )
    space = space_for(load(text), backbone())
    fields = space.adapters["lora"].fields
    assert fields["rank"] == Choice(choices=(0, 4, 8), ordered=True)
    # alpha is a real number in every network, so that 16 and 16.0 are not two
    assert fields["alpha"] == Float(low=8.0, high=32.0)
    assert fields["dropout"] == Choice(choices=(0.0, 0.1), ordered=True)
    assert fields["init"] == "kaiming"
    assert space.training["epochs"] == 3.0
    assert isinstance(space.training["epochs"], float)
    assert space.training["batch_size"] == Int(low=8, high=32, step=8)
    assert space.training["schedule"] == Choice(choices=("linear", "cosine"))


def test_declaration_reaches_the_space(load):
    study = load("""\
study: s
space:
  adapters:
    big: {kind: lora, at: [attn.q], layers: [0, 1], placement: null, rank: [8, 16], vary: {rank: layer}}
    small: {kind: lora, at: [attn.q], rank: 1}
  one_of:
    size: {members: [big, small], per: layer, optional: true}
  layer_gate: true
  stages: 2
""")
    space = space_for(study, backbone())
    assert (space.stages, space.layer_gate) == (2, True)
    names = {gene.name for gene in space.genes}
    assert {"layers.3.on", "size.layers.0", "big.rank.layers.1"} <= names
    assert "big.rank.layers.2" not in names


def test_stages_default_fits_a_shallow_model(load):
    assert space_for(load(), backbone(num_layers=2)).stages == 2


def test_adapters_of_the_file_replace_those_of_the_preset(load):
    own = "{mlp: {kind: lora, at: [mlp.up], rank: 3}}"
    text = f"study: s\nspace: {{preset: lora-per-layer, adapters: {own}}}\n"
    adapters = space_for(load(text), backbone()).adapters
    assert adapters["mlp"].fields == {"rank": 3}
    assert adapters["attn"].vary == {"rank": "layer"}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads(load, preset):
    assert load(f"study: s\nspace: {{preset: {preset}}}\n").space.preset == preset


def test_objectives(load):
    study = load(MINIMAL + "objectives: [loss, {name: latency_s, bound: 0.1, reference: 1}, num_params]\n")
    loss, latency, _ = study.objectives_list()
    assert (loss.maximise, latency.bound, latency.reference, latency.unit) == (False, 0.1, 1.0, "seconds")
    turned = load(MINIMAL + "objectives: [accuracy, {name: num_params, direction: maximise}]\n").objectives_list()
    assert turned[1].maximise
    problem = problem_for(study, backbone())
    assert problem.num_trials == 40
    assert problem.objectives == study.objectives_list()


def test_precedence(load):
    text = MINIMAL + "search: {trials: 2}\n"
    assert load(text).search.trials == 2
    assert load(text, AUTOPEFT__SEARCH__TRIALS="3").search.trials == 3
    assert load(text, "search.trials=4", AUTOPEFT__SEARCH__TRIALS="3").search.trials == 4
    assert load(text, AUTOPEFT_DEBUG="1").search.trials == 2


def test_overrides_make_sections_reach_lists_and_replace_null(load):
    study = load(
        MINIMAL + "objectives: [accuracy, {name: num_params}]\ndata:\n",
        "space.adapters.lora.rank=[2, 4]",
        "objectives.1.bound=1000",
        "data.max_train_rows=50",
        "model.revision=null",
    )
    assert study.space.adapters["lora"].fields["rank"] == (2, 4)
    assert study.objectives[1].bound == 1000
    assert study.data.max_train_rows == 50


def test_environment_reaches_names_with_hyphens_and_capitals(load):
    text = MINIMAL.replace("lora:", "LoRA-q: {kind: lora}\n    lora:")
    study = load(text, AUTOPEFT__SPACE__ADAPTERS__LORA_Q__RANK="5")
    assert study.space.adapters["LoRA-q"].fields == {"rank": 5}


def test_anchors_and_merge_keys(load):
    study = load("""\
study: s
space:
  layer_gate: &yes true
  adapters:
    lora: &base {rank: [1, 2]}
    other: {<<: *base, kind: lora, alpha: 8}
tracking: {enabled: *yes}
""")
    assert study.space.adapters["other"].fields == {"rank": (1, 2), "alpha": 8}
    assert study.tracking.enabled is True


def test_paths_count_from_the_file(tmp_path, monkeypatch):
    folder = tmp_path / "there"
    (folder / "model").mkdir(parents=True)
    (folder / "study.yaml").write_text(
        MINIMAL + "model: {id: model}\ndata: {source: files, train: a.csv, validation: b.csv, test: c.csv}\n"
    )
    monkeypatch.chdir(tmp_path)
    study = load_study("there", environment={})
    assert study.path == Path("there/study.yaml")
    assert study.output_folder == folder / "runs" / "small"
    assert study.tracking_uri == f"sqlite:///{folder}/runs/small/mlflow.db"
    assert study.model_id == str(folder / "model")
    elsewhere = study.model_copy(update={"model": ModelSettings(id="./other")})
    assert elsewhere.model_id == str(folder / "other")
    (folder / "model.GGUF").touch()
    assert study.model_copy(update={"model": ModelSettings(id="model.GGUF")}).model_id == str(folder / "model.GGUF")
    assert (study.data_settings().folder, study.data_settings().train) == (folder, "a.csv")
    assert study.model_copy(update={"output": "/else/where"}).output_folder == Path("/else/where")


def test_split_names_of_the_hub_are_the_usual_ones(load):
    data = load(MINIMAL + "data: {source: org/name, validation: dev}\n").data_settings()
    assert (data.train, data.validation, data.test) == ("train", "dev", "test")


def test_settings_that_are_data_already():
    study = study_from_mapping({"study": "s", "space": {"adapters": {"lora": {"rank": (1, 2)}}}})
    assert study.space.adapters["lora"].fields["rank"] == (1, 2)
    with pytest.raises(StudyFileError, match=r"^search\.trails: unknown key; did you mean 'trials'\?"):
        study_from_mapping({"study": "s", "space": {"preset": "mam"}, "search": {"trails": 1}})


# What is wrong, and where

WRONG = [
    ("sead: 1", "6 sead: unknown key; did you mean 'seed'?"),
    ("search:\n  trails: 3", "7 search.trails: unknown key; did you mean 'trials'?"),
    (
        "training: {learning_rate: {low: 1, high: 2, lag: true}}",
        "6 training.learning_rate.lag: unknown key; did you",
    ),
    ("training: {epoch: 3}", "6 training.epoch: unknown key; did you mean 'epochs'?"),
    ("training: {num_train_epochs: 3}", "6 training.num_train_epochs: unknown key; did you mean 'epochs'?"),
    ("training: {lr: 0.001}", "6 training.lr: unknown key; did you mean 'learning_rate'?"),
    ("data:\n  text: 5", "7 data.text: must be a text"),
    ("search: 5", "6 search: must be a mapping"),
    ("search: {trials: 0}", "6 search.trials: must be greater than or equal to 1"),
    ("search: {trials: '5'}", "6 search.trials: must be a whole number"),
    ("search: {trials: 2.5}", "6 search.trials: must be a whole number"),
    ("search: {share: 1.5}", "6 search.share: must be less than or equal to 1"),
    ("search: {timeout_s: .inf}", "6 search.timeout_s: must be a finite number"),
    ("search: {rungs: [0.5, 0.1]}", "6 search.rungs: must be in ascending order"),
    ("search: {rungs: [0.1, 0.5], share: 0.5}", "6 search.rungs: must be below search.share"),
    ("search: {searcher: tpee}", "6 search.searcher: unknown searcher 'tpee'; did you mean 'tpe'?"),
    ("evaluation: {evaluator: packd}", "6 evaluation.evaluator: unknown evaluator 'packd'; did you mean 'packed'?"),
    (
        "evaluation: {evaluator: train}\nsearch: {searcher: proxy}",
        "7 search.searcher: proxy needs evaluation.evaluator: packed",
    ),
    ("objectives: [accuracy]", "6 objectives: needs at least 2 entries, has 1"),
    (
        "objectives: [accuracy, loss, num_params, step_s, latency_s]",
        "6 objectives: may have 4 entries, has 5",
    ),
    ("objectives: [accuracy, accuracy]", "6 objectives.1: 'accuracy' occurs twice"),
    (
        "objectives:\n- accuracy\n- num_parms",
        "8 objectives.1: unknown metric 'num_parms'; did you mean 'num_params'?",
    ),
    ("objectives: [num_params, latency_s]", "6 objectives: must contain accuracy or loss"),
    (
        "objectives: [accuracy, {name: loss, direction: up}]",
        "6 objectives.1.direction: must be 'maximise' or",
    ),
    (
        "objectives: [{name: accuracy, direction: minimise}, num_params]",
        "6 objectives.0.direction: a better accuracy is larger: leave the direction out",
    ),
    (
        "objectives: [{name: accuracy, bound: 1.5}, num_params]",
        "6 objectives.0.bound: no candidate can reach 1.5: the best possible accuracy is 1",
    ),
    (
        "objectives: [{name: accuracy, reference: 1.0}, num_params]",
        "6 objectives.0.reference: no candidate can be better than 1: the best possible accuracy is 1",
    ),
    (
        "objectives: [accuracy, {name: num_params, bound: -5}]",
        "6 objectives.1.bound: no candidate can reach -5: the best possible num_params is 0",
    ),
    (
        "objectives: [loss, {name: latency_s, reference: 0}]",
        "6 objectives.1.reference: no candidate can be better than 0: the best possible latency_s is 0",
    ),
    ("recommend: {within: 1}", "6 recommend.within: counts every loss of accuracy as none, from 0 to 1"),
    (
        "objectives: [matthews, num_params]\nrecommend: {within: 2.5}",
        "7 recommend.within: counts every loss of matthews as none, from -1 to 1",
    ),
    ("constraints: {num_params: -1}", "6 constraints.num_params: must be greater than 0"),
    ("constraints: {parameters: 1}", "6 constraints.parameters: unknown key; "),
    (
        "baselines: {names: [lora-r8]}",
        "6 baselines.names.0: unknown baseline 'lora-r8'; did you mean 'lora-r8-qv'?",
    ),
    ("baselines: {learning_rates: []}", "6 baselines.learning_rates: needs at least 1 entries"),
    ("training: {learning_rate: 0}", "6 training.learning_rate: learning_rate must be positive"),
    (
        "training: {learning_rate: {low: 1.0e-2, high: 1.0e-3}}",
        "6 training.learning_rate: low must be below high",
    ),
    ("training: {learning_rate: [1.0e-3, 1.0e-3]}", "6 training.learning_rate: duplicate value"),
    ("training: {learning_rate: []}", "6 training.learning_rate: a choice needs at least one value"),
    ("training: {learning_rate: null}", "6 training.learning_rate: must be a number, a word, true or false"),
    ("training: {learning_rate: fast}", "6 training.learning_rate: must be a number, got 'fast'"),
    ("training: {epochs: {low: 1, high: 3, step: 1}}", "6 training.epochs: step needs whole numbers"),
    ("training: {batch_size: [8, 16.5]}", "6 training.batch_size: must be a whole number, got 16.5"),
    (
        "training: {batch_size: {low: 8, high: 16.5}}",
        "6 training.batch_size: must be a whole number, got a range from 8 to 16.5",
    ),
    (
        "training: {batch_size: {low: 8, high: 32, step: 5}}",
        "6 training.batch_size: step must be positive and divide high - low",
    ),
    ("training: {schedule: [linear, cosin]}", "6 training.schedule: schedule must be one of"),
    ("data: {source: files, train: a, validation: b}", "6 data.test: is missing"),
    ("data: {train: mine.csv}", "6 data.train: cannot be set: the embedded data has this split"),
    ("task: causal-lm\nmodel: {id: some/model}", "1 data.source: the embedded data is for classification"),
    ("task: causal-lm\ndata: {source: org/data}", "1 model.id: the embedded model is an encoder"),
    (
        "data: {source: embedded-domains, test: mine.csv}",
        "6 data.test: cannot be set: the embedded data has this split",
    ),
    (
        "task: causal-lm\nmodel: {id: some/model}\ndata: {source: embedded-domains}",
        "8 data.source: the embedded data is for classification",
    ),
    ("data: {source: embedded-functions}", "6 data.source: these embedded rows are chats without labels"),
    ("task: regression", "6 task: unknown task 'regression'; known: causal-lm, classification"),
    ("task: casual-lm", "6 task: unknown task 'casual-lm'; did you mean 'causal-lm'?"),
    ("seed: 4294967296", "6 seed: must be less than 2147483648"),
    ("device: gpu", "6 device: must be 'auto', 'cpu' or 'cuda'"),
]


@pytest.mark.parametrize(("text", "problem"), WRONG, ids=[text for text, _ in WRONG])
def test_one_problem(problems, text, problem):
    (found,) = problems(f"{MINIMAL}{text}\n")
    assert found.startswith(f"study.yaml:{problem}")


WRONG_SPACES = [
    ("{}", "2 space.adapters: the space is empty"),
    ("{adapters: {}}", "2 space.adapters: the space is empty"),
    ("{preset: autopef}", "2 space.preset: unknown preset 'autopef'; did you mean 'autopeft'?"),
    (
        "{adapters: {lroa: {rank: 4}}}",
        "2 space.adapters.lroa.kind: unknown adapter 'lroa'; did you mean 'lora'?",
    ),
    (
        "{adapters: {a: {kind: lorra}}}",
        "2 space.adapters.a.kind: unknown adapter 'lorra'; did you mean 'lora'?",
    ),
    (
        "{adapters: {lora: {rnak: 4}}}",
        "2 space.adapters.lora.rnak: unknown field of lora; did you mean 'rank'?",
    ),
    (
        "{adapters: {lora: {use_rslora: true}}}",
        "2 space.adapters.lora.use_rslora: unknown field of lora; did you mean 'scaling: rslora'?",
    ),
    (
        "{adapters: {lora: {target_modules: [q_proj]}}}",
        "2 space.adapters.lora.target_modules: unknown field of lora; did you mean 'at'?",
    ),
    ("{adapters: {lora: {rank: 0}}}", "2 space.adapters.lora.rank: 0 is the only size"),
    ("{adapters: {lora: {rank: [0]}}}", "2 space.adapters.lora.rank: 0 is the only size"),
    ("{adapters: {lora: {rank: {low: 0, high: 0}}}}", "2 space.adapters.lora.rank: 0 is the only size"),
    (
        "{adapters: {lora: {rank: {low: 8, high: 4}}}}",
        "2 space.adapters.lora.rank: low must not be above high",
    ),
    ("{adapters: {lora: {rank: 2.5}}}", "2 space.adapters.lora.rank: must be a whole number, got 2.5"),
    ("{adapters: {lora: {rank: true}}}", "2 space.adapters.lora.rank: must be a whole number, got True"),
    ("{adapters: {lora: {rank: -1}}}", "2 space.adapters.lora.rank: rank must be at least 1"),
    ("{adapters: {lora: {at: [attn.z]}}}", "2 space.adapters.lora.at: lora cannot be attached at 'attn.z'"),
    (
        "{adapters: {lora: {layers: [-1]}}}",
        "2 space.adapters.lora.layers.0: must be greater than or equal to 0",
    ),
    ("{adapters: {lora: {placement: head}}}", "2 space.adapters.lora.placement: must be 'model', 'stage'"),
    (
        "{adapters: {lora: {rank: 4, vary: {rank: layer}}}}",
        "2 space.adapters.lora.vary.rank: only a field with",
    ),
    ("{adapters: {lora: 8}}", "2 space.adapters.lora: must be a mapping"),
    ("{adapters: {lora.q: {kind: lora}}}", "2 space.adapters.lora.q: must be made of letters"),
    (
        "{adapters: {training: {kind: lora}}}",
        "2 space.adapters.training: 'training' is a reserved name",
    ),
    ("{stages: 0, preset: mam}", "2 space.stages: must be greater than or equal to 1"),
    (
        "{adapters: {lora: {}}, one_of: {g: {members: [lroa]}}}",
        "2 space.one_of.g: unknown adapter name 'lroa'; did you mean",
    ),
    ("{adapters: {lora: {}}, one_of: {g: {}}}", "2 space.one_of.g.members: is missing"),
    (
        "{adapters: {lora: {}}, one_of: {lora: {members: [lora]}}}",
        "2 space.one_of.lora: an adapter also has this name",
    ),
    (
        "{adapters: {lora: {}}, one_of: {g: {members: [lora]}, h: {members: [lora]}}}",
        "2 space.one_of.h.members.0: 'lora' is already a member of 'g'",
    ),
    (
        "{adapters: {lora: {placement: site}}, one_of: {g: {members: [lora]}}}",
        "2 space.adapters.lora.placement: cannot be set: group 'g' already decides where the adapter is on",
    ),
]


@pytest.mark.parametrize(("space", "problem"), WRONG_SPACES, ids=[space for space, _ in WRONG_SPACES])
def test_one_problem_of_the_space(problems, space, problem):
    (found,) = problems(f"study: s\nspace: {space}\n")
    assert found.startswith(f"study.yaml:{problem}")


def test_nothing_to_search(problems):
    (found,) = problems("study: s\nspace: {adapters: {lora: {rank: 4}}}\ntraining: {learning_rate: 0.001}\n")
    assert found == "study.yaml:2 space: nothing to search: every field has a single value; give one a list or a range"


def test_all_problems_at_once_in_the_order_of_the_file(problems):
    text = """\
study: a study
seed: no
space:
  adapters:
    lora:
      rank: {low: 8, high: 4}
      at: [attn.q, mlp.upp]
      alpha: {low: 8, hihg: 16}
    lroa: {}
objectives: [accuracy]
search:
  trials: many
  searcher: tpee
finalists: {}
"""
    found = problems(text, "search.share=2")
    assert [line.split(": ")[0] for line in found] == [
        "study.yaml:1 study",
        "study.yaml:2 seed",
        "study.yaml:6 space.adapters.lora.rank",
        "study.yaml:7 space.adapters.lora.at",
        "study.yaml:8 space.adapters.lora.alpha.high",
        "study.yaml:8 space.adapters.lora.alpha.hihg",
        "study.yaml:9 space.adapters.lroa.kind",
        "study.yaml:10 objectives",
        "--set search.share",
        "study.yaml:12 search.trials",
        "study.yaml:13 search.searcher",
    ]
    assert found[5].endswith("unknown key; did you mean 'high'?")


def test_missing_name(problems):
    assert problems("space: {preset: mam}\n") == ["study.yaml:1 study: is missing"]
    assert "study.yaml study: is missing" in problems("")


def test_file_that_is_no_mapping(problems):
    assert problems("- a\n- b\n")[0] == "study.yaml:1 the file must be a mapping of keys to values"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("study: [s\n", "study.yaml:2 not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("study: s\n\tseed: 1\n", "study.yaml:2 not valid YAML: "),
        ("study: s\nseed: 1\nseed: 2\n", 'study.yaml:3 not valid YAML: found duplicate key "seed"'),
        ("study: s\nseed: \x01\n", "study.yaml:2 not valid YAML: unacceptable character"),
    ],
)
def test_yaml_errors(problems, text, problem):
    (found,) = problems(text)
    assert found.startswith(problem)


def test_missing_file(tmp_path):
    with pytest.raises(StudyFileError, match=r"nothing\.yaml: no such file; `autopeft init NAME` writes one"):
        load_study(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StudyFileError, match="not UTF-8 text"):
        load_study(tmp_path / "binary.yaml")


def test_text_that_is_no_unicode(problems):
    assert problems(MINIMAL + r'output: "\ud800"') == [
        r"study.yaml:6 output: has an unpaired surrogate (\ud800 to \udfff)"
    ]


def test_data_of_the_caller_is_left_alone():
    data = {"study": "s", "space": {"adapters": {"lora": {"rnak": 1}}}, "search": {"trails": 1}}
    copy = json.loads(json.dumps(data))
    with pytest.raises(StudyFileError):
        study_from_mapping(data)
    assert data == copy


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("search.trails=3", "--set search.trails: unknown key; did you mean 'trials'?"),
        ("seach.trials=3", "--set seach.trials: seach: unknown key; did you mean 'search'?"),
        ("search.trials=none", "--set search.trials: must be a whole number"),
        ("search.trials", "--set search.trials: expected key=value, such as search.trials=5"),
        ("study.x=1", "--set study.x: study is a single value, not a section with settings"),
        ("space.adapters.lora.rank.9=1", "--set space.adapters.lora.rank.9: the list has no entry '9'"),
        ("search.trials=[", "--set search.trials: not valid YAML: "),
        (
            "space.adapters.lora={rank: 0}",
            "--set space.adapters.lora: space.adapters.lora.rank: 0 is the only size",
        ),
    ],
)
def test_wrong_overrides(problems, override, problem):
    (found,) = problems(MINIMAL, override)
    assert found.startswith(problem)


def test_wrong_environment(problems):
    (found,) = problems(AUTOPEFT__SEARCH__TRIALS="0")
    assert found == "AUTOPEFT__SEARCH__TRIALS: must be greater than or equal to 1"


def test_problems_with_a_model_have_lines_too(load, tmp_path):
    study = load(MINIMAL + "      at: [attn.q, mlp.gate]\n      layers: [0, 9]\n  stages: 30\n")
    with pytest.raises(StudyFileError) as caught:
        space_for(study, backbone())
    assert [line.replace(f"{tmp_path}/", "") for line in caught.value.problems] == [
        "study.yaml:6 space.adapters.lora.at: this model has no site with role 'mlp.gate';"
        " it has attn.q, attn.v, mlp.up (its mlp is not gated: use mlp.up)",
        "study.yaml:7 space.adapters.lora.layers: no layer 9: the model has layers 0 to 3",
        "study.yaml:8 space.stages: must be between 1 and 4, the number of layers, got 30",
    ]


def test_problems_of_a_preset_with_a_model_point_at_the_preset(load):
    study = load("study: s\nspace:\n  preset: mam\n")
    with pytest.raises(StudyFileError, match=r"study\.yaml:2 space\.adapters\.prefix\.at: "):
        space_for(study, backbone())


# Resuming


def test_fingerprint_and_differences(load):
    old = fingerprint(load())
    assert fingerprint(load(MINIMAL, "search.trials=99", "output=x", "tracking.enabled=false", "device=cpu")) == old
    new = fingerprint(
        load(
            MINIMAL,
            "seed=1",
            "space.adapters.lora.rank=[1, 2]",
            "space.adapters.lora.alpha=8",
            "search.share=0.5",
        )
    )
    assert differences(old, old) == []
    assert differences(old, new) == [
        "seed: was 0, is 1",
        "space.adapters.lora.rank: was [0, 4, 8], is [1, 2]",
        "space.adapters.lora.alpha: 8 was added",
        "search.share: was 1.0, is 0.5",
    ]


def test_a_study_is_named_with_what_was_set_beside_its_file(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(MINIMAL)
    assert load_study(path).words == str(path)
    assert load_study(path, ["study=other", "objectives=[loss, num_params]"]).words == (
        f"{path} --set study=other --set 'objectives=[loss, num_params]'"
    )


def test_what_scores_depend_on_may_not_change_where_they_are_used(load):
    old, new = (fingerprint(load(MINIMAL, "search.searcher=proxy", *more)) for more in ((), ("proxy.subnets=500",)))
    assert differences(old, new) == ['proxy: {"subnets": 500} was added']
    assert fingerprint(load(MINIMAL, "proxy.subnets=500")) == fingerprint(load())


def test_studies_from_before_there_were_domains_go_on(load):
    assert "domain" not in fingerprint(load())["data"]
    told = fingerprint(load(MINIMAL, "data.domain=origin"))
    assert differences(fingerprint(load()), told) == ['data.domain: "origin" was added']


def test_adapters_that_compute_with_the_weight_of_different_layers(load):
    """A check without the model keeps the layers apart."""
    space = (
        MINIMAL.partition("    lora:")[0]
        + "    a: {kind: dora, rank: [2, 4], layers: [0, 1]}\n    b: {kind: hira, layers: %s}\n"
    )
    assert load(space % [2, 30]).space.adapters["b"].layers == (2, 30)
    assert load(space % [2, 10**9]), "that the model has no such layer is for the model to say"
    with pytest.raises(StudyFileError, match=r"may be on at layers\.1\.attn\.q together with 'a'"):
        load(space % [1, 2])


# Agreement with what the settings stand for


def test_training_settings_are_the_fields_of_training():
    assert list(TrainingSettings.model_fields) == [f.name for f in dataclasses.fields(Training)]


def test_data_settings_are_those_of_the_loader():
    from autopeft.evaluators.data import splits

    loader = {f.name: f.default for f in dataclasses.fields(splits.DataConfig)}
    ours = {name: field.default for name, field in DataSettings.model_fields.items()}
    assert ours.keys() == loader.keys() - {"folder"}
    # The study file says which turns are learnt where the task has some, and ledgers of before say nothing.
    others = ours.keys() - {"train", "validation", "test", "train_on_turns"}
    assert {name: ours[name] for name in others} == {name: loader[name] for name in others}


def test_settings_to_save_memory_change_no_fingerprint_and_appear_only_where_they_are_set(load):
    plain = load(MINIMAL)
    assert not {"micro_batch", "checkpointing"} & plain.model_dump(mode="json")["evaluation"].keys()
    told = load(MINIMAL, "evaluation.micro_batch=2", "evaluation.checkpointing=false")
    found = told.model_dump(mode="json")["evaluation"]
    assert (found["micro_batch"], found["checkpointing"]) == (2, False)
    assert fingerprint(told) == fingerprint(plain)
    with pytest.raises(StudyFileError, match="evaluation"):
        load(MINIMAL, "evaluation.micro_batch=0")


def test_constraints_are_metrics():
    assert ConstraintSettings.model_fields.keys() <= METRICS.keys() | {"trainable_fraction"}


# The schema


def test_schema_lists_the_registries_and_describes_every_setting():
    schema = json_schema()
    definitions = schema["$defs"]
    assert {name.removeprefix("adapter.") for name in definitions if name.startswith("adapter.")} == set(ADAPTERS)
    assert definitions["SearchSettings"]["properties"]["searcher"]["enum"] == list(SEARCHERS)
    assert definitions["EvaluationSettings"]["properties"]["evaluator"]["enum"] == list(EVALUATORS)
    for section in ("ObjectiveSettings", "ReportedSettings"):
        known, by_domain = definitions[f"{section}.else"]["properties"]["name"]["anyOf"]
        assert known["enum"] == list(METRICS)
        assert all(re.search(by_domain["pattern"], f"{name}@law") for name in QUALITIES)
    assert definitions["SpaceSettings"]["properties"]["preset"]["anyOf"][0]["enum"] == list(PRESETS)
    for name, section in [("", schema), *definitions.items()]:
        if not name.startswith("adapter"):
            for key, setting in section["properties"].items():
                assert "description" in setting or "$ref" in setting, f"{name}.{key}"


def test_every_reference_of_the_schema_resolves():
    schema = json_schema()
    references = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(schema)))
    assert references
    assert references <= schema["$defs"].keys()


def test_schema_accepts_the_template_and_refuses_mistakes():
    jsonschema = pytest.importorskip("jsonschema")
    from ruamel.yaml import YAML

    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    template = YAML(typ="safe", pure=True).load(TEMPLATE.read_text())
    assert not list(validator.iter_errors(template))
    for per, valid in (("layer", True), ("expert", True), ("head", False)):
        lora = {"rank": [1, 2], "experts": 2, "vary": {"rank": per}}
        assert valid != bool(list(validator.iter_errors({**template, "space": {"adapters": {"lora": lora}}})))
    for wrong in (
        {"lora": {"rnak": 1}},
        {"a": {"rank": 1}},
        {"a": {"kind": "lroa"}},
        {"lora": {"rank": "x"}},
    ):
        assert list(validator.iter_errors({"study": "s", "space": {"adapters": wrong}})), wrong
    for start in (["lora-r8"], [3], [{"lora.rank": [1]}]):
        assert list(validator.iter_errors({"study": "s", "search": {"start": start}})), start
    start = ["lora-r8-qv", {"lora.rank": 8, "lora.scaling": "rslora"}]
    assert not list(validator.iter_errors({"study": "s", "search": {"start": start, "prior": "../a", "initial": 4}}))
    named = {"a": {"kind": "lora", "rank": [1, 2], "at": ["attn.q"]}}
    assert not list(validator.iter_errors({"study": "s", "space": {"adapters": named}}))
