"""Build the data set `topics`: docstrings of the Python standard library, labelled with their module's topic.

    python -m autopeft.evaluators.data.topics.build [FOLDER]

reads the library's `.py` files with `ast` (it imports none of them), cleans the docstrings, drops duplicates,
writes `train.jsonl`, `validation.jsonl` and `test.jsonl` with rows `{"text": ..., "label": ...}` and prints
their counts. No random number is drawn: selection, order and split follow a hash of the text, so the same
sources give the same files anywhere.
"""

import ast
import hashlib
import json
import math
import platform
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

BUILT_WITH = "3.11.7"  # the Python version of the committed files; docstrings differ between versions

MIN_WORDS, MAX_WORDS = 5, 60
NEAR_DUPLICATE = 0.8  # Jaccard index of the sets of words
MAX_PER_LABEL = 450  # without a limit, some packages (tkinter, distutils) would outweigh whole chapters
SPLITS = {"train": 0.64, "validation": 0.17, "test": 0.19}

# The chapters of the library reference, joined or cut to similar size. A name stands for its submodules too.
# Modules that belong to no single topic (`pydoc`, `uuid`, `__future__`) are left out.
TOPICS = {
    "text processing": """
        codecs difflib encodings fnmatch gettext locale re rlcompleter shlex string stringprep textwrap""",
    "numbers and mathematics": """
        _pydecimal colorsys fractions numbers random secrets statistics""",
    "data types": """
        _collections_abc _strptime bisect calendar collections datetime graphlib heapq pprint queue reprlib
        types weakref zoneinfo""",
    "files and directories": """
        _pyio filecmp fileinput genericpath glob io linecache ntpath nturl2path os pathlib posixpath shutil
        stat tempfile""",
    "archives and persistence": """
        _compression bz2 dbm gzip lzma pickle shelve sqlite3 tarfile zipapp zipfile""",
    "markup and file formats": """
        _markupbase configparser csv html json netrc plistlib tomllib xdrlib xml""",
    "email": """
        base64 email mailbox mailcap mimetypes quopri uu""",
    "web": """
        cgi cgitb http urllib webbrowser wsgiref xmlrpc""",
    "internet protocols and sockets": """
        asynchat asyncore ftplib imaplib ipaddress nntplib poplib selectors smtpd smtplib socket socketserver
        ssl telnetlib""",
    "concurrency": """
        _threading_local asyncio concurrent multiprocessing pty sched signal subprocess threading""",
    "graphical interfaces": """
        tkinter turtle turtledemo""",
    "testing and debugging": """
        bdb cProfile doctest pdb profile pstats timeit trace traceback tracemalloc unittest""",
    "packaging and importing": """
        distutils ensurepip imp importlib modulefinder pkgutil runpy site sysconfig venv zipimport""",
    "source code and bytecode": """
        ast codeop compileall dis keyword lib2to3 opcode pickletools py_compile pyclbr symtable tabnanny
        tokenize""",
    "classes and introspection": """
        _py_abc _weakrefset abc contextlib copy copyreg dataclasses enum functools inspect operator typing
        warnings""",
    "logging and command line": """
        argparse cmd code getopt getpass logging optparse""",
}
LABELS = {module: label for label, modules in TOPICS.items() for module in modules.split()}

FOREIGN_FOLDERS = {"test", "tests", "site-packages", "dist-packages"}
DOCUMENTABLE = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

SIGNATURE = re.compile(r"[\w.]+\(.*?\)(\s*->[^\n]*|\s*--?(?=\s)|\s*:|\s*$)", re.MULTILINE)
DOCTEST = re.compile(r"^[ \t]*>>>.*(\n[ \t]*\S.*)*", re.MULTILINE)  # a prompt and all up to a blank line
RULE = re.compile(r"([^\w\s])\1{2,}")  # underlines of headings


class TopicRow(NamedTuple):
    """A cleaned or raw docstring and the topic of its module."""

    text: str
    label: str


def documented(root: Path) -> Iterator[TopicRow]:
    """Yield every raw docstring below `root` whose module has a topic, in the order of the file names."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        label = LABELS.get(parts[0])
        if label is None or FOREIGN_FOLDERS.intersection(parts):
            continue
        yield from (TopicRow(docstring, label) for docstring in docstrings(path.read_bytes()))


def docstrings(source: bytes) -> Iterator[str]:
    """Yield the docstrings of a module and of every class and function in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTABLE) and (docstring := ast.get_docstring(node)):
            yield docstring


