"""Digests of what a study reads: rows, their encoding, weights. A path or a name is no identity: what is there changes.

The digests of equal contents are equal in all file formats and on all devices. They read tensors by the names, and
batches in the form, that the installed libraries give them, so an upgrade of these can change them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.search_space.architecture import canonical_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autopeft.evaluators.data.splits import Splits
    from autopeft.evaluators.tasks import Example, Task

#: Rows that are collated at a time.
CHUNK = 64


def of_rows(splits: Splits) -> dict[str, dict[str, Any]]:
    """Return by split the number of the canonical rows and the digest of the rows in their order.

    The documents of metrics have two more parts for each.
    """
    found = {}
    for split in splits.names:
        rows, hashed = getattr(splits, split), hashlib.sha256()
        for row in rows:
            hashed.update(canonical_json(row).encode() + b"\n")
        found[split] = {"rows": len(rows), "digest": hashed.hexdigest()}
    return found | dict(part for documents in splits.documents.values() for part in documents.digests())


def of_examples(task: Task, examples: Mapping[str, Sequence[Example]]) -> str:
    """Return a digest of the batches that the model and the loss read; they depend on rows and processor."""
    hashed = hashlib.sha256()
    for rows in examples.values():
        for start in range(0, len(rows), CHUNK):
            batch = task.collate(rows[start : start + CHUNK])
            update(hashed, sorted(batch.items()))
    return hashed.hexdigest()


def of_weights(model: nn.Module, but: Sequence[str] = ()) -> str:
    """Return a digest of the parameters and saved buffers. `but`: paths of modules that are left out."""
    hashed = hashlib.sha256()
    left_out = tuple(f"{path}." for path in but)
    read: set[tuple[int, ...]] = set()
    for name, tensor in model.state_dict().items():
        # A tensor with two names, such as tied embeddings, is read once.
        place = (tensor.data_ptr(), *tensor.shape, *tensor.stride())
        if name.startswith(left_out) or (tensor.numel() and place in read):
            continue
        read.add(place)
        update(hashed, [(name, tensor)])
    return hashed.hexdigest()


def of_folders(folders: Iterable[str | Path], names: Sequence[str]) -> list[str]:
    """Return a digest of the files of these names in each folder. Raises OSError."""
    found = []
    for folder in folders:
        hashed = hashlib.sha256()
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                hashed.update(hashlib.file_digest(file, "sha256").digest())
        found.append(hashed.hexdigest())
    return found


def update(hashed: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add names, shapes, types and bytes of tensors to a hash of hashlib."""
    import torch

    for name, tensor in tensors:
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
