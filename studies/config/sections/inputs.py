"""The sections about what a study reads: its task, model and data."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
)

from autopeft.search_space.spelling import did_you_mean
from autopeft.studies.config.sections.base import (
    Count,
    GrowingSection,
)


def _known_task(name: str) -> str:
    from autopeft.evaluators.tasks import TASKS

    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{did_you_mean(name, TASKS)}")
    return name


#: A registered task.
TaskName = Annotated[str, AfterValidator(_known_task)]


class ModelSettings(GrowingSection):
    """The frozen transformer."""

    later: ClassVar = {"quantization": (None,)}

    id: str = Field(
        default="embedded",
        min_length=1,
        description="embedded (a small English encoder), embedded-llm (SmolLM2-135M-Instruct), a folder, a GGUF file,"
        " or a hub id",
    )
    revision: str | None = Field(default=None, description="commit or tag on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="type of its weights")
    modules: dict[str, str] | None = Field(
        default=None, description="paths of its modules by role, for a model family that is not recognised"
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        default=None,
        description="store its linear layers in 4 or 8 bits (needs bitsandbytes); null: as in the checkpoint",
    )


class DataSettings(GrowingSection):
    """Rows for training, selection and test. Only finalists are scored on the test rows."""

    later: ClassVar = {
        "domain": (None,),
        "text_pair": (None,),
        "labels": (None,),
        "messages": ("messages",),
        "system": (None,),
        "train_on_turns": (None, "last"),
        "tests": (None,),
        "max_eval_rows": (None,),
    }

    source: str = Field(
        default="embedded",
        min_length=1,
        description="embedded (topics of docstrings), embedded-domains (four kinds of text with a question each),"
        " embedded-functions (chats about functions, for causal-lm), files, or the id of a hub dataset",
    )
    revision: str | None = Field(default=None, description="commit or tag on the hub")
    train: str | None = Field(default=None, description="file (.jsonl, .json, .csv, .parquet) or, on the hub, split")
    validation: str | None = Field(default=None, description="the same, for rows on which candidates are compared")
    test: str | None = Field(default=None, description="the same, for the final front")
    text: str = Field(default="text", description="column of the text")
    text_pair: str | None = Field(
        default=None,
        min_length=1,
        description="column of a second text that is read together with the first, for pairs; null: none",
    )
    label: str = Field(default="label", description="column of the class")
    labels: str | None = Field(
        default=None,
        min_length=1,
        description="column of a list with any number of classes, in place of label; null: each row has one class",
    )
    domain: str | None = Field(
        default=None,
        min_length=1,
        description="column with the data set or task of a row; null: none, except that embedded-domains has its own",
    )
    prompt: str = Field(default="prompt", description="column of the prompt (causal-lm)")
    completion: str = Field(default="completion", description="column of the text to learn (causal-lm)")
    messages: str = Field(
        default="messages", min_length=1, description="column of a conversation, OpenAI's or ShareGPT's (causal-lm)"
    )
    system: str | None = Field(
        default=None,
        min_length=1,
        description="column of a system prompt (causal-lm); null: system, in the rows of ShareGPT and Alpaca",
    )
    train_on_turns: Literal["all", "last"] | None = Field(
        default=None, description="turns of the assistant that are learnt: all or the last (causal-lm); null: all"
    )
    tests: str | None = Field(
        default=None,
        min_length=1,
        description="column of Python that tests the program of a row, for pass-at-1 (causal-lm); null: none",
    )
    max_length: Count = Field(default=64, description="largest number of tokens per row; longer rows are cut")
    max_train_rows: int | None = Field(
        default=None,
        ge=1,
        description="size of a fixed random training subset with every label and domain; null: all rows",
    )
    max_eval_rows: int | None = Field(
        default=None,
        ge=2,
        description="the same of the validation rows, and of the test rows: generated texts are dear; null: all rows",
    )
