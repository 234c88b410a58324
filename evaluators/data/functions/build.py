"""Build the data set `functions`: short chats about functions of the Python standard library, for language models.

    python -m autopeft.evaluators.data.functions.build [FOLDER]

reads the library's `.py` files with `ast` (it imports none of them), drops near duplicates, writes `train.jsonl`,
`validation.jsonl` and `test.jsonl` with rows `{"messages": [...]}` and prints their counts. No random number is drawn:
selection, order and split follow hashes, so the same sources give the same files anywhere.
"""

import ast
import hashlib
import platform
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from autopeft.evaluators.data.domains.build import FUNCTIONS, scopes
from autopeft.evaluators.data.topics.build import (
    BUILT_WITH,
    FOREIGN_FOLDERS,
    near_duplicates,
    to_jsonl,
    write,
)

__all__ = ["BUILT_WITH", "SPLITS", "build", "to_jsonl", "write"]

MAX_ROWS = {"train": 800, "validation": 160, "test": 160}
SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}  # shares of the rows, as far as whole modules allow
MAX_PER_MODULE = 20  # or a few modules (turtle, tkinter, _pydecimal) would outweigh all others
MAX_SOURCE = 170  # characters; a chat then has some 110 tokens
MIN_WORDS, MAX_WORDS = 3, 14  # of a docstring
SYSTEM = "You know Python."
ASKS_DOCSTRING = "Write a one-line docstring:"
ASKS_NAME = "Name the function:"


class ChatRow(NamedTuple):
    """A conversation whose last message is to be learnt."""

    messages: list[dict[str, str]]


class Function(NamedTuple):
    """A function or method with its one-line docstring. `source` is without docstring, comments and decorators.

    `module`: the path of its file, the same on every system.
    """

    name: str
    source: str
    docstring: str
    module: str


def functions(source: bytes, module: str) -> Iterator[Function]:
    """Yield the functions and methods of a module that are short enough and whose docstring has a suitable first line.

    Names with two leading underscores are left out: their docstrings hardly depend on the function.
    """
    for node in scopes(ast.parse(source)):
        if not isinstance(node, FUNCTIONS) or node.name.startswith("__") or len(node.body) < 2:
            continue
        docstring = (ast.get_docstring(node) or "").split("\n\n")[0]
        count = len(docstring.split())
        if "\n" in docstring or not docstring.endswith(".") or not MIN_WORDS <= count <= MAX_WORDS:
            continue
        node.body, node.decorator_list = node.body[1:], []
        code = ast.unparse(node)
        if len(code) <= MAX_SOURCE and docstring.isascii() and code.isascii() and ">>>" not in docstring:
            yield Function(node.name, code, docstring, module)


def read(root: Path) -> Iterator[Function]:
    """Yield the functions of all modules below `root`, in the order of the file names."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        relative = path.relative_to(root)
        if not (FOREIGN_FOLDERS | {"idle_test"}).intersection(relative.with_suffix("").parts):
            yield from functions(path.read_bytes(), relative.as_posix())


def rank(text: str) -> str:
    """Return a sorting key that shuffles."""
    return hashlib.sha256(text.encode()).hexdigest()


def select(found: Iterable[Function]) -> list[Function]:
    """Return one of functions whose docstring or source are near duplicates; at most MAX_PER_MODULE of a module."""
    members = sorted(set(found), key=lambda each: (rank(each.source), each))
    for field in ("docstring", "source"):
        groups = near_duplicates([str(getattr(each, field)) for each in members])
        members = [members[i] for i in sorted(group[0] for group in groups)]
    count: Counter[str] = Counter()
    selected = []
    for each in members:
        count[each.module] += 1
        if count[each.module] <= MAX_PER_MODULE:
            selected.append(each)
    return selected


def split(selected: Iterable[Function]) -> dict[str, list[Function]]:
    """Give whole modules to the split that lacks most of its share; the functions of a split are shuffled."""
    of_module: defaultdict[str, list[Function]] = defaultdict(list)
    for each in selected:
        of_module[each.module].append(each)
    found: dict[str, list[Function]] = {name: [] for name in SPLITS}
    for module in sorted(of_module, key=lambda module: (-len(of_module[module]), rank(module))):
        name = min(SPLITS, key=lambda name: len(found[name]) / SPLITS[name])
        found[name] += of_module[module]
    return {
        name: sorted(members, key=lambda each: (rank(each.source), each))[: MAX_ROWS[name]]
        for name, members in found.items()
    }


def chat(function: Function) -> ChatRow:
    """Return the conversation about a function; the hash of its source decides between the two questions."""
    if int(rank(function.source)[-1], 16) % 2:
        question, answer = f"{ASKS_DOCSTRING}\n{function.source}", function.docstring
    else:
        question, answer = f"{ASKS_NAME} {function.docstring}", function.name
    return ChatRow(
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    )


def build(library: Path) -> dict[str, list[ChatRow]]:
    """Return the rows of each split from the sources of a standard library."""
    return {name: [chat(each) for each in members] for name, members in split(select(read(library))).items()}


def asks_docstring(row: ChatRow) -> bool:
    """Return whether the conversation is about a function's docstring and not about its name."""
    return row.messages[1]["content"].startswith(ASKS_DOCSTRING)


def main(folder: Path) -> None:
    """Build the data set from this Python's library, write it and print the counts."""
    splits = build(Path(sysconfig.get_path("stdlib")))
    write(folder, splits)
    print(f"Python {platform.python_version()}\n")
    print("| answer |", " | ".join(splits), "|\n|---|" + "---:|" * len(splits))
    counts: dict[str, Counter[Any]] = {name: Counter(map(asks_docstring, rows)) for name, rows in splits.items()}
    for about, what in ((True, "docstring"), (False, "name")):
        print(f"| {what} |", " | ".join(str(count[about]) for count in counts.values()), "|")
    print("| all |", " | ".join(str(count.total()) for count in counts.values()), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
