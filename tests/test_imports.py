"""The house keeps its order: who may import whom, what stays light, how fast a command starts."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "alpagasus2"

# DESIGN's table: a room and the rooms that it may import. Every room may import runs.
MAY_IMPORT = {
    "similarity": "",
    "categories": "",
    "data": "similarity categories",
    "runs": "",
    "prices": "",
    "cache": "",
    "limits": "",
    "endpoint": "prices cache limits",
    "batch": "prices cache limits endpoint",
    "quant_lora": "",
    "forward": "data",
    "score": "data forward",
    "estimate": "quant_lora",
    "merge": "quant_lora",
    "doctor": "quant_lora",
    "checkpoint": "",
    "train": "data quant_lora forward checkpoint",
    "preview": "forward train",
    "share": "data",
    "decode": "",
    "generate": "data prices cache endpoint batch quant_lora decode",
    "replies": "",
    "judge": "data prices cache replies",
    "standings": "",
    "leaderboard": "quant_lora standings",
    "evidence": "",
    "forms": "replies judge evidence",
    "analysis": "data evidence",
    "plots": "",
    "charts": "",
    "report": "analysis forms charts",
    "filtering": "similarity data evidence",
    "local": "data cache generate judge quant_lora score",
    "sizes": "analysis",
    "design": "data endpoint quant_lora train generate evidence analysis",
    "recipe": "data prices limits endpoint batch forward score checkpoint "
    "train decode generate replies judge standings leaderboard evidence analysis plots forms "
    "charts report filtering local sizes design",
}
# a command loads the step that it runs, and no other
MAY_IMPORT |= {
    "parser": "",
    "cli_ask": "data prices endpoint batch quant_lora generate judge leaderboard local",
    "cli_train": "data quant_lora forward score estimate merge doctor train preview share",
    "cli": "data judge analysis plots forms report filtering recipe train parser cli_ask cli_train",
}
NO_ROOMS = {"__init__", "__main__", "_modidx", "_dataset"}
ROOMS = sorted(p for p in PACKAGE.glob("*.py") if p.stem not in NO_ROOMS)
# without torch
LIGHT = (
    "similarity categories data runs prices cache limits endpoint batch doctor share generate "
    "replies judge standings forms evidence analysis plots charts report filtering sizes parser "
    "cli_ask cli_train cli".split()
)


def imported(source: str) -> Iterator[str]:
    "Names of the package's modules that a module imports, at its top or inside a function."
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["alpagasus2" if node.level else "", node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            text = [a.value for a in node.args if isinstance(a, ast.Constant)]
            names = [f"alpagasus2{t}" if t.startswith(".") else t for t in map(str, text)]
        for name in names:
            top, *rest = name.split(".")
            if top == "alpagasus2" and rest and not rest[0].startswith("_"):
                yield rest[0]


def test_imports_are_found():
    source = """
import os, alpagasus2.train
from .score import encode
def f():
    from alpagasus2 import judge, __version__
    from . import report as r
    importlib.import_module(".cli", "alpagasus2")
"""
    assert set(imported(source)) == {"train", "score", "judge", "report", "cli"}


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_rooms_import_only_what_is_above_them(path):
    assert path.stem in MAY_IMPORT, f"{path.stem}.py has no line in the table of rooms"
    above = {"runs"} - {path.stem} | set(MAY_IMPORT[path.stem].split())
    found = set(imported(path.read_text()))
    assert found <= above, f"{path.stem} may not import {sorted(found - above)}"


def test_the_table_has_no_circle():
    above = {"runs"}
    for room, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= above, room
        above.add(room)


def test_no_room_is_missing():
    built = {p.stem for p in ROOMS}
    if "cli" not in built:
        pytest.skip("the rooms are being built: alpagasus2/cli.py does not exist yet")
    assert not set(MAY_IMPORT) - built


def python(code: str) -> subprocess.CompletedProcess:
    "Run code in a fresh interpreter."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_load_no_torch(room):
    if not (PACKAGE / f"{room}.py").exists():
        pytest.skip(f"alpagasus2/{room}.py does not exist yet")
    done = python(f"import sys, alpagasus2.{room}; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr or f"alpagasus2.{room} loads torch"


def seconds(code: str) -> float:
    "The best of five starts, since the machine may be busy."
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        done = python(code)
        spent.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    return min(spent)


HELP = """
import sys
from alpagasus2.cli import main
sys.argv = ["alpagasus2", "--help"]
try: main()
except SystemExit as e: assert not e.code, e.code
heavy = {"torch", "transformers", "pandas", "matplotlib", "openai"} & set(sys.modules)
assert not heavy, f"--help loads {heavy}"
"""


def test_import_is_fast():
    assert seconds("import alpagasus2") - seconds("pass") < 0.3


def test_help_is_fast_and_light():
    if not (PACKAGE / "cli.py").exists():
        pytest.skip("alpagasus2/cli.py does not exist yet")
    assert "quickstart" in python(HELP).stdout
    assert seconds(HELP) - seconds("pass") < 0.6
