"""The house keeps its order: who may import whom, what stays light, how fast a command starts."""

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "alpagasus2"

# The main street, from top to bottom: a module may import those above it. 00_data is read first;
# it finds data sets by name, so the catalogue, which needs no other module, stands above it.
STREET = (
    "catalog data selection quant_lora batches train generate judge local analysis recipe "
    "experiment cli"
).split()
# The wings: a folder of modules, and what these may import beside each other.
WINGS = {
    "core": "",
    "endpoint": "core",
    "model": "core data quant_lora",
    "evidence": "core data selection",
    "report": "core data evidence analysis judge",
    "commands": "core catalog data",  # each command loads the step it runs: see LOADED
    "extras": "core endpoint model evidence data quant_lora batches train generate catalog",
    "scale": "core data endpoint model quant_lora generate judge selection",  # what it spreads
    "steps": "core endpoint model evidence report extras data quant_lora batches train generate "
    "judge local analysis recipe selection",  # of a run, down to the recipe
}
# What the main street takes from the wings.
STEPS = "core endpoint model"  # catalog to local
RESULTS = "core endpoint model evidence report"  # analysis to recipe
EVERYTHING = " ".join(WINGS)  # experiment and cli
# Loaded inside a function, when its command is run.
LOADED = {
    "commands": f"{EVERYTHING} {' '.join(STREET)}",
    "scale": "local batches train",  # in an actor, or a process of its own
    "steps": "scale",  # where arms are trained several at a time
    "train": "scale",  # where `accelerate launch` splits the base
}
# Without torch: all of these folders and modules.
LIGHT = (
    "core endpoint evidence report commands catalog data selection generate judge analysis "
    "cli extras.doctor extras.hub extras.benchmark_tables extras.verify"
).split()
# Without matplotlib as well: pictures are the report's.
PLAIN = "core endpoint evidence catalog data selection generate judge analysis cli".split()

NO_MODULES = {"__init__", "__main__", "_modidx"}


def name_of(path: Path) -> str:
    "A module's name below the package: data, or endpoint.cache."
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {
    name_of(p): p
    for p in sorted(PACKAGE.rglob("*.py"))
    if p.stem not in NO_MODULES and "_dataset" not in p.parts
}


def allowed(module: str) -> set[str]:
    "Folders and modules that a module may import at its top."
    wing, _, inner = module.partition(".")
    if inner:
        return {wing, *WINGS[wing].split()}
    place = STREET.index(module)
    wings = EVERYTHING
    if place < STREET.index("experiment"):
        wings = RESULTS if place >= STREET.index("analysis") else STEPS
    return {*STREET[:place], *wings.split()}


def may_load(module: str) -> set[str]:
    "Those, and what a module may import inside a function."
    return allowed(module) | set(LOADED.get(module.partition(".")[0], "").split())


def absolute(module: str, node: ast.ImportFrom) -> str:
    "The full name of what `from ..x import y` names."
    if not node.level:
        return node.module or ""
    above = f"alpagasus2.{module}".split(".")[: -node.level]
    return ".".join([*above, *filter(None, [node.module])])


def resolved(name: str) -> str | None:
    "The module of this package that a dotted name leads to; None for another package's."
    top, _, rest = name.partition(".")
    if top != "alpagasus2" or not rest:
        return None
    parts = rest.split(".")
    for k in range(len(parts), 0, -1):
        if ".".join(parts[:k]) in MODULES:
            return ".".join(parts[:k])
    return None if parts[0].startswith("__") else parts[0]


def imported(module: str, tree: ast.AST) -> Iterator[tuple[str, str]]:
    "(module, name or '') of whatever a module imports from this package, wherever it stands."
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                deeper = resolved(whole) != resolved(base)
                found.append((whole, "") if deeper else (base, alias.name))
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            text = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found = [(f"alpagasus2{t}" if t.startswith(".") else t, "") for t in map(str, text)]
        for name, what in found:
            if target := resolved(name):
                yield target, what


def at_the_top(tree: ast.Module) -> ast.Module:
    "The module without the bodies of its functions."
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    inside = {
        n
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        for n in ast.walk(f)
    }
    return ast.Module([n for n in nodes if n not in inside], [])


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def test_imports_are_found():
    source = """
import os, alpagasus2.train
from ..model.likelihood import signals
from .prices import Price
def f():
    from alpagasus2 import judge, __version__
    from alpagasus2.report import page as r
    importlib.import_module(".cli", "alpagasus2")
"""
    found = {m for m, _ in imported("endpoint.client", ast.parse(source))}
    wanted = {"train", "model.likelihood", "endpoint.prices", "judge", "report.page", "cli"}
    assert found == wanted
    top = {m for m, _ in imported("endpoint.client", at_the_top(ast.parse(source)))}
    assert top == {"train", "model.likelihood", "endpoint.prices"}


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_is_above_them(module):
    wing, _, inner = module.partition(".")
    assert wing in (WINGS if inner else STREET), f"{module} is on no street and in no wing"
    for tree, may in (
        (at_the_top(tree_of(module)), allowed(module)),
        (tree_of(module), may_load(module)),
    ):
        found = {m for m, _ in imported(module, tree)}
        wrong = {m for m in found if m not in may and m.partition(".")[0] not in may}
        assert not wrong, f"{module} may not import {sorted(wrong)}"


def test_no_circle():
    above: dict[str, set[str]] = {m: {x for x, _ in imported(m, tree_of(m))} for m in MODULES}
    while above:
        free = [m for m, needs in above.items() if not needs & above.keys()]
        assert free, f"a circle among {sorted(above)}"
        above = {m: needs for m, needs in above.items() if m not in free}


def test_no_module_is_missing():
    assert not set(STREET) - set(MODULES)
    assert set(WINGS) == {m.partition(".")[0] for m in MODULES if "." in m}


def is_private(name: str) -> bool:
    "Not __init__, nor _repr_html_, which is Jupyter's."
    return name.startswith("_") and not name.endswith("_")


def private_names(tree: ast.Module) -> set[str]:
    "Private functions, classes, methods, attributes and constants that a module defines."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return {n for n in names if is_private(n)}


def taken(module: str) -> Iterator[str]:
    "Private names of other modules that a module uses."
    tree = tree_of(module)
    for target, name in imported(module, tree):
        if is_private(name):
            yield f"{target}.{name}"
    own = private_names(tree)
    others = {n for m in MODULES if m != module for n in private_names(tree_of(m))} - own
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in others:
            if ast.unparse(node.value) not in ("self", "cls"):
                yield ast.unparse(node)


@pytest.mark.parametrize("module", MODULES)
def test_no_module_takes_a_private_name_of_another(module):
    assert not (found := sorted(set(taken(module)))), f"{module} uses {', '.join(found)}"


def python(code: str) -> subprocess.CompletedProcess:
    "Run code in a fresh interpreter."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


LIGHT_MODULES = [m for m in MODULES if m in LIGHT or m.partition(".")[0] in LIGHT]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_load_nothing_heavy(module):
    plain = module.partition(".")[0] in PLAIN
    heavy = {"torch", "matplotlib"} if plain else {"torch"}
    done = python(f"import sys, alpagasus2.{module}; print(*{heavy} & set(sys.modules))")
    assert done.returncode == 0, done.stderr
    assert not (found := done.stdout.split()), f"alpagasus2.{module} loads {found}"


def seconds(code: str) -> float:
    "Of the processor, the best of five starts: other work on the machine hardly counts."
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python(code)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime)
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
    assert "quickstart" in python(HELP).stdout
    assert seconds(HELP) - seconds("pass") < 0.6
