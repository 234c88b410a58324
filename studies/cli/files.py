"""Commands around the study file: `init`, `validate`, `schema`."""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopeft.evaluators.atomic import atomic_write_text
from autopeft.search_space.spelling import did_you_mean
from autopeft.studies.cli.options import JsonOption, SetOption, StudyArgument, print_json
from autopeft.studies.cli.streams import echo
from autopeft.studies.errors import ConfigurationError

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits
    from autopeft.search_space.backbones.backbone import Backbone
    from autopeft.search_space.spaces.space import SearchSpace
    from autopeft.studies.config.study_file import StudyFile

PLACEHOLDER = "my-study"


FolderArgument = Annotated[Path, typer.Argument(help="Folder to create; its name becomes the name of the study.")]
PresetOption = Annotated[
    str,
    typer.Option(
        "--preset", help="Template: study (a first study of minutes) or autopeft (the search of Zhou et al. 2024)."
    ),
]


def init(folder: FolderArgument, preset: PresetOption = "study") -> None:
    """Write a commented study file that is ready to run."""
    templates = {Path(file.name).stem: file for file in (files("autopeft.studies.config") / "templates").iterdir()
                 if file.name.endswith(".yaml")}  # fmt: skip
    if preset not in templates:
        raise ConfigurationError(f"--preset {preset}: unknown preset{did_you_mean(preset, templates)}")
    name = folder.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigurationError(f"{name!r} is not a valid name for a study: use letters, digits, - and _")
    path = folder / "study.yaml"
    text = templates[preset].read_text(encoding="utf-8")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise FileExistsError
        atomic_write_text(path, text.replace(PLACEHOLDER, name))
    except FileExistsError:
        existing = path if path.exists() else folder
        raise ConfigurationError(f"{existing} already exists; nothing was written") from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from None
    echo(f"wrote {path}\nnext:  autopeft validate {path}\n       autopeft run {path}")


def schema() -> None:
    """Print the JSON schema of the study file, for editors."""
    from autopeft.studies.config.schema import json_schema

    print_json(json_schema())


def validate(study: StudyArgument, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Check a study file, its data and its model without loading weights or training."""
    from autopeft.studies.config.loading import load_study

    settings = load_study(study, set_ or ())
    splits, backbone, space = checked(settings)
    summary = _summary(settings, splits, backbone, space)
    if as_json:
        print_json(summary)
        return
    size = "continuous" if space.cardinality is None else f"{space.cardinality:,} architectures"
    rows = ", ".join(f"{count:,} {split}" for split, count in summary["rows"].items())
    values = {"labels": splits.labels, "domains": splits.domains}
    kinds = "".join(f", {len(found)} {what}" for what, found in values.items() if found)
    sites = ", ".join(f"{count} {role}" for role, count in summary["model"]["sites"].items())
    echo(f"{settings.study}: no problems found")
    echo(f"  model  {backbone.id} ({backbone.family}): {backbone.num_layers} layers,"
               f" {backbone.num_params:,} parameters")  # fmt: skip
    echo(f"  sites  {sites}")
    echo(f"  data   {rows} rows{kinds}")
    echo(f"  space  {len(space.genes)} genes, {size}")
    echo(f"  search {settings.search_words} for {', '.join(o.name for o in settings.objectives)}")
    if settings.report:
        echo(f"  report {', '.join(reported.name for reported in settings.report)}")
    if settings.search.prior is not None:
        echo(f"  prior  {summary['earlier_trials']} trials of {settings.search.prior} are in this space")


def checked(settings: StudyFile) -> tuple[Splits, Backbone, SearchSpace]:
    """Check a study as `check` does, with the progress of its rows and all warnings on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    from autopeft.studies.engine.check import check

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the rows", total=None)
        found = check(settings, lambda done, total: bar.update(task, completed=done, total=total))
    for warning in found[0].warnings:
        echo(f"warning: {warning}", err=True)
    return found


def _summary(settings: StudyFile, splits: Splits, backbone: Backbone, space: SearchSpace) -> dict[str, Any]:
    from autopeft.studies.config.problem import problem_for
    from autopeft.studies.engine.session import prior_trials

    roles = [site.role for site in backbone.sites]
    return {
        "study": settings.study,
        "folder": str(settings.folder),
        "model": {
            "id": backbone.id,
            "family": backbone.family,
            "num_layers": backbone.num_layers,
            "num_params": backbone.num_params,
            "sites": {role: roles.count(role) for role in backbone.roles},
        },
        "rows": {split: len(getattr(splits, split)) for split in splits.names},
        "labels": list(splits.labels or ()),
        "domains": list(splits.domains or ()),
        "space": {"genes": [gene.name for gene in space.genes], "cardinality": space.cardinality},
        "objectives": [objective.name for objective in settings.objectives],
        "report": [reported.name for reported in settings.report or ()],
        "earlier_trials": len(prior_trials(settings, problem_for(settings, backbone))),
        **losses(splits),
    }


def losses(splits: Splits) -> dict[str, Any]:
    """Return what is lost of checked rows, and all warnings, as data."""
    return {**(splits.encoded.to_dict() if splits.encoded else {}), "warnings": list(splits.warnings)}


def check_names(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Raise ConfigurationError with every unknown name, or if there is no name."""
    problems = [f"unknown {what} {name!r}{did_you_mean(name, known)}" for name in names if name not in known]
    if problems:
        raise ConfigurationError("\n".join(problems))
    if not names:
        raise ConfigurationError(f"name at least one {what}{did_you_mean('', known)}")
