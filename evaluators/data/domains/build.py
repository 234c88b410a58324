"""Build the data set `domains`: four kinds of text from the Python standard library, each with its own question.

    python -m autopeft.evaluators.data.domains.build [FOLDER]

reads the library's `.py` files with `ast` (it imports none of them), drops duplicates, writes `train.jsonl`,
`validation.jsonl` and `test.jsonl` with rows `{"text": ..., "label": ..., "domain": ...}` and prints their counts. No
random number is drawn: selection, order and split follow hashes, so the same sources give the same files anywhere.
"""

import ast
import builtins
import hashlib
import platform
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from autopeft.evaluators.data.topics.build import (
    BUILT_WITH,
    FOREIGN_FOLDERS,
    LABELS,
    MAX_WORDS,
    clean,
    docstrings,
    near_duplicates,
    to_jsonl,
    words,
    write,
)

__all__ = ["BUILT_WITH", "DOMAINS", "build", "to_jsonl"]

SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}  # shares, as far as whole modules allow
MAX_ROWS = {"train": 1200, "validation": 320, "test": 320}  # per domain
MAX_PER_MODULE = 45  # per domain and label, or a few modules (turtle, argparse) would outweigh whole chapters
NAMES_PER_TEXT = 4

# The 16 topics of the data set `topics`, joined to 8: splits take whole modules, and small topics have too few.
CHAPTERS = {
    "data and numbers": ("data types", "numbers and mathematics"),
    "text and formats": ("text processing", "markup and file formats"),
    "files": ("files and directories", "archives and persistence"),
    "internet": ("email", "web", "internet protocols and sockets"),
    "concurrency": ("concurrency",),
    "graphical interfaces": ("graphical interfaces",),
    "the language": ("source code and bytecode", "classes and introspection"),
    "tools": ("testing and debugging", "packaging and importing", "logging and command line"),
}
CHAPTER_OF = {topic: chapter for chapter, topics in CHAPTERS.items() for topic in topics}
KINDS = ("attributes", "classes", "constants", "functions", "parameters")
EXCEPTIONS = ("TypeError", "ValueError", "another built-in exception")

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BUILT_IN = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}


class DomainRow(NamedTuple):
    """A text, its label and its domain, as the files have them."""

    text: str
    label: str
    domain: str


class UnselectedText(NamedTuple):
    """A text before the selection. `module`: the path of its file, the same on every system."""

    text: str
    label: str
    module: str


Reader = Callable[[bytes, str], Iterator[tuple[str, str]]]


# Readers: from a module's source and its chapter to texts and labels


def documentation(source: bytes, chapter: str) -> Iterator[tuple[str, str]]:
    """Yield docstrings and the chapter of their module."""
    for docstring in docstrings(source):
        yield clean(docstring), chapter


