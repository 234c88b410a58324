"""What an exporter promises: to say beforehand what it loses, and to leave either a whole folder or none."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal
from uuid import uuid4

from autopeft.search_space.adapters.head import Head
from autopeft.studies.errors import UserError
from autopeft.studies.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, "Tensor"]
RECIPE_FILE = "recipe.yaml"
#: Of a backbone that was trained itself: the names that follow are the model's, which no recipe knows.
_BACKBONE_PREFIX = "backbone/full/"


class ExportError(UserError):
    """An export that was refused or that failed; nothing was written."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a format holds a recipe. `lost`: one line per thing that it loses, with the site and why.

    "approximate": the same network, up to rounding and to the routers of mixtures, but how it was trained is not wholly
    there.
    """

    level: Literal["exact", "approximate", "unsupported"]
    lost: tuple[str, ...] = ()


EXACT = Fit("exact")


def unsupported(*reasons: str) -> Fit:
    return Fit("unsupported", reasons)


def approximate(*reasons: str) -> Fit:
    """Exact if there are no reasons against it."""
    return Fit("approximate", reasons) if reasons else EXACT


class Exporter(ABC):
    """One format. `assess` looks at the recipe alone; `write` fills an empty folder."""

    name: ClassVar[str]
    #: One line for `--help` and the tables of the documentation.
    summary: ClassVar[str]
    #: Whether trained weights are written; without them the format only says how to train.
    needs_state: ClassVar[bool] = True

    @abstractmethod
    def assess(self, recipe: Recipe) -> Fit:
        """Whether the format holds this recipe, and every field that it loses."""

    @abstractmethod
    def write(self, recipe: Recipe, state: State, folder: Path) -> None:
        """Write the files. Only called for recipes that the format supports."""

    def export(
        self,
        recipe: Recipe,
        state: State | None,
        folder: str | Path,
        *,
        allow_lossy: bool = False,
        force: bool = False,
    ) -> Fit:
        """Write the export, and the recipe beside it, to `folder`; all of it or nothing.

        `force` replaces an earlier export, and nothing but an earlier export. Raises ExportError: the recipe
        does not fit, weights are missing or of another recipe, `folder` is in use, or it cannot be written.
        """
        fit = self.assess(recipe)
        if fit.level == "unsupported":
            raise ExportError(_refusal(f"{self.name} cannot hold this recipe:", fit))
        if fit.level == "approximate" and not allow_lossy:
            raise ExportError(_refusal(f"{self.name} would lose (--allow-lossy accepts that):", fit))
        if self.needs_state:
            _check_state(recipe, state)
        from autopeft.evaluators.errors import DataError, ModelError

        folder = Path(folder)
        try:
            _check_folder(folder, force)
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Beside the target, so that the last step is a rename within one file system.
            draft = folder.with_name(f".{folder.name}.{uuid4().hex}")
            draft.mkdir()
            try:
                self.write(recipe, state or {}, draft)
                recipe.save(draft / RECIPE_FILE)
                _replace(folder, draft)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        except OSError as error:
            raise ExportError(f"{folder}: cannot be written: {error.strerror or error}") from error
        except (ModelError, DataError) as error:
            raise ExportError(f"{folder}: not written: {error}") from error
        return fit


def _refusal(opening: str, fit: Fit) -> str:
    return "\n  ".join((opening, *fit.lost))


def _check_folder(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"{folder}: is a file, not a folder")
    if not any(folder.iterdir()):
        return
    if not (folder / RECIPE_FILE).is_file():
        raise ExportError(f"{folder}: is not empty, and not an earlier export either")
    if not force:
        raise ExportError(f"{folder}: holds an earlier export (--force replaces it)")


def _replace(folder: Path, draft: Path) -> None:
    """Put `draft` where `folder` is. The old folder is moved aside first and comes back if that fails."""
    if not folder.exists():
        draft.rename(folder)
        return
    aside = draft.with_name(f"{draft.name}.old")
    folder.rename(aside)
    try:
        draft.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _check_state(recipe: Recipe, state: State | None) -> None:
    if state is None:
        raise ExportError("there are no trained weights of this recipe: train it first (`autopeft train`)")
    shapes: dict[str, tuple[int, ...] | None] = {}
    seen: Counter[str] = Counter()
    for name, spec in (*recipe.adapters, *((site.name, Head()) for site in recipe.head_sites)):
        site = recipe.sites[name]
        if site.role == "backbone":
            continue
        key = f"{name}/{spec.kind}"
        seen[key] += 1
        number = f"#{seen[key]}" if seen[key] > 1 else ""
        # Of several adapters of a kind at one site, the attachment decides which one is the first.
        several = sum(other == (name, spec.kind) for other in ((s, a.kind) for s, a in recipe.adapters)) > 1
        for parameter, declared in spec.own_parameters(site).items():
            if not declared.stored:
                continue
            shapes[f"{key}{number}/{parameter}"] = None if several else declared.shape
    shapes |= {key.path: p.shape for key, p in recipe.adapters.shared(recipe.host).items() if p.stored}
    problems = [f"{name}: is missing" for name in shapes if name not in state]
    for name, tensor in state.items():
        if name.startswith(_BACKBONE_PREFIX):
            continue
        if name not in shapes:
            problems.append(f"{name}: the recipe has no such tensor")
        elif shapes[name] not in (None, tuple(tensor.shape)):
            problems.append(f"{name}: has shape {tuple(tensor.shape)}, not {shapes[name]}")
    if problems:
        raise ExportError("\n  ".join(("the weights do not belong to this recipe:", *problems)))
