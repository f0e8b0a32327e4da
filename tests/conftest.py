"""What several test files start from."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = """
import sys
from setuptools.build_meta import build_sdist, build_wheel
out = sys.argv[1]  # each of the two writes another argv
build_sdist(out), build_wheel(out)
"""


def setuptools_is_new() -> bool:
    import setuptools

    return int(setuptools.__version__.split(".")[0]) >= 77


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built from a copy of the tree without a network."""
    if not setuptools_is_new():
        pytest.skip("building takes setuptools 77 or newer, see pyproject.toml")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("alpagasus2", "dataset", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, out], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out
