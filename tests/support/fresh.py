"""Readers of exports in a fresh process under another seed: peft, transformers, rules of servers, READMEs, scripts.

Run as a program, this file answers requests, one JSON object a line: a process starts slowly, so one reads many
exports. It imports autopeft for `native` alone, which has a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from math import sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

#: Of the fresh process; no test draws weights with it.
SEED = 20_011
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
READERS: dict[str, Callable[..., Any]] = {}


class FreshProcess:
    """A process that reads exports. Raises AssertionError with its traceback if a reader fails."""

    def __init__(self) -> None:
        # -P: this folder must not be on the path, where its modules would hide others.
        command = [sys.executable, "-P", __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def read(self, reader: str, **request: Any) -> Any:
        """Return the answer of a function of `READERS`; paths become texts."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"reader": reader, **request}, default=str), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "the fresh process has ended"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()  # its regular end takes seconds
        self.process.wait()


def serve() -> None:
    """Answer requests until the input ends."""
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.manual_seed(SEED)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": READERS[request.pop("reader")](**request)}
        except BaseException:  # SystemExit of a script too
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def reader(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a reader under the name of its function."""
    READERS[function.__name__] = function
    return function


def _plain(folder: str, task: str, labels: int) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    assert not _has_autopeft(), "these readers know nothing of autopeft"
    if task == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels).eval()


def _has_autopeft() -> bool:
    return any(name.split(".")[0] == "autopeft" for name in sys.modules)


def _logits(model: Any, ids: list[list[int]]) -> list[Any]:
    import torch

    inputs = torch.tensor(ids)
    with torch.no_grad():
        found: list[Any] = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits.tolist()
    return found


@reader
def merged(folder: str, task: str, labels: int, ids: list[list[int]]) -> list[Any]:
    """Return the logits of a plain model."""
    return _logits(_plain(folder, task, labels), ids)


@reader
def peft(folder: str, base: str, task: str, labels: int, ids: list[list[int]]) -> dict[str, Any]:
    """Return the logits, and the number of parameters that training goes on with."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(_plain(base, task, labels), folder, is_trainable=True).eval()
    return {"logits": _logits(model, ids), "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}


@reader
def server(folder: str, base: str, task: str, labels: int, ids: list[list[int]], rule: str) -> list[Any]:
    """Return the logits of a server that knows one alpha and ignores all patterns: vllm, sglang or llama.cpp."""
    import torch
    from safetensors.torch import load_file
    from transformers.pytorch_utils import Conv1D

    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in load_file(Path(folder) / "adapter_model.safetensors").items()
    }
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert config["r"] <= max(VLLM_RANKS)
    if rule == "sglang":
        _check_stacks(tensors)
    model = _plain(base, task, labels)
    model.load_state_dict({key: tensor for key, tensor in tensors.items() if ".lora_" not in key}, strict=False)
    with torch.no_grad():
        for key in (key for key in tensors if key.endswith(".lora_A.weight")):
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            rank = b.shape[1] if rule == "llama.cpp" else config["r"]
            if rule != "llama.cpp":
                assert len(a) == rank, "the buffers have one rank"
            root = rule == "vllm" and config["use_rslora"]
            update = config["lora_alpha"] / (sqrt(rank) if root else rank) * (b @ a)
            module = model.get_submodule(key.removesuffix(".lora_A.weight"))
            module.weight += update.T if isinstance(module, Conv1D) else update
    return _logits(model, ids)


def _check_stacks(tensors: dict[str, Any]) -> None:
    """Raise AssertionError for a layer that SGLang cannot stack into qkv_proj and gate_up_proj."""
    layers: dict[str, set[str]] = {}
    for key in tensors:
        if found := re.search(r"layers\.(\d+)\..*?(\w+_proj)\.lora_A", key):
            layers.setdefault(found[1], set()).add(found[2])
    for layer, names in layers.items():
        if names & {"q_proj", "k_proj", "v_proj"}:
            assert names >= {"q_proj", "v_proj"}, f"layer {layer}: {names}"
        assert "up_proj" not in names or "gate_proj" in names, f"layer {layer}: {names}"


@reader
def native(folder: str, ids: list[list[int]], domain: int | None = None) -> dict[str, Any]:
    """Return the logits, and the names of the attachment's tensors."""
    import torch

    from autopeft.studies.exporters.native import load

    model, attachment = load(folder)
    with attachment:
        if domain is not None:
            attachment.routers.tokens.domains = torch.full((len(ids),), domain)
        return {"logits": _logits(model, ids), "names": sorted(attachment.state())}


@reader
def readme(folder: str, texts: list[list[str]] | None = None, ids: list[list[int]] | None = None) -> list[Any]:
    """Run the code of the export's README.md; return the logits of a padded batch of texts or pairs, or of tokens."""
    import torch

    code = (Path(folder) / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    with chdir(folder), torch.no_grad():
        exec(compile(code, "README.md", "exec"), names)
    assert not _has_autopeft()
    if ids is not None:
        return _logits(names["model"], ids)
    columns = [list(column) for column in zip(*(texts or ()), strict=True)]
    with torch.no_grad():
        batch = names["tokenizer"](*columns, padding=True, return_tensors="pt")
        found: list[Any] = names["model"](**batch).logits.tolist()
    return found


def _instead_of_trl() -> ModuleType:
    """Return a module with the trainer that TRL's is made of, for rows that are prepared."""
    from transformers import Trainer, TrainingArguments

    def config(*, max_length: None, packing: bool, dataset_kwargs: dict[str, bool], **settings: Any) -> Any:
        assert (max_length, packing, dataset_kwargs) == (None, False, {"skip_prepare_dataset": True})
        return TrainingArguments(**settings)

    module: Any = ModuleType("trl")
    module.SFTConfig, module.SFTTrainer = config, Trainer
    return module  # type: ignore[no-any-return]


@reader
def script(folder: str, output: str, steps: int) -> str:
    """Run train.py for a few steps; return what it prints. Without TRL, transformers' Trainer takes its place."""
    printed, argv = StringIO(), sys.argv
    if "trl" not in sys.modules and find_spec("trl") is None:
        sys.modules["trl"] = _instead_of_trl()
    sys.argv = ["train.py", "--output", output, "--max-steps", str(steps)]
    try:
        with redirect_stdout(printed):
            runpy.run_path(str(Path(folder) / "train.py"), run_name="__main__")
    finally:
        sys.argv = argv
    assert not _has_autopeft()
    return printed.getvalue()


if __name__ == "__main__":
    serve()
