"""The Colab notebook, from its first cell to its last, twice, with Colab's modules stubbed."""

import json
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from test_package import installed_in, wheel_of

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "colab.ipynb"
USERDATA = '''
class SecretNotFoundError(Exception):
    """As Colab raises it."""

class NotebookAccessError(Exception):
    """As Colab raises it."""

def get(name):
    raise SecretNotFoundError(name)
'''
DRIVE = """
def mount(path):
    raise ValueError("mount failed")
"""
SMALLER = """
recipe.limit, recipe.judge.questions, recipe.generate = 8, 2, {"max_new_tokens": 8}
for arm in recipe.arms.values():
    arm.rows = 4
"""


@pytest.fixture
def colab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, and a `google.colab` that knows no secret."""
    stub = tmp_path / "stub" / "google" / "colab"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("")
    (stub / "userdata.py").write_text(USERDATA)
    (stub / "drive.py").write_text(DRIVE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stub'}:{NOTEBOOK.parent.parent}")
    for name in ("HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "content"
    folder.mkdir()
    return folder


@pytest.fixture
def fresh(colab: Path, dist: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with a kernel in a virtual environment in which nothing of ours is installed."""
    here = colab.parent
    python = str(installed_in(here / "venv", "ipykernel") / "python")
    launch = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = here / "jupyter" / "kernels" / "fresh" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": launch, "display_name": "fresh", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(here / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(here / "stub"))
    monkeypatch.setenv("ALPAGASUS2_CACHE", str(here / "cache"))
    monkeypatch.setenv("ALPAGASUS2_PACKAGE", f"alpagasus2[train] @ {wheel_of(dist).as_uri()}")
    return colab


def run_all(folder: Path, extra: str = "", kernel: str = "python3") -> tuple[str, float]:
    """Runtime, Run all; `extra` runs before the first long cell. What came out; seconds."""
    notebook: Any = nbformat.read(NOTEBOOK, 4)
    cells = notebook.cells
    cells.insert(0, nbformat.v4.new_code_cell("import google.colab"))
    long = next(i for i, c in enumerate(cells) if c.source.startswith("#| slow\nrun = Run("))
    cells.insert(long, nbformat.v4.new_code_cell(extra))
    start = time.perf_counter()
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1200, kernel_name=kernel, resources=where).execute()
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    shown = ["[picture]" for o in outputs if "image/png" in o.get("data", {})]
    said = [o.get("text", "") for o in outputs]
    return "".join([*said, *shown]), time.perf_counter() - start


def files(folder: Path) -> dict[Path, bytes]:
    """What a run must not change when it is repeated."""
    names = ("ratings.jsonl", "responses.jsonl", "judgments.jsonl", "results.json")
    return {p: p.read_bytes() for p in folder.rglob("*") if p.name in names}


def test_run_all_twice(colab):
    said, _ = run_all(colab, SMALLER)
    for told in ("Drive is not connected (mount failed)", "Llama 2 is given to those", "train"):
        assert told in said, told
    assert "HF_TOKEN is not among the secrets" in said and "judge unfit: no claim" in said
    assert said.count("[picture]") == 1
    found = files(colab)
    assert len(found) == 4 and (colab / "runs" / "smollm2-135m.zip").exists()
    again, _ = run_all(colab, SMALLER)
    assert "judge unfit: no claim" in again and files(colab) == found
    assert again.count("[picture]") == 1  # in a kernel that has drawn nothing else


@pytest.mark.slow
def test_the_whole_notebook_in_a_quarter_of_an_hour_and_again_in_a_minute(fresh):
    """From an empty virtual environment; the quarter of an hour has the installation in it."""
    said, first = run_all(fresh, kernel="fresh")
    found = files(fresh)
    again, second = run_all(fresh, kernel="fresh")
    print(f"first {first:.0f} s, second {second:.0f} s")
    assert first < 900 and second < 60, (first, second)
    assert "judge unfit: no claim" in said and "judge unfit: no claim" in again
    assert len(found) == 4 and files(fresh) == found
