"""A training script to read and change: peft with TRL's SFTTrainer, or transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from pprint import pformat
from string import Template
from typing import Any

from typing_extensions import override

from autopeft.search_space.metrics import ALWAYS, QUALITIES
from autopeft.studies.exporters.base import Assessment, Exporter, State, approximate, unsupported
from autopeft.studies.exporters.peft_config import decayed_vectors, plan
from autopeft.studies.recipes.recipe import Recipe

SCRIPT_FILE = "train.py"
#: The reader of `datasets` by file suffix.
FILE_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SPLITS = ("train", "validation", "test")

_OPENING = Template('''\
"""Train the recipe in `recipe.yaml` beside this file: $what.

Written by autopeft $version. Needs $needs.
Random numbers and the order of the rows differ from the study, so results are close to its results but not equal.
$scores

    python train.py [--output FOLDER] [--max-steps N]
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import $datasets_names
from peft import $config, get_peft_model
${metrics_import}from transformers import (
    $transformers_names,
)

MODEL = $model
REVISION = $revision
DTYPE = $dtype
MAX_LENGTH = $max_length
PEFT = $peft
TRAINING = $training
# Arguments of datasets.load_dataset.
DATA = $data
MAX_TRAIN_ROWS = $max_train_rows
COLUMNS = $columns
$own_settings

def build_peft_config():
    return $config(**PEFT)


