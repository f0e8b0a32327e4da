"""Pack what a CUDA machine without network lacks for `tools/bench_gpu.py`: one archive, no torch.

    python tools/pack_gpu.py FOLDER --rows rows.json

That machine has Python and a PyTorch that runs on its GPU. Wheels are those of constraints.txt,
for that Python on Linux; of bitsandbytes' builds one stays, that of the machine's CUDA.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What training and answering import that a machine made for PyTorch may not have; no torch,
# numpy, pandas, pyarrow, tokenizers, safetensors or huggingface_hub: name those with --add.
PACKAGES = (
    "transformers trl peft accelerate datasets bitsandbytes jsonargparse fastcore openai gguf "
    "httpx2 httpcore2 jiter pydantic pydantic_core sniffio distro anyio typing_inspection "
    "annotated_types typing_extensions dill multiprocess xxhash psutil filelock liger_kernel"
).split()
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def pinned(
    package: str,  # a name, or a name with its version
) -> str:
    "The package in the version of constraints.txt, where that has one."
    name = re.sub("[-_.]+", "-", package.lower())
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if re.sub("[-_.]+", "-", line.split("==")[0].lower()) == name:
            return line
    return package


def download(
    packages: list[str],  # without what they depend on
    python: str,  # version of the other machine's Python: 3.12
    folder: Path,  # wheels are written here
) -> None:
    "Wheels for another machine; one that is not to be had stops it."
    pip = [sys.executable, "-m", "pip"]
    words = ["download", "-q", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    words += [f"--python-version={python}", f"--dest={folder}"]
    words += [f"--platform={p}" for p in PLATFORMS]
    subprocess.run([*pip, *words, *map(pinned, packages)], check=True)
    subprocess.run([*pip, "wheel", "-q", "--no-deps", f"--wheel-dir={folder}", ROOT], check=True)


def unpack(
    wheels: Path,  # a folder of them
    site: Path,  # what goes on PYTHONPATH
    cuda: str,  # 130: of bitsandbytes' builds the one to keep
) -> None:
    "Lay the wheels out as they are installed."
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)
    builds = [*(site / "bitsandbytes").glob("libbitsandbytes_*")]
    if builds and not any(f"cuda{cuda}" in b.name for b in builds):
        found = ", ".join(sorted(b.name for b in builds))
        sys.exit(f"--cuda {cuda}: bitsandbytes has no such build; it has {found}")
    for build in builds:
        if f"cuda{cuda}" not in build.name and "cpu" not in build.name:
            build.unlink()


def options_of() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="site.tar.xz, bench_gpu.py and the rows are written here")
    add("--rows", default="sample", help="training rows: a file; or sample, which needs none")
    add("--python", default="3.12", help="version of the other machine's Python")
    add("--cuda", default="130", help="its CUDA, as bitsandbytes writes it")
    add("--add", nargs="*", default=[], help="further packages: unsloth unsloth_zoo ...")
    add("--leave", nargs="*", default=[], help="packages that the machine has in a version to keep")
    add("--limit", type=float, default=64, help="MiB that may travel")
    return parser.parse_args()


def main() -> int:
    "Pack, and say what to run there."
    options = options_of()
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = [p for p in [*PACKAGES, *options.add] if p not in options.leave]
    with tempfile.TemporaryDirectory() as wheels, tempfile.TemporaryDirectory() as site:
        download(wanted, options.python, Path(wheels))
        unpack(Path(wheels), Path(site), options.cuda)
        with tarfile.open(options.folder / "site.tar.xz", "w:xz", preset=9) as archive:
            archive.add(site, ".")
    shutil.copy(ROOT / "tools/bench_gpu.py", options.folder)
    rows = "sample"
    if options.rows != "sample":
        rows = Path(shutil.copy(options.rows, options.folder / "rows.json")).name
    size = sum(p.stat().st_size for p in options.folder.iterdir()) / 2**20
    print(f"{options.folder}: {size:.1f} MiB. There, in that folder:")
    print("  mkdir -p site && tar -xJf site.tar.xz -C site")
    print(f"  PYTHONPATH=site python3 bench_gpu.py --output out --rows {rows} --commit {commit()}")
    if size > options.limit:
        print(f"this is more than the {options.limit:.0f} MiB of --limit", file=sys.stderr)
        return 1
    return 0


def commit() -> str:
    "Of this checkout."
    words = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
