"""A training script to read and change: peft with TRL's SFTTrainer, or transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from pprint import pformat
from string import Template
from typing import Any

from typing_extensions import override

from autopeft.search_space.adapters.lora import FROM_SITE
from autopeft.search_space.metrics import ALWAYS, LOSS
from autopeft.studies.exporters.base import Assessment, Exporter, State, approximate, unsupported
from autopeft.studies.exporters.loading import model_expression, quantization_expression, write_training_readme
from autopeft.studies.exporters.peft_config import decayed_vectors, flat_vectors, frozen_parts, plan, rate_factors
from autopeft.studies.exporters.rows import write_rows, write_token_rows
from autopeft.studies.recipes.recipe import Recipe

SCRIPT_FILE = "train.py"

_OPENING = Template('''\
"""Train the recipe in `recipe.yaml` beside this file: $what.

Written by autopeft $version. Needs $needs.
The rows in `train.jsonl` and `validation.jsonl` are those of the study, as it read them. Random numbers and the order
of the rows differ from the study, so results are close to its results but not equal.
$scores

    python train.py [--output FOLDER] [--max-steps N]
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import $config, get_peft_model
${metrics_import}from transformers import (
    $transformers_names,
)

MODEL = $model
REVISION = $revision
DTYPE = $dtype
PEFT = $peft
TRAINING = $training
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
    with (Path(__file__).parent / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def load_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(MODEL, revision=REVISION, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer

''')

_CLASSIFICATION = Template("""
def load_model(tokenizer):
    model, info = AutoModelForSequenceClassification.from_pretrained(
        MODEL,
        revision=REVISION,
        dtype=DTYPE,$quantization
        ignore_mismatched_sizes=True,
        num_labels=len(LABELS),
        problem_type=PROBLEM_TYPE,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        output_loading_info=True,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    # Modules that the checkpoint lacks, such as BERT's pooler, are random: they are trained and saved with the head.
    config = build_peft_config()
    saved = tuple(f"{name}." for name in config.modules_to_save)
    new = {key.rpartition(".")[0] for key in info["missing_keys"] if not key.startswith(saved)}
    config.modules_to_save = [*config.modules_to_save, *sorted(new)]
    return $adapted


def encode(rows, tokenizer):
    def encode_row(row):
        texts = [row[name] for name in ("text", "text_pair") if name in row]
        tokens = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH)
        return {**tokens, "labels": $target}

    return Dataset.from_list([encode_row(row) for row in rows])


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
    trainer = Trainer(
        $model,
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
#: By the problem type of the task: the target of a row, and targets and predictions of what the script evaluated.
_TARGETS = {
    "single_label_classification": (
        'LABELS.index(row["label"])',
        "evaluated.label_ids, evaluated.predictions.argmax(-1)",
    ),
    "multi_label_classification": (
        '[float(label in row["labels"]) for label in LABELS]',
        "evaluated.label_ids.astype(int), (evaluated.predictions > 0).astype(int)",
    ),
}

_CAUSAL = Template("""
def load_model():
    model = AutoModelForCausalLM.from_pretrained(MODEL, revision=REVISION, dtype=DTYPE$quantization)
    return $adapted


def main():
    from trl import SFTConfig, SFTTrainer

    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="output")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop early, to try the script")
    options = parser.parse_args()
    tokenizer = load_tokenizer()
    # The rows are token ids of this tokenizer, cut to $max_length: a long prompt at its beginning, where TRL would cut
    # the completion. The label -100 marks tokens without a loss. TRL averages the loss over all tokens, the study over
    # the tokens of each row and then over rows.
    trainer = SFTTrainer(
        $model,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.max_steps,
            max_length=None,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            **TRAINING,
        ),
        train_dataset=Dataset.from_list(load_rows("train")),
        eval_dataset=Dataset.from_list(load_rows("validation")),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
""")


_TAKEN = (
    "peft subtracts the initial values of init {init} from the model's weights, and again when it loads an adapter that"
    " the script saves; servers do not: convert it for them (`path_initial_model_for_weight_conversion` of peft), or"
    " export the adapter of a training here (`--to peft`)"
)
_FREEZE = Template("""
#: Parts of the names of parameters that are not trained.
FROZEN = $frozen


def without_training(model):
    for name, parameter in model.named_parameters():
        if any(part in name for part in FROZEN):
            parameter.requires_grad_(False)
    return model

""")
_RATES = Template('''
#: Factors of the learning rate, by parts of the names of parameters.
RATES = $rates


def optimizer_for(model):
    """Return AdamW with a learning rate for each factor, and without weight decay for vectors, as in the study."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = next((factor for part, factor in RATES.items() if part in name), 1.0)
            groups.setdefault((factor, $decays), []).append(parameter)
    rate, decay = TRAINING["learning_rate"], TRAINING["weight_decay"]
    return torch.optim.AdamW(
        [
            {"params": own, "lr": rate * factor, "weight_decay": decay * decays}
            for (factor, decays), own in groups.items()
        ]
    )

''')


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
        # Learning rates take parameter groups of their own, which leave vectors out.
        return approximate(*fit.lost, *(() if rate_factors(recipe) else decayed_vectors(recipe)))

    @override
    def write(self, recipe: Recipe, state: State, folder: Path) -> Sequence[str]:
        (folder / SCRIPT_FILE).write_text(script(recipe), encoding="utf-8")
        write = write_token_rows if recipe.task_class.trainer == "SFTTrainer" else write_rows
        write(recipe, folder)
        remarks = write_training_readme(recipe, folder, f"python {SCRIPT_FILE}")
        if (init := plan(recipe).arguments.get("init_lora_weights")) in FROM_SITE:
            return [*remarks, _TAKEN.format(init=init)]
        return remarks


def script(recipe: Recipe) -> str:
    """Return the text of the script for a recipe that `TrlScript.assess` accepts."""
    trainer = recipe.task_class.trainer
    assert trainer is not None
    opening, body = _SCRIPTS[trainer](recipe)
    peft = plan(recipe)
    quantization = quantization_expression(recipe)
    if quantization:
        opening["own_settings"] = f"QUANTIZATION = {quantization}\n{opening['own_settings']}"
        opening["transformers_names"] += ",\n    BitsAndBytesConfig"
        opening["needs"] += ", bitsandbytes"
    common = {
        "what": in_docstring(f"{', '.join(recipe.adapters.kinds)} on {recipe.backbone.id}"),
        "version": metadata.version("autopeft"),
        "config": peft.config,
        "model": model_expression(recipe.backbone.id),
        "revision": repr(recipe.backbone.revision),
        "dtype": repr(recipe.backbone.dtype),
        "peft": _literal(peft.arguments),
    }
    return _OPENING.substitute(**common, **opening) + _own_functions(recipe) + body


def _own_functions(recipe: Recipe) -> str:
    """Return the functions of the script for what no argument of a trainer says."""
    frozen, rates = frozen_parts(recipe), rate_factors(recipe)
    functions = _FREEZE.substitute(frozen=_literal(frozen)) if frozen else ""
    decays = " and ".join(["parameter.ndim > 1", *(f"{part!r} not in name" for part in flat_vectors(recipe))])
    return functions + (_RATES.substitute(rates=_literal(rates), decays=decays) if rates else "")


def _model(recipe: Recipe, load: str, config: str) -> dict[str, str]:
    """Return the fields of a script that make the adapted model, with `load`, and pass it to the trainer."""
    adapted = f"get_peft_model(without_dropout(model), {config})"
    return {
        "adapted": f"without_training({adapted})" if frozen_parts(recipe) else adapted,
        "model": f"model=(model := {load}),\n        optimizers=(optimizer_for(model), None)"
        if rate_factors(recipe)
        else f"model={load}",
    }


def _sft(recipe: Recipe) -> tuple[dict[str, str], str]:
    """Fields of the opening, and the rest of a script with TRL's SFTTrainer."""
    opening = {
        "scores": "It prints the loss and the accuracy of tokens as TRL counts them, over the tokens of all rows.",
        "needs": "peft, transformers>=5, datasets, accelerate, trl",
        "metrics_import": "",
        "transformers_names": "AutoModelForCausalLM,\n    AutoTokenizer,\n    DataCollatorForSeq2Seq",
        # TRL turns mixed precision on by itself.
        "training": _literal(_training(recipe) | {"bf16": False, "fp16": False}),
        "own_settings": "",
    }
    argument = ", quantization_config=QUANTIZATION" if quantization_expression(recipe) else ""
    fields = _model(recipe, "load_model()", "build_peft_config()")
    return opening, _CAUSAL.substitute(fields, max_length=recipe.data.max_length, quantization=argument)


def _trainer(recipe: Recipe) -> tuple[dict[str, str], str]:
    """Fields of the opening, and the rest of a script with transformers' Trainer."""
    names = ("AutoModelForSequenceClassification", "AutoTokenizer", "DataCollatorWithPadding", "Trainer")
    problem_type = recipe.task_class.problem_type
    assert problem_type is not None
    reported = dict.fromkeys([*(metric.name for metric in ALWAYS), *recipe.measured])
    found = [metric for metric in recipe.metrics_by_name().qualities(reported) if metric != LOSS]
    computed = {metric.name: metric.expression for metric in found if metric.expression}
    own = {name: f"the study's own {name} ({metric.place})" for name, metric in recipe.metrics.items()}
    others = {metric.name: metric.name for metric in found if not metric.expression}
    missing = f" It does not compute {', '.join((others | own).values())}." if others or own else ""
    opening = {
        "scores": in_docstring(f"It prints the loss and {', '.join(computed)}.{missing}"),
        "needs": "peft, transformers>=5, datasets, accelerate, scikit-learn",
        "metrics_import": "from sklearn import metrics\n",
        "transformers_names": ",\n    ".join((*names, "TrainingArguments")),
        "training": _literal(_training(recipe)),
        "own_settings": f"MAX_LENGTH = {recipe.data.max_length}\nLABELS = {_literal(list(recipe.labels or ()))}\n"
        f"PROBLEM_TYPE = {problem_type!r}\n",
    }
    target, predictions = _TARGETS[problem_type]
    lines = [f"        {name!r}: float(metrics.{expression})," for name, expression in computed.items()]
    fields = {"target": target, "predictions": predictions, "metrics": "\n".join(lines)}
    argument = "\n        quantization_config=QUANTIZATION," if quantization_expression(recipe) else ""
    fields |= _model(recipe, "load_model(tokenizer)", "config")
    return opening, _CLASSIFICATION.substitute(fields, quantization=argument)


_SCRIPTS: dict[str, Callable[[Recipe], tuple[dict[str, str], str]]] = {"SFTTrainer": _sft, "Trainer": _trainer}


def _literal(value: Any) -> str:
    return pformat(value, width=100, sort_dicts=False)


def in_docstring(text: str) -> str:
    """Return the source of a text of one line between triple double quotes: the text of a recipe may be anything."""
    return repr(text)[1:-1].replace('"', '\\"')


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
