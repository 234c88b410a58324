"""The contract of exporters: they report losses in advance, and leave a complete folder or none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

from autopeft.evaluators.atomic import atomic_folder
from autopeft.search_space.adapters.head import Head
from autopeft.studies.errors import UserError
from autopeft.studies.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, "Tensor"]
RECIPE_FILE = "recipe.yaml"
#: Prefix for the weights of a fully trained backbone, whose names come from the model and not from the recipe.
_BACKBONE_PREFIX = "backbone/full/"


class ExportError(UserError):
    """An export that was refused or failed; nothing was written."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """How well a format can hold a recipe. `lost`: a line for each loss, with the site and the reason.

    "approximate": the same network, up to rounding and to the routers of mixtures, but not all training settings.
    `remarks`: lines for the user about the files that `export` wrote.
    """

    level: Literal["exact", "approximate", "unsupported"]
    lost: tuple[str, ...] = ()
    remarks: tuple[str, ...] = field(default=(), compare=False)


EXACT = Assessment("exact")


def unsupported(*reasons: str) -> Assessment:
    """Return the assessment of a recipe that the format cannot hold."""
    return Assessment("unsupported", reasons)


def approximate(*reasons: str) -> Assessment:
    """Return "approximate" with these losses, or "exact" without any."""
    return Assessment("approximate", reasons) if reasons else EXACT


class Exporter(ABC):
    """One format. `assess` reads the recipe alone; `write` fills an empty folder."""

    name: ClassVar[str]
    #: One line for `--help` and the tables of the documentation.
    summary: ClassVar[str]
    #: Whether the format has trained weights; without them it is a training configuration.
    needs_state: ClassVar[bool] = True

    @abstractmethod
    def assess(self, recipe: Recipe) -> Assessment:
        """Return how well the format can hold this recipe, with every loss."""

    @abstractmethod
    def write(self, recipe: Recipe, state: State, folder: Path) -> Sequence[str] | None:
        """Write the files of a recipe that the format supports; return lines about them for the user, if any."""

    def export(
        self,
        recipe: Recipe,
        state: State | None,
        folder: str | Path,
        *,
        allow_lossy: bool = False,
        force: bool = False,
        beside: Mapping[str, str] = MappingProxyType({}),
    ) -> Assessment:
        """Write the export, with the recipe beside it, to `folder`: completely or not at all.

        `force` replaces an earlier export, and no other folder. `beside`: further text files by name. Raises
        ExportError: the format cannot hold the recipe, weights are missing or of another recipe, `folder` is in use, or
        it cannot be written.
        """
        fit = self.assess(recipe)
        if fit.level == "unsupported":
            raise ExportError(_refusal(f"{self.name} does not support this recipe:", fit))
        if fit.level == "approximate" and not allow_lossy:
            raise ExportError(
                _refusal(f"{self.name} would lose part of this recipe (--allow-lossy exports the rest):", fit)
            )
        if self.needs_state:
            _check_state(recipe, state)
        from autopeft.evaluators.errors import DataError, ModelError

        folder = Path(folder)
        try:
            check_folder(folder, force)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as temporary:
                remarks = self.write(recipe, state or {}, temporary)
                recipe.save(temporary / RECIPE_FILE)
                for name, text in beside.items():
                    (temporary / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ExportError(f"{folder}: cannot be written: {error.strerror or error}") from error
        except (ModelError, DataError) as error:
            raise ExportError(f"{folder}: not written: {error}") from error
        return replace(fit, remarks=tuple(remarks or ()))


def _refusal(opening: str, fit: Assessment) -> str:
    return "\n  ".join((opening, *fit.lost))


def check_folder(folder: Path, force: bool) -> None:
    """Raise ExportError if `folder` is a file, or is not empty and holds no earlier export that `force` may replace."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"{folder}: is a file, not a folder")
    if not any(folder.iterdir()):
        return
    if not (folder / RECIPE_FILE).is_file():
        raise ExportError(f"{folder}: is not empty and has no earlier export to replace: choose another folder")
    if not force:
        raise ExportError(f"{folder}: holds an earlier export (--force replaces it)")


def _check_state(recipe: Recipe, state: State | None) -> None:
    if state is None:
        raise ExportError("the recipe has no trained weights: train it first (`autopeft train`)")
    shapes: dict[str, tuple[int, ...] | None] = {}
    seen: Counter[str] = Counter()
    for name, spec in (*recipe.adapters, *((site.name, Head()) for site in recipe.head_sites)):
        site = recipe.sites[name]
        if site.role == "backbone":
            continue
        key = f"{name}/{spec.kind}"
        seen[key] += 1
        number = f"#{seen[key]}" if seen[key] > 1 else ""
        # The attachment decides the order of several adapters of one type at a site.
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
            problems.append(f"{name}: is not a tensor of this recipe")
        elif shapes[name] not in (None, tuple(tensor.shape)):
            problems.append(f"{name}: has shape {tuple(tensor.shape)}, expected {shapes[name]}")
    if problems:
        raise ExportError("\n  ".join(("the weights do not belong to this recipe:", *problems)))
