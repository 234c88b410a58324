"""A training script to read and change: peft with TRL's SFTTrainer, or transformers' Trainer."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from pprint import pformat
from string import Template
from typing import Any

from typing_extensions import override

from autopeft.studies.exporters.base import Assessment, Exporter, State, approximate
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

    python train.py [--output FOLDER] [--max-steps N]
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import $datasets_names
from peft import $config, get_peft_model
from transformers import (
    $transformers_names,
)

MODEL = $model
REVISION = $revision
DTYPE = "$dtype"
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
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

''')

_CLASSIFICATION = """
def load_model(tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(
        MODEL,
        revision=REVISION,
        dtype=DTYPE,
        ignore_mismatched_sizes=True,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return get_peft_model(without_dropout(model), build_peft_config())


def encode(rows, tokenizer):
    feature = rows.features[COLUMNS["label"]]
    name = feature.int2str if isinstance(feature, ClassLabel) else str

    def encode_row(row):
        tokens = tokenizer(row[COLUMNS["text"]], truncation=True, max_length=MAX_LENGTH)
        return {**tokens, "labels": LABELS.index(name(row[COLUMNS["label"]]))}

    return rows.map(encode_row, remove_columns=rows.column_names)


def accuracy(predictions):
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="output")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop early, to try the script")
    options = parser.parse_args()
    tokenizer = load_tokenizer()
    trainer = Trainer(
        model=load_model(tokenizer),
        args=TrainingArguments(output_dir=options.output, max_steps=options.max_steps, **TRAINING),
        train_dataset=encode(load_rows("train"), tokenizer),
        eval_dataset=encode(load_rows("validation"), tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
"""

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
    """A training script; it has no trained weights."""

    name = "trl-script"
    summary = "train.py with peft and TRL's SFTTrainer (classification: transformers' Trainer)"
    needs_state = False

    @override
    def assess(self, recipe: Recipe) -> Assessment:
        fit = plan(recipe).fit
        if fit.level == "unsupported":
            return fit
        lost = [*fit.lost, *decayed_vectors(recipe)]
        if recipe.data.max_train_rows is not None:
            lost.append(f"data max_train_rows: the first {recipe.data.max_train_rows} rows, not the study's selection")
        return approximate(*lost)

    @override
    def write(self, recipe: Recipe, state: State, folder: Path) -> None:
        (folder / SCRIPT_FILE).write_text(script(recipe), encoding="utf-8")


def script(recipe: Recipe) -> str:
    """Return the text of the script for a recipe that `TrlScript.assess` accepts."""
    peft = plan(recipe)
    classification = recipe.task == "classification"
    names = ["AutoModelForCausalLM", "AutoTokenizer"]
    if classification:
        names = ["AutoModelForSequenceClassification", "AutoTokenizer", "DataCollatorWithPadding", "Trainer"]
        names.append("TrainingArguments")
    opening = _OPENING.substitute(
        what=f"{', '.join(recipe.adapters.kinds)} on {recipe.backbone.id}",
        version=metadata.version("autopeft"),
        needs="peft, transformers>=5, datasets, accelerate" + ("" if classification else ", trl"),
        datasets_names="ClassLabel, load_dataset" if classification else "load_dataset",
        transformers_names=",\n    ".join(names),
        config=peft.config,
        model=_model(recipe.backbone.id),
        revision=repr(recipe.backbone.revision),
        dtype=recipe.backbone.dtype,
        max_length=recipe.data.max_length,
        peft=_literal(peft.arguments),
        training=_literal(_training(recipe)),
        data=_literal({split: _rows(recipe, split) for split in _SPLITS}),
        max_train_rows=recipe.data.max_train_rows,
        columns=_literal({name: getattr(recipe.data, name) for name in ("text", "label", "prompt", "completion")}),
        own_settings=f"LABELS = {_literal(list(recipe.labels or ()))}\n" if classification else "",
    )
    return opening + (_CLASSIFICATION if classification else _CAUSAL)


def _literal(value: Any) -> str:
    return pformat(value, width=100, sort_dicts=False)


def _model(model_id: str) -> str:
    from autopeft.evaluators.backbones import EMBEDDED, EMBEDDED_PACKAGE, resolve

    if model_id == EMBEDDED:
        return f'str(Path(find_spec("{EMBEDDED_PACKAGE}").origin).parent / "model")'
    return repr(resolve(model_id))


def _training(recipe: Recipe) -> dict[str, Any]:
    training = recipe.training
    arguments = {
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
    # TRL turns on mixed precision by default.
    return arguments if recipe.task == "classification" else arguments | {"bf16": False, "fp16": False}


def _rows(recipe: Recipe, split: str) -> dict[str, Any]:
    """Return the arguments of `datasets.load_dataset` for one split."""
    from autopeft.evaluators.data.splits import EMBEDDED_IN

    data = recipe.data
    if data.source in EMBEDDED_IN:
        folder = f'Path(find_spec("{EMBEDDED_IN[data.source]}").origin).parent'
        return {"path": "json", "data_files": _Code(f'str({folder} / "{split}.jsonl")'), "split": "train"}
    name = getattr(data, split)
    if data.source == "files":
        path = data.path(split)
        return {"path": FILE_READERS[path.suffix], "data_files": str(path), "split": "train"}
    return {"path": data.source, "revision": data.revision, "split": name or split}
