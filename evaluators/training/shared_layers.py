"""The layers below the lowest adapter: run once for all slots, and cached across epochs, trials and studies.

Notation: N examples of T tokens, D features, `depth` layers below the lowest adapter of a pack. Their outputs depend on
no adapter and need no gradient. The layers are in evaluation mode, so an example has the same output in every epoch.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from posixpath import commonpath
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autopeft.evaluators.atomic import atomic_write
from autopeft.evaluators.attachment.hooks import ForwardReplacement
from autopeft.search_space.architecture import digest
from autopeft.search_space.backbones.backbone import Backbone

logger = logging.getLogger(__name__)


def layer_paths(backbone: Backbone) -> list[str]:
    """Return the module paths of the layers: the common parts of the paths of their sites."""
    paths = []
    for layer in range(backbone.num_layers):
        inside = [site.module.replace(".", "/") for site in backbone.sites if site.layer == layer]
        paths.append(commonpath(inside).replace("/", "."))
    return paths


class Reached(Exception):  # noqa: N818 - control flow
    """Stops a forward pass after a layer. `output`: the return value of that layer."""

    def __init__(self, output: Any) -> None:
        self.output = output


class LowerLayers:
    """The lower layers of a model."""

    def __init__(self, model: nn.Module, backbone: Backbone) -> None:
        self.model = model
        self.layers = [model.get_submodule(path) for path in layer_paths(backbone)]

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], depth: int) -> Tensor:
        """Compute the output [N, T, D] of the lowest `depth` layers, at least 1."""

        def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            raise Reached(output)

        handle = self.layers[depth - 1].register_forward_hook(stop)
        try:
            self.model(**inputs)
        except Reached as reached:
            return reached.output if isinstance(reached.output, Tensor) else reached.output[0]
        finally:
            handle.remove()
        raise AssertionError("the forward pass did not reach its own layers")

    @contextmanager
    def replaced(self, hidden: Tensor, depth: int) -> Iterator[None]:
        """Make the lowest `depth` layers return `hidden` [B, T, D] and compute nothing."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return hidden

        replacements = [ForwardReplacement(layer, forward) for layer in self.layers[:depth]]
        try:
            yield
        finally:
            for replacement in replacements:
                replacement.remove()


class Activations:
    """Outputs of the lower layers for all examples of a split: [1 + all tokens, D]; the first row is the padding."""

    def __init__(self, rows: Tensor, lengths: Sequence[int]) -> None:
        self.rows = rows
        self._lengths = torch.tensor(lengths)
        self._starts = 1 + torch.cumsum(self._lengths, 0) - self._lengths

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
    tensors: Iterable[tuple[str, Tensor]] = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in tensors:
        if name.startswith(tuple(f"{head}." for head in backbone.head_modules)):
            continue
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
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
