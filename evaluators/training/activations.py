"""Outputs of the layers below the lowest adapter, cached across epochs, trials and studies.

Notation: N examples of T tokens, D features, `depth` layers below the lowest adapter of a pack.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autopeft.evaluators import contents
from autopeft.evaluators.atomic import atomic_write
from autopeft.search_space.architecture import digest
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.backbones.quantized import state_tensors

logger = logging.getLogger(__name__)


class Activations:
    """Outputs of the lower layers for all examples of a split: [1 + all tokens, D]; the first row is the padding."""

    def __init__(self, rows: Tensor, lengths: Sequence[int]) -> None:
        self.rows = rows
        self._lengths = torch.tensor(lengths)
        self._starts = 1 + torch.cumsum(self._lengths, 0) - self._lengths

    @classmethod
    def of(cls, hidden: Tensor, lengths: Sequence[int]) -> Activations:
        """Return the activations of all examples of a split from their outputs `hidden` [N, T, D]."""
        activations = cls(hidden.new_zeros(1 + sum(lengths), hidden.shape[-1]), lengths)
        activations.fill(range(len(lengths)), hidden)
        return activations

    def batch(self, examples: Sequence[int]) -> Tensor:
        """Return the outputs of these examples [N, T, D], padded with zeros."""
        return self.rows[self._index(examples)]

    def fill(self, examples: Sequence[int], hidden: Tensor) -> None:
        """Store the outputs `hidden` [N, T, D] of these examples, without the padding."""
        index = self._index(examples)
        self.rows[index[index > 0]] = hidden[index > 0]

    def _index(self, examples: Sequence[int]) -> Tensor:
        """Return the rows of the examples' tokens: [N, T], 0 in the padding."""
        chosen = torch.tensor(examples)
        lengths = self._lengths[chosen][:, None]
        positions = torch.arange(int(lengths.max()))[None, :]
        index = torch.where(positions < lengths, self._starts[chosen][:, None] + positions, 0)
        return index.to(self.rows.device)


class ActivationCache:
    """Activations by key: the most recently used ones in memory, and all of them as files if there is a `folder`.

    `max_bytes` limits the memory, `max_disk_bytes` the folder. If a file cannot be read or written, its tensor is
    computed again.
    """

    def __init__(self, max_bytes: int, folder: Path | None = None, max_disk_bytes: int = 10**10) -> None:
        self.max_bytes = max_bytes
        self.folder = folder
        self.max_disk_bytes = max_disk_bytes
        self._in_memory: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str, compute: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Return the tensor of `key`, from memory, disk or `compute`."""
        if key in self._in_memory:
            self._in_memory.move_to_end(key)
            return self._in_memory[key]
        found = self._read(key, device)
        if found is None:
            found = compute()
            self._write(key, found)
        self._in_memory[key] = found
        while sum(tensor.nbytes for tensor in self._in_memory.values()) > self.max_bytes and len(self._in_memory) > 1:
            self._in_memory.popitem(last=False)
        return found

    def _read(self, key: str, device: torch.device) -> Tensor | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            found = load_file(path, device=str(device))["rows"]
            path.touch()  # the least recently used files are deleted first
            return found
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning("cannot read the cached activations %s, computing them again: %s", path, error)
            return None

    def _write(self, key: str, tensor: Tensor) -> None:
        path = self._path(key)
        if path is None or tensor.nbytes > self.max_disk_bytes:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(path.parent, tensor.nbytes)
            with atomic_write(path) as temporary:
                save_file({"rows": tensor}, temporary)
        except (OSError, SafetensorError) as error:
            logger.warning("cannot write the cached activations %s: %s", path, error)

    def _make_room(self, folder: Path, nbytes: int) -> None:
        files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        taken = sum(path.stat().st_size for path in files)
        for path in files:
            if taken + nbytes <= self.max_disk_bytes:
                return
            taken -= path.stat().st_size
            path.unlink()

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.safetensors"


def fingerprint(model: nn.Module, backbone: Backbone) -> str:
    """Compute a key of the frozen weights, the configuration, the device type and the versions of the libraries.

    A name and a revision would not suffice, because the weights in a local folder can change.
    """
    hashed = hashlib.sha256()
    tensors: Iterable[tuple[str, Tensor]] = (
        *model.named_parameters(),
        *model.named_buffers(),
        *state_tensors(model).items(),
    )
    for name, tensor in tensors:
        if name.startswith(tuple(f"{head}." for head in backbone.head_modules)):
            continue
        contents.update(hashed, [(name, tensor)])
    config: Any = model.config
    device = next(model.parameters()).device.type
    words = [config.to_json_string(), str(config._attn_implementation), device]
    return digest([hashed.hexdigest(), type(model).__name__, *words, torch.__version__, transformers.__version__])


def token_digest(examples: Sequence[Mapping[str, Any]]) -> str:
    """Compute a key of encoded examples; their tokens reflect the data, the tokenizer and the length limit."""
    hashed = hashlib.sha256()
    for example in examples:
        hashed.update(torch.tensor(example["input_ids"], dtype=torch.int64).numpy().data)
        hashed.update(b"|")
        if "token_type_ids" in example:
            hashed.update(torch.tensor(example["token_type_ids"], dtype=torch.int64).numpy().data)
            hashed.update(b"||")
    return hashed.hexdigest()