def clean(docstring: str) -> str:
    """Return the prose without leading signature, doctests and underlines, cut to MAX_WORDS words."""
    text = DOCTEST.sub(" ", docstring.strip())
    if signature := SIGNATURE.match(text):
        text = text[signature.end() :]
    return " ".join(RULE.sub(" ", text).split()[:MAX_WORDS])


def words(text: str) -> frozenset[str]:
    """Return the set of words by which texts are compared, without case, punctuation and digits."""
    return frozenset(re.findall(r"[^\W\d_]+", text.lower()))


def near_duplicates(texts: list[str]) -> list[list[int]]:
    """Group the indices of texts that are near duplicates of each other, directly or through a third."""
    sets = [words(text) for text in texts]
    frequency = Counter(word for members in sets for word in members)
    parent = list(range(len(texts)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    # Sets with this overlap share one of their few rarest words, so only these words are looked up.
    with_rare_word: defaultdict[str, list[int]] = defaultdict(list)
    for index, members in enumerate(sets):
        rarest_first = sorted(members, key=lambda word: (frequency[word], word))
        for word in rarest_first[: len(members) - math.ceil(NEAR_DUPLICATE * len(members)) + 1]:
            for other in with_rare_word[word]:
                if len(members & sets[other]) >= NEAR_DUPLICATE * len(members | sets[other]):
                    parent[root(index)] = root(other)
            with_rare_word[word].append(index)

    groups = defaultdict(list)
    for index in range(len(texts)):
        groups[root(index)].append(index)
    return list(groups.values())


def select(rows: Iterable[TopicRow]) -> list[TopicRow]:
    """Clean and select rows: one of near duplicates, or none if their labels differ; MAX_PER_LABEL per label."""
    rows = sorted({TopicRow(clean(row.text), row.label) for row in rows}, key=rank)
    return distinct([row for row in rows if len(words(row.text)) >= MIN_WORDS], MAX_PER_LABEL)


def distinct(rows: list[TopicRow], most_per_label: int) -> list[TopicRow]:
    """Return one of near duplicates, the first, or none if their labels differ; at most so many of a label."""
    num_selected: Counter[str] = Counter()
    selected = []
    for group in near_duplicates([row.text for row in rows]):
        row = rows[group[0]]
        if len({rows[index].label for index in group}) == 1 and num_selected[row.label] < most_per_label:
            num_selected[row.label] += 1
            selected.append(row)
    return selected


def rank(row: TopicRow) -> tuple[str, TopicRow]:
    """Return a sorting key that shuffles: the hash of the text; the row itself decides between equal texts."""
    return hashlib.sha256(row.text.encode()).hexdigest(), row


def split(rows: list[TopicRow]) -> dict[str, list[TopicRow]]:
    """Split the rows of every label by the shares in SPLITS; the rows must be shuffled."""
    by_label = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    splits: dict[str, list[TopicRow]] = {name: [] for name in SPLITS}
    for members in by_label.values():
        start, share = 0, 0.0
        for name, part in SPLITS.items():
            share += part
            end = round(share * len(members))
            splits[name] += members[start:end]
            start = end
    return {name: sorted(members, key=rank) for name, members in splits.items()}


def build(library: Path) -> dict[str, list[TopicRow]]:
    """Return the rows of each split from the sources of a standard library."""
    return split(select(documented(library)))


def to_jsonl(rows: Iterable[NamedTuple]) -> str:
    """Return rows as JSON, one per line."""
    return "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)


def write(folder: Path, splits: Mapping[str, Iterable[NamedTuple]]) -> None:
    """Write a JSONL file per split."""
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text(to_jsonl(rows), encoding="utf-8", newline="\n")


def main(folder: Path) -> None:
    """Build the data set from this Python's library, write it and print the counts."""
    splits = build(Path(sysconfig.get_path("stdlib")))
    write(folder, splits)
    counts = {name: Counter(row.label for row in rows) for name, rows in splits.items()}
    print(f"Python {platform.python_version()}\n")
    print("| label |", " | ".join(splits), "|\n|---|" + "---:|" * len(splits))
    for label in TOPICS:
        print(f"| {label} |", " | ".join(str(count[label]) for count in counts.values()), "|")
    print("| all |", " | ".join(str(count.total()) for count in counts.values()), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
