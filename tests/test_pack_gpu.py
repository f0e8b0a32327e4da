"""What is packed for a GPU machine without network: pinned versions, one build of bitsandbytes."""

import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "pack_gpu.py"


@pytest.fixture(scope="module")
def pack() -> Any:
    spec = importlib.util.spec_from_file_location("pack_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_versions_are_those_of_the_constraints(pack: Any) -> None:
    known = (SCRIPT.parents[1] / "constraints.txt").read_text().splitlines()
    assert pack.pinned("trl") in known and pack.pinned("Typing_Extensions") in known
    assert pack.pinned("liger_kernel") == "liger_kernel"


def test_one_build_for_the_machines_cuda_stays(pack: Any, tmp_path: Path) -> None:
    builds = [f"libbitsandbytes_{x}.so" for x in ("cuda126", "cuda130", "cpu")]
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels/bitsandbytes-1-py3-none-any.whl", "w") as wheel:
        for name in builds:
            wheel.writestr(f"bitsandbytes/{name}", "")
    pack.unpack(tmp_path / "wheels", tmp_path / "site", "130")
    assert {p.name for p in (tmp_path / "site/bitsandbytes").iterdir()} == set(builds[1:])
    with pytest.raises(SystemExit, match="--cuda 999: bitsandbytes has no such build; it has"):
        pack.unpack(tmp_path / "wheels", tmp_path / "other", "999")
