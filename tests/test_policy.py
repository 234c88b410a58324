"""The rules of the house as tests: packaging, the direction of imports, names."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from .support.file_map import PAGE, with_map
from .support.slow import slow

ROOT = Path(__file__).resolve().parent.parent
PORTIONS = ("benchmarks", "evaluators", "kernels", "search_space", "searchers", "studies", "testing")
#: The folder of the regular package `autopeft`, beside those of its sub-packages.
DOOR = "autopeft"
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
DATA_SUFFIXES = {pattern.removeprefix("*") for pattern in CONFIG["tool"]["setuptools"]["package-data"]["*"]}


def shipped_files() -> list[Path]:
    """Every module and data file of the packages, relative to the root."""
    return sorted(
        path.relative_to(ROOT)
        for portion in (DOOR, *PORTIONS)
        for path in (ROOT / portion).rglob("*")
        if {path.suffix, path.name} & {*DATA_SUFFIXES, ".py"}
        and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    )


def installed(path: Path) -> Path:
    """Where a file of the checkout is once it is installed."""
    return path if path.parts[0] == DOOR else DOOR / path


def modules() -> list[Path]:
    return [path for path in shipped_files() if path.suffix == ".py"]


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    # PYTHONSAFEPATH would keep the working directory off sys.path, which is what some tests here are about.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def run_python(code: str, cwd: Path = ROOT) -> None:
    done = run(sys.executable, "-c", code, cwd=cwd)
    assert done.returncode == 0, done.stdout


# Packaging


def test_every_sub_package_is_listed() -> None:
    listed = set(CONFIG["tool"]["setuptools"]["packages"])
    found = {".".join(installed(path).parent.parts) for path in shipped_files()}
    assert found <= listed, f"add to [tool.setuptools] packages in pyproject.toml: {sorted(found - listed)}"
    assert listed <= found, f"remove from [tool.setuptools] packages, no such folder: {sorted(listed - found)}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy, because setuptools leaves build/ behind, and modules deleted since would come back from there.
    source = tmp_path_factory.mktemp("source")
    for path in (*shipped_files(), Path("pyproject.toml"), Path("LICENSE")):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    (source / "README.md").touch()
    return source


PIP = ("-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    done = run(sys.executable, *PIP, "wheel", *OFFLINE, "--wheel-dir", source / "dist", source)
    assert done.returncode == 0, done.stdout
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_one_top_level_name(wheel_names: set[str]) -> None:
    top_level = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"autopeft"}
    assert {"autopeft/__init__.py", "autopeft/py.typed"} <= wheel_names
    assert "autopeft/autopeft/__init__.py" not in wheel_names
    assert "autopeft/kernels/__init__.py" not in wheel_names


def test_wheel_holds_every_module_and_data_file(wheel_names: set[str]) -> None:
    missing = {installed(path).as_posix() for path in shipped_files()} - wheel_names
    assert not missing


#: The door, a package beside it, the namespace without `__init__.py`, data, and what probes for `kernels`.
ALL_OF_IT = """
import sys
import autopeft
assert autopeft.Int(low=1, high=2).cardinality == 2 and autopeft.__version__, autopeft
import autopeft.kernels.slot_products, autopeft.studies.cli.app
from importlib.resources import files
assert (files("autopeft.studies.config") / "templates" / "study.yaml").is_file()
assert (files("autopeft") / "py.typed").is_file()
import transformers
for module in (autopeft, autopeft.kernels.slot_products, autopeft.studies):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
"""


@pytest.mark.parametrize("how", ["wheel", slow("editable")])
def test_the_installed_package_is_whole(how: str, source: Path, wheel: Path, tmp_path: Path) -> None:
    """In an environment that has what this one has, but for autopeft."""
    done = run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    assert done.returncode == 0, done.stdout
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # A folder on the path without its .pth files: where they make this environment's autopeft importable, not there.
    (site / "all.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    words = [wheel] if how == "wheel" else ["--editable", source]
    done = run(sys.executable, *PIP, "--python", python, "install", *OFFLINE, "--ignore-installed", *words)
    assert done.returncode == 0, done.stdout
    done = run(python, "-c", ALL_OF_IT, site if how == "wheel" else source, cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_every_dependency_has_a_tested_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        # no local builds such as +cpu, no paths, no addresses
        assert re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line), line
    pinned = {line.split("==")[0] for line in lines}
    project = CONFIG["project"]
    declared = {
        re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace(".", "-").replace("_", "-")
        for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]
    }
    assert declared - pinned == {"triton"}, "constraints.txt says why triton, and triton alone, is left open"


# Life beside the other packages of the field


def test_kernels_is_never_a_regular_package() -> None:
    # transformers probes for the PyPI package `kernels`; with the root on sys.path it would import ours.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_transformers_model_builds_with_the_root_first_on_the_path() -> None:
    run_python(
        "import os, sys\n"
        "sys.path.insert(0, os.getcwd())\n"
        "from transformers import BertConfig, BertModel\n"
        "config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,"
        " intermediate_size=8)\n"
        "import torch\n"
        "assert BertModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape == (1, 3, 8)\n"
    )


def test_modules_of_kernels_are_found_from_anywhere(tmp_path: Path) -> None:
    names = [".".join(installed(path).with_suffix("").parts) for path in modules() if path.parts[0] == "kernels"]
    assert names, "the namespace portion exists only while there is a module in it"
    run_python(
        "from importlib.util import find_spec\n"
        f"missing = [name for name in {names!r} if find_spec(name) is None]\n"
        "assert not missing, missing\n",
        cwd=tmp_path,
    )


# The public door


def test_the_door_is_light() -> None:
    run_python(
        "import sys\n"
        "import autopeft\n"
        "heavy = {'torch', 'numpy', 'pandas', 'pydantic', 'transformers', 'importlib.metadata'} & set(sys.modules)\n"
        "assert not heavy, f'import autopeft imports {sorted(heavy)}'\n"
        "autopeft.Float, autopeft.AdapterChoice\n"
        "assert 'torch' not in sys.modules\n"
    )


def test_every_public_name_is_there() -> None:
    run_python(
        "import autopeft\n"
        "assert set(autopeft.__all__) == {*autopeft._EXPORTS, '__version__'}\n"
        "assert set(autopeft.__all__) <= set(dir(autopeft))\n"
        "for name in autopeft.__all__:\n"
        "    assert getattr(autopeft, name) is getattr(autopeft, name)\n"
        "try:\n"
        "    autopeft.Studie\n"
        "except AttributeError as error:\n"
        "    assert 'Studie' in str(error)\n"
        "else:\n"
        "    raise AssertionError('any name is there')\n"
    )


def test_the_door_tells_type_checkers_the_same() -> None:
    tree = ast.parse((ROOT / DOOR / "__init__.py").read_text())
    checked = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (exports,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_EXPORTS"
    ]
    assert checked == exports


def test_no_package_comes_in_by_the_door() -> None:
    # It stands above all of them, and imports from it would be circles that the linter cannot see.
    own = [path for path in modules() if path.parts[0] != DOOR]
    bad = [
        str(path)
        for path in own
        if re.search(r"^\s*(import autopeft$|from autopeft import)", (ROOT / path).read_text(), re.M)
    ]
    assert not bad


def test_packages_are_found_through_the_link(tmp_path: Path) -> None:
    """What `make gpu` and the linters go by: the door's folder inside the link takes nothing away."""
    (tmp_path / "autopeft").symlink_to(ROOT, target_is_directory=True)
    code = (
        "import os, autopeft.kernels.slot_products as kernels, autopeft.search_space as space\n"
        f"assert os.path.realpath(kernels.__file__).startswith({str(ROOT)!r})\n"
        f"assert os.path.realpath(space.__file__).startswith({str(ROOT)!r})\n"
    )
    for folder in (tmp_path, ROOT):  # in the root the door itself is found first
        done = run(sys.executable, "-c", code, cwd=folder, PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stdout


# The direction of imports


def test_declaring_a_space_needs_no_torch() -> None:
    site = {"name": "layers.0.attn", "layer": 0, "role": "attn", "module": "a", "input_module": "a"}
    site |= {"in_features": 8, "out_features": 8, "bias": True, "num_key_value_heads": 2, "head_dim": 4}
    mlp = site | {"name": "layers.0.mlp", "role": "mlp"}
    backbone = {"id": "any", "revision": None, "family": "any", "sites": [site, mlp], "hidden_size": 8}
    backbone |= {"num_layers": 1, "num_params": 9, "head_modules": [], "num_head_params": 0, "causal": False}
    run_python(
        "import sys\n"
        "from random import Random\n"
        "from autopeft.search_space import PRESETS, Backbone, SearchSpace\n"
        f"backbone = Backbone.from_dict({backbone!r})\n"
        "space = SearchSpace(backbone=backbone, **PRESETS['autopeft'].space(backbone))\n"
        "space.decode(space.sample(Random(0))).architecture.num_params(backbone)\n"
        "heavy = {'torch', 'transformers', 'peft', 'optuna', 'mlflow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, f'declaring a space imports {sorted(heavy)}'\n"
    )


def lint_imports(path_entry: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts over the folder `autopeft` in `path_entry`."""
    return run(
        *(Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"),
        *("--config", ROOT / "pyproject.toml"),
        cwd=path_entry,
        PYTHONPATH=str(path_entry),
        COLUMNS="200",
    )


def test_import_contracts_hold(tmp_path: Path) -> None:
    (tmp_path / "autopeft").symlink_to(ROOT, target_is_directory=True)
    done = lint_imports(tmp_path)
    assert done.returncode == 0, done.stdout


FORBIDDEN_IMPORTS = [
    ("kernels", "autopeft.search_space"),
    ("kernels", "transformers"),
    ("search_space", "autopeft.searchers"),
    ("search_space", "autopeft.evaluators"),
    ("searchers", "autopeft.evaluators"),
    ("searchers", "autopeft.studies"),
    ("searchers", "transformers"),
    ("evaluators", "autopeft.searchers"),
    ("evaluators", "optuna"),
]


def test_import_contracts_catch_a_planted_import(tmp_path: Path) -> None:
    for path in modules():
        copy = tmp_path / "autopeft" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy)
    for importer in {importer for importer, _ in FORBIDDEN_IMPORTS}:
        lines = [f"import {imported}" for source, imported in FORBIDDEN_IMPORTS if source == importer]
        (tmp_path / "autopeft" / importer / "planted.py").write_text("\n".join(lines))
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout
    missed = [
        (importer, imported)
        for importer, imported in FORBIDDEN_IMPORTS
        if not re.search(rf"autopeft\.{importer}\.planted -> {re.escape(imported)} ", done.stdout)
    ]
    assert not missed, done.stdout


def test_every_folder_with_modules_is_a_package() -> None:
    # Inside a regular package the import linter skips a folder without `__init__.py`, its imports included.
    folders = {path.parent for path in modules()} - {Path("kernels")}
    assert not [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists()]


def test_portions_are_imported_by_their_full_name() -> None:
    # `import search_space` works from the repository's root and nowhere else.
    bare = []
    for path in [*modules(), *(test.relative_to(ROOT) for test in (ROOT / "tests").rglob("*.py"))]:
        for node in ast.walk(ast.parse((ROOT / path).read_text(), filename=str(path))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            bare += [f"{path}:{node.lineno} {name}" for name in names if name.split(".")[0] in PORTIONS]
    assert not bare


# Order

#: Files side by side in a folder; one more is a reason for a folder. A folder of one kind may have one file per kind.
MOST_FILES = 12
ONE_PER_KIND = {"search_space/adapters", "search_space/routers"}
#: Lines of a module.
MOST_LINES = 400


def test_the_file_map_is_what_the_docstrings_say() -> None:
    page = PAGE.read_text()
    assert with_map(page) == page, "run `make file-map`"


def test_folders_and_files_are_small() -> None:
    folders = Counter(str(path.parent) for path in modules() if path.name != "__init__.py")
    assert not {name: n for name, n in folders.items() if n > MOST_FILES and name not in ONE_PER_KIND}
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path in modules()}
    assert not {name: n for name, n in lines.items() if n > MOST_LINES}


# Names


def test_no_module_is_called_utils_helpers_or_manager() -> None:
    vague = {"util", "utils", "helper", "helpers", "manager", "managers"}
    files = [*modules(), *(test.relative_to(ROOT) for test in (ROOT / "tests").rglob("*.py"))]
    words = {path: {word for part in path.with_suffix("").parts for word in part.split("_")} for path in files}
    assert not [str(path) for path in files if words[path] & vague]