def without_dropout(model):
    """Turn off the backbone's dropout, as in the study; the adapters' own dropout is added later."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def load_rows(split):
    rows = load_dataset(**DATA[split])
    if split == "train" and MAX_TRAIN_ROWS is not None:
        rows = rows.select(range(min(MAX_TRAIN_ROWS, len(rows))))
    return rows


def load_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(MODEL, revision=REVISION)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer

''')

_CLASSIFICATION = Template("""
def load_model(tokenizer):
    model, info = AutoModelForSequenceClassification.from_pretrained(
        MODEL,
        revision=REVISION,
        dtype=DTYPE,
        ignore_mismatched_sizes=True,
        num_labels=len(LABELS),
        problem_type=PROBLEM_TYPE,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        output_loading_info=True,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    # Modules that the checkpoint lacks, such as BERT's pooler, are random: frozen, as in the study, but saved.
    config = build_peft_config()
    heads = tuple(f"{head}." for head in config.modules_to_save)
    new = {key.rpartition(".")[0] for key in info["missing_keys"] if not key.startswith(heads)}
    config.modules_to_save = [*config.modules_to_save, *sorted(new)]
    model = get_peft_model(without_dropout(model), config)
    for name in new:
        model.get_submodule(f"base_model.model.{name}").requires_grad_(False)
    return model


def encode(rows, tokenizer):
    names = [COLUMNS[name] for name in ("text", "text_pair") if COLUMNS[name] is not None]
$encode
    def encode_row(row):
        tokens = tokenizer(*[row[name] for name in names], truncation=True, max_length=MAX_LENGTH)
        return {**tokens, "labels": target(row)}

    return rows.map(encode_row, remove_columns=rows.column_names)


def scores(evaluated):
    targets, predictions = $predictions
    return {
$metrics
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="output")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop early, to try the script")
    options = parser.parse_args()
    tokenizer = load_tokenizer()
    tokenizer.padding_side = "right"
    trainer = Trainer(
        model=load_model(tokenizer),
        args=TrainingArguments(output_dir=options.output, max_steps=options.max_steps, **TRAINING),
        train_dataset=encode(load_rows("train"), tokenizer),
        eval_dataset=encode(load_rows("validation"), tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scores,
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model(options.output)
    trainer.model.config.save_pretrained(options.output)  # with the labels and the padding token


if __name__ == "__main__":
    main()
""")
#: By the problem type of the task, how the script makes a target of a row, and targets and predictions of what it
#: evaluated.
_TARGETS = {
    "single_label_classification": (
        """    feature = rows.features[COLUMNS["label"]]
    name = feature.int2str if isinstance(feature, ClassLabel) else str

    def target(row):
        return LABELS.index(name(row[COLUMNS["label"]]))
""",
        "evaluated.label_ids, evaluated.predictions.argmax(-1)",
    ),
    "multi_label_classification": (
        """    feature = rows.features[COLUMNS["labels"]].feature
    name = feature.int2str if isinstance(feature, ClassLabel) else str

    def target(row):
        own = {name(label) for label in row[COLUMNS["labels"]]}
        return [float(label in own) for label in LABELS]
""",
        "evaluated.label_ids.astype(int), (evaluated.predictions > 0).astype(int)",
    ),
}

_CAUSAL = '''
def load_model():
    model = AutoModelForCausalLM.from_pretrained(MODEL, revision=REVISION, dtype=DTYPE)
    return get_peft_model(without_dropout(model), build_peft_config())


def prepare(rows):
    """Rename columns for TRL. The loss is on the completion; in a chat, on the last message."""

    def prepare_row(row):
        if "messages" in row:
            return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        if COLUMNS["prompt"] in row:
            return {"prompt": row[COLUMNS["prompt"]], "completion": row[COLUMNS["completion"]]}
        return {"text": row[COLUMNS["text"]]}

    return rows.map(prepare_row, remove_columns=rows.column_names)


def main():
    from trl import SFTConfig, SFTTrainer

    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="output")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop early, to try the script")
    options = parser.parse_args()
    # TRL averages the loss over all tokens, the study over the tokens of each row and then over rows.
    trainer = SFTTrainer(
        model=load_model(),
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.max_steps,
            max_length=MAX_LENGTH,
            packing=False,
            **TRAINING,
        ),
        train_dataset=prepare(load_rows("train")),
        eval_dataset=prepare(load_rows("validation")),
        processing_class=load_tokenizer(),
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
'''


class _Code(str):
    """A value that is an expression in the script."""

    def __repr__(self) -> str:
        return str(self)


class TrlScript(Exporter):
    """A script to train the recipe with the trainer that its task names."""

    name = "trl-script"
    summary = "train.py with peft and TRL's SFTTrainer (classification: transformers' Trainer)"
    needs_state = False

    @override
    def assess(self, recipe: Recipe) -> Assessment:
        if recipe.task_class.trainer is None:
            return unsupported(f"task {recipe.task}: neither TRL's SFTTrainer nor transformers' Trainer trains it")
        fit = plan(recipe).fit
        if fit.level == "unsupported":
            return fit
        lost = [*fit.lost, *decayed_vectors(recipe)]
        if recipe.data.max_train_rows is not None:
            lost.append(
                f"data max_train_rows: the first {recipe.data.max_train_rows} rows instead of the study's random subset"
            )
        return approximate(*lost)

    @override
    def write(self, recipe: Recipe, state: State, folder: Path) -> None:
        (folder / SCRIPT_FILE).write_text(script(recipe), encoding="utf-8")


def script(recipe: Recipe) -> str:
    """Return the text of the script for a recipe that `TrlScript.assess` accepts."""
    trainer = recipe.task_class.trainer
    assert trainer is not None
    opening, body = _SCRIPTS[trainer](recipe)
    peft = plan(recipe)
    common = {
        "what": in_docstring(f"{', '.join(recipe.adapters.kinds)} on {recipe.backbone.id}"),
        "version": metadata.version("autopeft"),
        "config": peft.config,
        "model": model_expression(recipe.backbone.id),
        "revision": repr(recipe.backbone.revision),
        "dtype": repr(recipe.backbone.dtype),
        "max_length": recipe.data.max_length,
        "peft": _literal(peft.arguments),
        "data": _literal({split: _rows(recipe, split) for split in _SPLITS}),
        "max_train_rows": recipe.data.max_train_rows,
    }
    return _OPENING.substitute(**common, **opening) + body


def _sft(recipe: Recipe) -> tuple[dict[str, str], str]:
    """Fields of the opening, and the rest of a script with TRL's SFTTrainer."""
    opening = {
        "scores": "It prints the loss and the accuracy of tokens as TRL counts them, over the tokens of all rows.",
        "needs": "peft, transformers>=5, datasets, accelerate, trl",
        "metrics_import": "",
        "datasets_names": "load_dataset",
        "transformers_names": "AutoModelForCausalLM,\n    AutoTokenizer",
        # TRL turns mixed precision on by itself.
        "training": _literal(_training(recipe) | {"bf16": False, "fp16": False}),
        "columns": _columns(recipe, "text", "prompt", "completion"),
        "own_settings": "",
    }
    return opening, _CAUSAL


def _trainer(recipe: Recipe) -> tuple[dict[str, str], str]:
    """Fields of the opening, and the rest of a script with transformers' Trainer."""
    names = ("AutoModelForSequenceClassification", "AutoTokenizer", "DataCollatorWithPadding", "Trainer")
    problem_type = recipe.task_class.problem_type
    assert problem_type is not None
    reported = dict.fromkeys([*(metric.name for metric in ALWAYS), *recipe.measured])
    expressions = {name: QUALITIES[name].expression for name in reported if name in QUALITIES}
    computed = {name: expression for name, expression in expressions.items() if expression}
    own = [f"{name} ({metric.function})" for name, metric in recipe.metrics.items()]
    missing = f" It does not compute the study's own {', '.join(own)}." if own else ""
    opening = {
        "scores": in_docstring(f"It prints the loss and {', '.join(computed)}.{missing}"),
        "needs": "peft, transformers>=5, datasets, accelerate, scikit-learn",
        "metrics_import": "from sklearn import metrics\n",
        "datasets_names": "ClassLabel, load_dataset",
        "transformers_names": ",\n    ".join((*names, "TrainingArguments")),
        "training": _literal(_training(recipe)),
        "columns": _columns(recipe, "text", "text_pair", "label", "labels"),
        "own_settings": f"LABELS = {_literal(list(recipe.labels or ()))}\nPROBLEM_TYPE = {problem_type!r}\n",
    }
    encode, predictions = _TARGETS[problem_type]
    lines = [f"        {name!r}: float(metrics.{expression})," for name, expression in computed.items()]
    return opening, _CLASSIFICATION.substitute(encode=encode, predictions=predictions, metrics="\n".join(lines))


_SCRIPTS: dict[str, Callable[[Recipe], tuple[dict[str, str], str]]] = {"SFTTrainer": _sft, "Trainer": _trainer}


def _columns(recipe: Recipe, *names: str) -> str:
    return _literal({name: getattr(recipe.data, name) for name in names})


def _literal(value: Any) -> str:
    return pformat(value, width=100, sort_dicts=False)


def in_docstring(text: str) -> str:
    """Return the source of a text of one line between triple double quotes: the text of a recipe may be anything."""
    return repr(text)[1:-1].replace('"', '\\"')


def model_expression(model_id: str) -> str:
    """Return the Python expression of a model's folder or hub id. Raises ModelError for a missing folder."""
    from autopeft.evaluators.backbones import EMBEDDED, EMBEDDED_PACKAGE, resolve

    if model_id == EMBEDDED:
        return f'str(Path(find_spec("{EMBEDDED_PACKAGE}").origin).parent / "model")'
    return repr(resolve(model_id))


def _training(recipe: Recipe) -> dict[str, Any]:
    training = recipe.training
    return {
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": training.batch_size,
        "warmup_steps": training.warmup,
        "lr_scheduler_type": "constant_with_warmup" if training.schedule == "constant" else training.schedule,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch",
        "seed": recipe.seed,
        "save_strategy": "no",
        "report_to": "none",
    }


def _rows(recipe: Recipe, split: str) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for one split."""
    from autopeft.evaluators.rows import EMBEDDED_IN

    data = recipe.data
    if data.source in EMBEDDED_IN:
        folder = f'Path(find_spec("{EMBEDDED_IN[data.source]}").origin).parent'
        return {"path": "json", "data_files": _Code(f'str({folder} / "{split}.jsonl")'), "split": "train"}
    name = getattr(data, split)
    if data.source == "files":
        path = data.path(split)
        return {"path": FILE_READERS[path.suffix.lower()], "data_files": str(path), "split": "train"}
    return {"path": data.source, "revision": data.revision, "split": name or split}