def code(source: bytes, chapter: str) -> Iterator[tuple[str, str]]:
    """Yield functions and methods without docstrings and comments, and the chapter of their module."""
    for node in scopes(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body:
                node.body = body
                yield " ".join(ast.unparse(node).split()[:MAX_WORDS]), chapter


def names(source: bytes, chapter: str) -> Iterator[tuple[str, str]]:
    """Yield a few neighbouring names of one kind in a module, as words, and their kind."""
    of_kind: defaultdict[str, list[str]] = defaultdict(list)
    for node in ast.walk(ast.parse(source)):
        for kind, name in named(node):
            if in_words(name) and name not in of_kind[kind]:
                of_kind[kind].append(name)
    for kind in KINDS:
        for start in range(0, len(of_kind[kind]), NAMES_PER_TEXT):
            yield ", ".join(map(in_words, of_kind[kind][start : start + NAMES_PER_TEXT])), kind


def errors(source: bytes, chapter: str) -> Iterator[tuple[str, str]]:
    """Yield messages of built-in exceptions that are raised, and the exception's class."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name = ast.unparse(node.exc.func)
            if name in BUILT_IN:
                label = name if name in EXCEPTIONS else EXCEPTIONS[-1]
                yield " ".join(message(node.exc.args[0]).split()[:MAX_WORDS]), label


#: The reader of each domain, and the smallest number of distinct words in its texts.
DOMAINS: dict[str, tuple[Reader, int]] = {
    "documentation": (documentation, 5),
    "code": (code, 8),
    "names": (names, 4),
    "errors": (errors, 3),
}


def scopes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a module and of its classes, without the contents of functions."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, FUNCTIONS):
            yield from scopes(child)


def named(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield pairs of kind and name that a node defines."""
    if isinstance(node, ast.ClassDef):
        yield "classes", node.name
    elif isinstance(node, FUNCTIONS):
        yield "functions", node.name
    elif isinstance(node, ast.arg) and node.arg not in ("self", "cls"):
        yield "parameters", node.arg
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield "attributes", node.attr
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and re.fullmatch(r"_?[A-Z][A-Z0-9_]+", node.id):
        yield "constants", node.id


def in_words(name: str) -> str:
    """Return "http server" for `_HTTPServer` and `http_server`: the form of a name must not reveal its kind."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return " ".join(parts).lower()


def message(node: ast.expr) -> str:
    """Return the text of an exception's first argument, with %s for inserted values."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "%s"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(message, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return message(node.left)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return message(node.left) + message(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return message(node.func.value)
    return "%s"


# Selection


def read(root: Path) -> dict[str, list[UnselectedText]]:
    """Return all texts below `root` by domain, from modules that have a topic, in the order of the sources."""
    found: dict[str, list[UnselectedText]] = {domain: [] for domain in DOMAINS}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        relative = path.relative_to(root)
        parts = relative.with_suffix("").parts
        topic = LABELS.get(parts[0])
        if topic is None or FOREIGN_FOLDERS.intersection(parts):
            continue
        source = path.read_bytes()
        for domain, (reader, fewest) in DOMAINS.items():
            texts = dict.fromkeys(reader(source, CHAPTER_OF[topic]))
            rows = (UnselectedText(text, label, relative.as_posix()) for text, label in texts)
            found[domain] += [row for row in rows if len(words(row.text)) >= fewest]
    return found


def select(rows: Iterable[UnselectedText]) -> list[UnselectedText]:
    """Select one of near duplicates, or none if their labels differ; MAX_PER_MODULE per module and label."""
    rows = sorted(rows, key=rank)
    num_selected: Counter[tuple[str, str]] = Counter()
    selected = []
    for group in near_duplicates([row.text for row in rows]):
        row = rows[group[0]]
        if len({rows[index].label for index in group}) == 1 and num_selected[row.module, row.label] < MAX_PER_MODULE:
            num_selected[row.module, row.label] += 1
            selected.append(row)
    return selected


def rank(row: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return a sorting key that shuffles: the hash of the text; the row itself decides between equal texts."""
    return hash_of(row[0]), row


def hash_of(text: str) -> str:
    """Return the SHA-256 hash of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_of_modules(found: dict[str, list[UnselectedText]]) -> dict[str, str]:
    """Assign every module to the split that still needs most rows of its chapter; the same for all domains."""
    size: Counter[str] = Counter()
    for rows in found.values():  # a domain with few rows counts as much as one with many
        for module, count in Counter(row.module for row in rows).items():
            size[module] += count * 1_000_000 // len(rows)
    taken: defaultdict[str, Counter[str]] = defaultdict(Counter)
    splits: dict[str, str] = {}
    # Large modules come first, so that small ones can balance the splits; ties are broken by hash.
    for module in sorted(size, key=lambda module: (-size[module], hash_of(module))):
        own = taken[CHAPTER_OF[LABELS[Path(module).with_suffix("").parts[0]]]]
        splits[module] = min(SPLITS, key=lambda name: (own[name] + size[module]) / SPLITS[name])
        own[splits[module]] += size[module]
    return splits


def build(library: Path) -> dict[str, list[DomainRow]]:
    """Return the rows of each split from the sources of a standard library."""
    found = {domain: select(rows) for domain, rows in read(library).items()}
    split_of = split_of_modules(found)
    splits: dict[str, list[DomainRow]] = {name: [] for name in SPLITS}
    for domain, rows in found.items():
        for split, most in MAX_ROWS.items():
            by_label: defaultdict[str, list[UnselectedText]] = defaultdict(list)
            for row in sorted(rows, key=rank):
                if split_of[row.module] == split:
                    by_label[row.label].append(row)
            # Each label has the same number of rows, so that a guess has the accuracy 1 / number of labels.
            count = min(most // len(by_label), *map(len, by_label.values()))
            splits[split] += [
                DomainRow(row.text, row.label, domain) for own in by_label.values() for row in own[:count]
            ]
    return {name: sorted(rows, key=rank) for name, rows in splits.items()}


def main(folder: Path) -> None:
    """Build the data set from this Python's library, write it and print the counts."""
    splits = build(Path(sysconfig.get_path("stdlib")))
    write(folder, splits)
    counts = {name: Counter((row.domain, row.label) for row in rows) for name, rows in splits.items()}
    print(f"Python {platform.python_version()}\n")
    print("| domain | label |", " | ".join(splits), "|\n|---|---|" + "---:|" * len(splits))
    for domain, label in sorted({key for count in counts.values() for key in count}):
        print(f"| {domain} | {label} |", " | ".join(str(count[domain, label]) for count in counts.values()), "|")
    print("| all | |", " | ".join(str(count.total()) for count in counts.values()), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
