"""Files for those who use an export without autopeft: the tokenizer, and a README.md with code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from autopeft.studies.recipes.recipe import Recipe

README_FILE = "README.md"
# Texts of the recipe are only in string literals of the code. peft adds its own entries to the metadata.
_README = Template("""\
---
library_name: $library
---

# $title

Written by autopeft; `recipe.yaml` has the configuration and its origin. Run this code in this folder to load the model
and its $processor, which prepares inputs as in the training:

```python
$imports

FOLDER = "."
$model
$variable = $auto_processor.from_pretrained(FOLDER)
```
$remarks""")
_NO_FORGETTING = "Forgetting is not measured there: `autopeft train` and `verify` measure it from recipe.yaml"
_ROWS = (
    "train.jsonl and validation.jsonl have the rows of the study, read from its data at the export: whoever gets this"
    " folder gets these rows"
)


def save_processor(recipe: Recipe, folder: Path) -> None:
    """Save the processor of the model's inputs (a tokenizer for texts) as the training used it. Raises ModelError."""
    from autopeft.evaluators.backbones import load_processor

    origin = recipe.backbone
    load_processor(origin.id, recipe.task, origin.revision).save_pretrained(folder)


def write_model_readme(recipe: Recipe, folder: Path) -> None:
    """Write the README.md of a plain transformers model."""
    auto_class = recipe.task_class.auto_class
    model = f"model = {auto_class}.from_pretrained(FOLDER).eval()"
    _write(recipe, folder, "transformers", "Model with merged adapters", [], [auto_class], model)


def write_adapter_readme(
    recipe: Recipe,
    folder: Path,
    *,
    model_options: Sequence[str] = (),
    adapter_options: Sequence[str] = (),
    remarks: Sequence[str] = (),
) -> None:
    """Write the README.md of an adapter in peft's format.

    The options are further arguments, as code, of the `from_pretrained` of the model and of peft. `remarks`: lines
    about serving the adapter.
    """
    from autopeft.evaluators.backbones import EMBEDDED
    from autopeft.evaluators.gguf import EMBEDDED_LLM, EMBEDDED_LLM_PACKAGE, file_of

    origin, auto_class = recipe.backbone, recipe.task_class.auto_class
    imports, names = ["from peft import PeftModel"], [auto_class]
    if origin.id in (EMBEDDED, EMBEDDED_LLM):
        imports = ["from importlib.util import find_spec", "from pathlib import Path", "", *imports]
    quantization = quantization_expression(recipe)
    # The file itself, if transformers takes it: the copy that was trained is a cache of this machine.
    file = None if quantization else file_of(origin.id)
    if file is None:
        model_of = [model_expression(origin.id)]
    else:
        package = f'str(Path(find_spec("{EMBEDDED_LLM_PACKAGE}").origin).parent)'
        model_of = [package if origin.id == EMBEDDED_LLM else repr(str(file.parent)), f"gguf_file={file.name!r}"]
    options = [*model_of, f"revision={origin.revision!r}", f"dtype={origin.dtype!r}", *model_options]
    if recipe.task_class.has_labels:
        # The checkpoint's own configuration may have other labels and, for many decoders, no padding token.
        names.insert(0, "AutoConfig")
        options += ["config=AutoConfig.from_pretrained(FOLDER)", "ignore_mismatched_sizes=True"]
    if quantization:
        names.append("BitsAndBytesConfig")
        options.append(f"quantization_config={quantization}")
    arguments = "".join(f"    {option},\n" for option in options)
    adapter = ", ".join(("model", "FOLDER", *adapter_options))
    model = f"model = {auto_class}.from_pretrained(\n{arguments})\nmodel = PeftModel.from_pretrained({adapter}).eval()"
    _write(recipe, folder, "peft", "Adapter for peft", imports, names, model, remarks)


def _write(
    recipe: Recipe,
    folder: Path,
    library: str,
    title: str,
    imports: list[str],
    names: list[str],
    model: str,
    remarks: Sequence[str] = (),
) -> None:
    task = recipe.task_class
    names = [*names, task.auto_processor]
    page = _README.substitute(
        library=library,
        title=title,
        processor=task.processor_name,
        imports="\n".join([*imports, f"from transformers import {', '.join(names)}"]),
        model=model,
        variable=task.processor_name.replace(" ", "_"),
        auto_processor=task.auto_processor,
        remarks="".join(["\n## Serving\n\n" * bool(remarks), *(f"- {line}\n" for line in remarks)]),
    )
    (folder / README_FILE).write_text(page, encoding="utf-8")


def write_training_readme(recipe: Recipe, folder: Path, command: str) -> list[str]:
    """Write the README.md of an export that trains by `command`; return its remarks: on the rows, and what it lacks."""
    remarks = [_ROWS] if recipe.forgetting is None else [_ROWS, _NO_FORGETTING]
    text = "# Training\n\nWritten by autopeft; `recipe.yaml` has the configuration and its origin. In this folder:\n"
    page = f"{text}\n```\n{command}\n```\n" + "".join(f"\n{remark}.\n" for remark in remarks)
    (folder / README_FILE).write_text(page, encoding="utf-8")
    return remarks


def quantization_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of the BitsAndBytesConfig with which the backbone loads; empty if it loads as it is.

    Raises ModelError for a missing model.
    """
    from autopeft.evaluators.backbones import raw_config, skeleton
    from autopeft.evaluators.quantization import outer_linears, settings_of

    origin = recipe.backbone
    if origin.quantization is None or raw_config(origin.id, origin.revision).get("quantization_config"):
        return {}
    model = skeleton(origin.id, origin.revision, recipe.task, recipe.labels)
    return settings_of(origin.quantization, origin.dtype, outer_linears(model))


def quantization_expression(recipe: Recipe) -> str:
    """Return the Python expression of that BitsAndBytesConfig; "" without one. Raises ModelError."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in quantization_settings(recipe).items())
    return f"BitsAndBytesConfig({arguments})" if arguments else ""


def model_expression(model_id: str) -> str:
    """Return the Python expression of a model's folder or hub id. Raises ModelError for a missing folder."""
    from autopeft.evaluators.backbones import EMBEDDED, EMBEDDED_PACKAGE, resolve

    if model_id == EMBEDDED:
        return f'str(Path(find_spec("{EMBEDDED_PACKAGE}").origin).parent / "model")'
    return repr(resolve(model_id))
