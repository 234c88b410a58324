"""The data set `returns`: what a function returns, from its docstring, over the packages that are installed.

Texts are the first words of docstrings, labels the kinds of annotated return types. The rows depend on the versions
of the packages, so results name their digest. Built without random numbers: order and split follow hashes.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from autopeft.evaluators.data.topics.build import TopicRow, clean, distinct, rank, words

#: Packages with many annotated functions, each with at most `MAX_PER_PACKAGE` rows per label.
PACKAGES = (
    "botorch", "datasets", "huggingface_hub", "mlflow", "optuna", "pandas", "peft", "pydantic", "rich", "sqlalchemy",
    "torch", "transformers", "typer", "werkzeug",
)  # fmt: skip
#: Kinds of return types by the first name of the annotation.
KINDS = {
    "nothing": "None NoReturn",
    "truth value": "bool",
    "text": "str bytes Path",
    "number": "int float complex Number",
    "collection": "list tuple set frozenset dict List Tuple Set Dict Sequence Mapping Iterator Iterable Generator",
    "array": "Tensor ndarray DataFrame Series Index",
    "itself": "Self",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
MAX_PER_PACKAGE, MAX_PER_LABEL, LEAST_WORDS = 80, 500, 5
SPLITS = (("train", 0.5), ("validation", 0.25), ("test", 0.25))


def build(site_packages: Path) -> dict[str, list[TopicRow]]:
    """Return the rows of each split from the sources of installed packages; packages that are missing are left out."""
    rows: list[TopicRow] = []
    for package in PACKAGES:
        counts: Counter[str] = Counter()
        for row in sorted(set(_documented(site_packages / package)), key=rank):
            if counts[row.label] < MAX_PER_PACKAGE and len(words(row.text)) >= LEAST_WORDS:
                counts[row.label] += 1
                rows.append(row)
    rows.sort(key=rank)
    kept = sorted(distinct(rows, MAX_PER_LABEL), key=rank)
    splits, start = {}, 0
    for name, share in SPLITS:
        end = start + round(share * len(kept))
        splits[name] = kept[start:end]
        start = end
    return splits


def _documented(folder: Path) -> Iterator[TopicRow]:
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests", "testing"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.returns is not None and not node.name.startswith("__"):
                kind = _kind(node.returns)
                docstring = ast.get_docstring(node)
                if kind is not None and docstring:
                    # The section on the result would give the answer away.
                    text = clean(re.split(r"\n\s*(?:Returns?|Yields?|:returns?)\b", docstring)[0])
                    yield TopicRow(" ".join(text.split()[:40]), kind)


def _kind(annotation: ast.expr) -> str | None:
    """Return the kind of an annotation, None for one of no kind: a union, or any other class."""
    if isinstance(annotation, ast.Constant):
        if annotation.value is None:
            return "nothing"
        try:
            annotation = ast.parse(str(annotation.value), mode="eval").body
        except SyntaxError:
            return None
    if isinstance(annotation, ast.Subscript):
        annotation = annotation.value
    name = annotation.attr if isinstance(annotation, ast.Attribute) else getattr(annotation, "id", "")
    return KIND_OF.get(name)
