"""The file map of CONTRIBUTING.md, from the first lines of docstrings: `make file-map` writes it, a test checks it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- written by tests/support/file_map.py -->", "<!-- end of the file map -->"
#: Folders of modules, from the command line down.
FOLDERS = ("autopeft", "testing", "benchmarks", "studies", "searchers", "evaluators", "search_space", "kernels")


def file_map() -> str:
    """A table for each folder that has modules: file, and what its docstring says in its first sentence."""
    parts = []
    for top in FOLDERS:
        for folder in sorted({path.parent for path in (ROOT / top).rglob("*.py")}):
            lines = [
                f"| `{path.name}` | {_sentence(path)} |"
                for path in sorted(folder.glob("*.py"))
                if path.name != "__init__.py"
            ]
            start = folder / "__init__.py"
            head = f"**`{folder.relative_to(ROOT)}/`** {_sentence(start) if start.exists() else ''}".rstrip()
            parts.append("\n".join([head, *(["", "| | |", "|---|---|", *lines] if lines else [])]))
    return "\n\n".join(parts)


def with_map(page: str) -> str:
    """The page with the map between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{file_map()}\n\n{END}{after}"


def _sentence(path: Path) -> str:
    """The first paragraph of a module's docstring, up to its first full stop, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(with_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
