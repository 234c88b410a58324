"""A tiny language model with data and a study file: an adapter search that takes minutes on a CPU.

    python -m autopeft.studies.examples.tiny_llama FOLDER
    autopeft run FOLDER/study.yaml

The model is a Llama of 4 layers, pretrained to continue letters that go up or down the alphabet by 1, 2 or 3
("next: c e g" -> " i k m o"). The data has steps of 4 to 6, which the pretraining data lacks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from string import ascii_lowercase

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from autopeft.evaluators.atomic import atomic_write_text, disk_errors

KNOWN_STEPS = (1, 2, 3)
NEW_STEPS = (4, 5, 6)
SHOWN = (2, 3, 4, 5)
CONTINUED = 4
SPLIT_SIZES = {"train": 0.7, "validation": 0.15, "test": 0.15}
BATCH_SIZE = 64

STUDY = """\
# Which adapters teach a tiny Llama to take larger steps through the alphabet? Written by autopeft's examples.
#   autopeft run study.yaml

study: tiny-llama
task: causal-lm

model:
  id: model

data:
  source: files
  train: train.jsonl
  validation: validation.jsonl
  test: test.jsonl
  max_length: 16

space:
  adapters:
    attention:
      kind: lora
      at: [attn.q, attn.v]
      rank: [0, 1, 2, 4, 8]
      alpha: 16
      vary: {rank: stage}
    mlp:
      kind: lora
      at: [mlp.up, mlp.down]
      rank: [0, 1, 2, 4, 8]
      alpha: 16
      vary: {rank: stage}
  stages: 2

training:
  learning_rate: {low: 1.0e-3, high: 3.0e-2, log: true}
  epochs: 15
  batch_size: 32

objectives: [accuracy, num_params]

search:
  trials: 20

baselines:
  names: [lora-r8-qv, full]
  learning_rates: [3.0e-3, 1.0e-2]
  full_learning_rates: [1.0e-3, 3.0e-3]

finalists:
  seeds: 2
  most: 3
"""

Row = dict[str, str]


def rows(steps: Iterable[int]) -> list[Row]:
    """Return every sequence with these steps, up and down, from every letter; a follows z."""
    found = []
    for step in (sign * size for size in steps for sign in (1, -1)):
        for start in range(26):
            for shown in SHOWN:
                letters = [ascii_lowercase[(start + i * step) % 26] for i in range(shown + CONTINUED)]
                prompt, completion = " ".join(letters[:shown]), " ".join(letters[shown:])
                found.append({"prompt": f"next: {prompt}", "completion": f" {completion}"})
    return found


def splits(seed: int = 0) -> dict[str, list[Row]]:
    """Split the shuffled sequences with new steps; no prompt is in two splits."""
    found = rows(NEW_STEPS)
    Random(seed).shuffle(found)
    train, validation = (round(len(found) * SPLIT_SIZES[split]) for split in ("train", "validation"))
    return {
        "train": found[:train],
        "validation": found[train : train + validation],
        "test": found[train + validation :],
    }


def tokenizer() -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with a token for every letter after a space."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["prompt"] + row["completion"] for row in rows(KNOWN_STEPS + NEW_STEPS)]
    own.train_from_iterator(texts, trainer)
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def pretrained(words: PreTrainedTokenizerBase, num_steps: int, seed: int = 0) -> LlamaForCausalLM:
    """Train a Llama on the known steps."""
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    texts = [row["prompt"] + row["completion"] for row in rows(KNOWN_STEPS)]
    batch = words([text + words.eos_token for text in texts], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    order = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / num_steps)
        chosen = torch.randint(len(ids), (BATCH_SIZE,), generator=order)
        model(input_ids=ids[chosen], attention_mask=mask[chosen], labels=labels[chosen]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def write(folder: Path, num_steps: int = 600) -> None:
    """Write model, rows and study file. Raises FileExistsError if there is a study file already."""
    if (folder / "study.yaml").exists():
        raise FileExistsError(f"{folder}: already has a study.yaml")
    words = tokenizer()
    model = pretrained(words, num_steps)
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    for split, found in splits().items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        atomic_write_text(folder / f"{split}.jsonl", text)
    atomic_write_text(folder / "study.yaml", STUDY)  # last: without it all is written again


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m autopeft.studies.examples.tiny_llama",
        description="Write a tiny language model, its data and a study file.",
    )
    parser.add_argument("folder", type=Path, help="folder to write them to")
    folder = parser.parse_args(arguments).folder
    transformers_logging.disable_progress_bar()
    try:
        with disk_errors(folder):
            write(folder)
    except OSError as error:
        parser.error(str(error))
    print(f"{folder}: wrote model, data and study.yaml; now: autopeft run {folder / 'study.yaml'}")


if __name__ == "__main__":
    main()
