"""What is shown in Python runs as it stands: the README's example and the notebooks, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from random import Random

import pandas
import pytest

from .support.tiny_study import LABELS, save_model

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run_python(code: str, folder: Path) -> str:
    """Run `code` in `folder`, with the door of this checkout."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def cpu_s() -> float:
    """Seconds of processor time of all processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_the_readme(tmp_path: Path) -> None:
    save_model(tmp_path / "my-model", initializer_range=0.3, hidden_size=32)
    rng = Random(0)
    rows = []
    for _ in range(400):
        label = rng.choice(LABELS)
        words = [f"w{rng.randrange(30)}" for _ in range(4)]
        words.insert(rng.randrange(4), label)
        rows.append({"review": " ".join(words), "stars": label})
    pandas.DataFrame(rows).to_csv(tmp_path / "reviews.csv", index=False)
    section = (ROOT / "README.md").read_text().split("## In Python\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    assert "trials=40" in code[1]
    # A tiny model learns with high rates alone; few trials and one baseline are enough for every line.
    shorter = (
        'trials=8, search={"batch": 8}, training={"learning_rate": [0.02, 0.03], "epochs": 6},'
        ' baselines={"names": ["lora-r8-qv"], "learning_rates": [0.02]}, finalists={"seeds": 2, "most": 3},'
    )
    run_python(code[1].replace("trials=40,", shorter), tmp_path)
    assert (tmp_path / "front.png").stat().st_size > 10_000
    assert list((tmp_path / "adapter").rglob("adapter_config.json"))
    assert (tmp_path / "runs" / "reviews" / "study.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook(notebook: Path, tmp_path: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "outputs are not kept"
    before = cpu_s()
    run_python("\n".join("".join(cell["source"]) for cell in code), tmp_path)
    assert cpu_s() - before < 60


def test_there_are_notebooks_and_the_readme_names_them() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(NOTEBOOKS) == 2
    assert all(f"notebooks/{path.name}" in readme for path in NOTEBOOKS)
