"""Build the data set `prose`: paragraphs of English prose from the documentation of installed packages.

    python -m autopeft.evaluators.data.prose.build [FOLDER]

reads docstrings with `ast` and text files (it imports none of the packages), keeps paragraphs that are plain prose and
not about programs, drops near duplicates, writes `retained.jsonl` with rows `{"text": ...}` and prints their counts. No
random number is drawn: selection and order follow hashes, so the same versions give the same file anywhere.
"""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from autopeft.evaluators.data.topics.build import docstrings, near_duplicates, write

#: The packages whose documentation is read, by the name of the distribution, and the versions of the committed file.
BUILT_WITH = {"scikit-learn": "1.9.1", "scipy": "1.17.1", "networkx": "3.6.1", "nltk": "3.10.4", "sympy": "1.14.0"}
#: The folders of these packages that are read.
PACKAGES = {"scikit-learn": "sklearn", "scipy": "scipy", "networkx": "networkx", "nltk": "nltk", "sympy": "sympy"}
MAX_PER_PACKAGE = 50
MIN_WORDS, MAX_WORDS = 25, 60
#: A paragraph of letters, digits and usual punctuation alone, from a capital letter to a full stop.
PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,.;:'()-]*\.")
#: Names of code, calls, headings of fields, and single letters, which are symbols of formulas.
NO_PROSE = re.compile(
    r"[a-z][A-Z]|\(\)|\w\.\w|::|--|\b[b-zB-HJ-Z]\b|[A-Z]{2}.*[A-Z]{2}.*[A-Z]{2}|^(Notes?|See|Warning)\b"
)
#: The end of a sentence and the beginning of another one.
SENTENCES = re.compile(r"[a-z]\. [A-Z]")
#: Words of paragraphs about a program and not about its subject.
OF_PROGRAMS = frozenset(
    """
    api argument arguments array arrays attribute attributes boolean bool callable callback class classes code
    constructor default defaults deprecated dict dictionary dtype exception float function functions html
    implementation implementations implemented import index indices input inputs instance instances int integer
    interface iterable iterator keyword list lists method methods module modules object objects output outputs
    package parameter parameters parse parser python raise raised raises return returned returns routine routines
    script scipy scikit sklearn sparse str string strings subclass tuple tuples user users variable variables
    version wrapper true false none sympy networkx nltk numpy solver callers caller called you your
    """.split()  # noqa: SIM905
)


class ProseRow(NamedTuple):
    """A paragraph."""

    text: str


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text that are plain prose, with single spaces."""
    for block in re.split(r"\n\s*\n", text):
        found = " ".join(block.split())
        words = re.findall(r"[a-z]+", found.lower())
        plain = bool(PROSE.fullmatch(found) and SENTENCES.search(found)) and not NO_PROSE.search(found)
        # No list of terms: every sixth word at least is an article or the like.
        little = sum(word in {"a", "an", "the", "of", "in", "is", "are", "to", "and", "that"} for word in words)
        plain = plain and not OF_PROGRAMS.intersection(words) and little >= len(words) / 6
        if plain and MIN_WORDS <= len(words) <= MAX_WORDS:
            yield found


def read(folder: Path) -> Iterator[str]:
    """Yield the paragraphs of the docstrings and of the reStructuredText files below a folder, without tests."""
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).parts):
        if {"test", "tests", "testing", "externals"}.intersection(path.relative_to(folder).parts):
            continue
        if path.suffix == ".py":
            for docstring in docstrings(path.read_bytes()):
                yield from paragraphs(docstring)
        elif path.suffix == ".rst":
            yield from paragraphs(path.read_text(encoding="utf-8"))


def rank(text: str) -> tuple[str, str]:
    """Return a sorting key that shuffles."""
    return hashlib.sha256(text.encode()).hexdigest(), text


def build(folders: Mapping[str, Path]) -> dict[str, list[ProseRow]]:
    """Return the rows by package, from these folders: one of near duplicates, MAX_PER_PACKAGE of each package."""
    origin = {text: name for name, folder in folders.items() for text in read(folder)}
    texts = sorted(origin, key=rank)
    rows: dict[str, list[ProseRow]] = {name: [] for name in folders}
    for first in sorted(group[0] for group in near_duplicates(texts)):
        rows[origin[texts[first]]].append(ProseRow(texts[first]))
    return {name: found[:MAX_PER_PACKAGE] for name, found in rows.items()}


def shuffled(rows: Mapping[str, Iterable[ProseRow]]) -> list[ProseRow]:
    """Return the rows of all packages in the order of the file."""
    return sorted(chain.from_iterable(rows.values()), key=lambda row: rank(row.text))


def installed() -> dict[str, Path]:
    """Return the folders of the packages by the names of their distributions."""
    found = {}
    for name, package in PACKAGES.items():
        spec = find_spec(package)
        assert spec is not None, f"{name} is not installed"
        assert spec.origin is not None
        found[name] = Path(spec.origin).parent
    return found


def main(folder: Path) -> None:
    """Build the data set from the installed packages, write it and print the counts."""
    rows = build(installed())
    write(folder, {"retained": shuffled(rows)})
    for name, found in rows.items():
        print(f"| {name} {version(name)} | {len(found)} |")
    print(f"| all | {sum(map(len, rows.values()))} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
