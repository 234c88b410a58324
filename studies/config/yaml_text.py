"""Reading of YAML that anybody may have written: what the parser is given has limits, and every failure has a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import StringIO
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, RoundTripConstructor, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import Node
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scanner import RoundTripScanner, Scanner, ScannerError

#: Limits of a study file, far above any that people write. README.md states them.
MOST_BYTES = 250_000
MOST_DEPTH = 50
#: Keys and values of a file; those behind an alias count wherever it stands.
MOST_VALUES = 10_000
#: Characters of one text, as many as a path may have.
MOST_CHARACTERS = 4096
#: Entries of one list or mapping.
MOST_ENTRIES = 1000
#: Whole numbers are those of 64 bits.
LARGEST = 2**63 - 1


class UnreadableError(ValueError):
    """A text that is not YAML, or not within the limits. `line`: counted from 1, None if unknown."""

    def __init__(self, line: int | None, problem: str) -> None:
        self.line = line
        super().__init__(problem)


def load(text: str, typ: Literal["rt", "safe"] = "rt", most_values: int = MOST_VALUES) -> Any:
    """Return the document in `text`. Raises UnreadableError.

    `typ`: "rt" keeps lines and comments, "safe" gives plain data.
    """
    yaml = YAML(typ=typ, pure=True)
    yaml.max_depth = MOST_DEPTH
    yaml.Scanner = _RoundTripScanner if typ == "rt" else _SafeScanner
    yaml.Composer = _Composer
    yaml.Constructor = _RoundTrip if typ == "rt" else _Safe
    yaml.composer.most_values = most_values
    try:
        return yaml.load(StringIO(text))
    except ReaderError as error:
        raise UnreadableError(_line(text, error.position), f"not valid YAML: {_first_line(str(error))}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = _first_line(error.problem or str(error))
        raise UnreadableError(None if mark is None else mark.line + 1, f"not valid YAML: {what}") from None
    # Each tag has a constructor of its own, and each of these exceptions of its own.
    except Exception as error:
        node = getattr(yaml.constructor, "last", None)
        line = None if node is None else node.start_mark.line + 1
        raise UnreadableError(line, f"not valid YAML: {_said(error)}") from None


def unfit(data: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield path and problem of each text and number of `data` that no setting can have."""
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), data)]
    while stack:
        path, value = stack.pop()
        if len(path) > MOST_DEPTH:
            yield path[:3], f"is nested deeper than {MOST_DEPTH}"
            return  # data of Python may contain itself
        if isinstance(value, (Mapping, list, tuple)) and len(value) > MOST_ENTRIES:
            yield path, f"has {len(value):,} entries; a list or mapping may have {MOST_ENTRIES:,}"
        elif isinstance(value, Mapping):
            for key in value:
                if problem := _unfit(key):
                    yield path, f"has a key that {problem}"
            stack += [((*path, key), entry) for key, entry in value.items() if not _unfit(key)]
        elif isinstance(value, (list, tuple)):
            stack += [((*path, position), entry) for position, entry in enumerate(value)]
        elif problem := _unfit(value):
            yield path, problem


def _unfit(value: Any) -> str | None:
    if isinstance(value, int) and abs(value) > LARGEST:
        return "is a number of more than 64 bits"
    if isinstance(value, str):
        if len(value) > MOST_CHARACTERS:
            return f"has {len(value):,} characters; a text may have {MOST_CHARACTERS:,}"
        if "\0" in value:
            return "has a NUL character (\\0)"
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            return "has an unpaired surrogate (\\ud800 to \\udfff)"
    return None


class _Shallow:
    """Limits brackets inside each other: of these, the scanner reads a thousand before the composer sees the first."""

    def fetch_flow_collection_start(self, TokenClass: Any, to_push: str) -> None:
        scanner: Any = self
        if len(scanner.flow_context) >= MOST_DEPTH:
            raise ScannerError(None, None, f"is nested deeper than {MOST_DEPTH}", scanner.reader.get_mark())
        super().fetch_flow_collection_start(TokenClass, to_push)  # type: ignore[misc]


class _RoundTripScanner(_Shallow, RoundTripScanner):
    pass


class _SafeScanner(_Shallow, Scanner):
    pass


class _Composer(Composer):
    """Counts values as they are composed, with those behind aliases, so that nothing larger is built of them."""

    most_values = MOST_VALUES

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False  # YAML allows them: the last one counts
        self.values = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        alias = isinstance(event, AliasEvent)
        if self.loader.max_depth and self.depth >= self.loader.max_depth and not alias:
            raise ComposerError(None, None, f"is nested deeper than {self.loader.max_depth}", event.start_mark)
        before = self.values
        node: Node = super().compose_node(parent, index)
        if not alias:
            self.values += 1
            self.sizes[id(node)] = self.values - before
        elif id(node) in self.sizes:
            self.values += self.sizes[id(node)]
        else:
            raise ComposerError(None, None, f"the alias *{event.anchor} is inside what it names", event.start_mark)
        if self.values > self.most_values:
            what = f"has more than {self.most_values:,} keys and values, those behind aliases included"
            raise ComposerError(None, None, what, event.start_mark)
        return node


class _Placed:
    """Keeps the node at work and adds its line to what goes wrong with a number, a date or a tag."""

    last: Node | None = None

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        self.last = node
        try:
            return super().construct_object(node, deep)  # type: ignore[misc]
        except YAMLError:
            raise
        except Exception as error:
            raise ConstructorError(None, None, _said(error, node), node.start_mark) from None


class _RoundTrip(_Placed, RoundTripConstructor):
    pass


class _Safe(_Placed, SafeConstructor):
    pass


def _said(error: Exception, node: Any = None) -> str:
    value = getattr(node, "value", None)
    if isinstance(value, str) and len(value) > MOST_CHARACTERS and isinstance(error, ValueError):
        return f"a number of {len(value):,} digits cannot be read: whole numbers have up to 64 bits"
    shown = f"{value[:20]}{'...' if len(value) > 20 else ''} " if isinstance(value, str) else "a value "
    return f"{shown}cannot be read: {_first_line(str(error)) or type(error).__name__}"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
