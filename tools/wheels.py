"""Build and check wheels: `python tools/wheels.py 12.4 12.8 13.0 cpu none`.

Each CUDA version, `cpu` and `none` gives one wheel in `--out`. Each is built in its own environment
with tools from PyPI (NVRTC and nvFatbin for device code, zig for host code), so neither a CUDA
toolkit nor a compiler is needed. Wheels that were built and checked from the same sources are
reused. Needs Python 3.11 or newer, `tqdm` and `pyelftools`.
"""

import argparse
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
COMPILE = runpy.run_path(str(ROOT / "csrc" / "cuda" / "compile.py"))
CHECK = runpy.run_path(str(ROOT / ".ci" / "check_wheels.py"))
STEPS = 3  # environment, build, checks
COLUMNS = ("wheel", "size", "build", "architectures", "glibc", "checks")

# Runs in an environment with the wheel and its dependencies, away from the source tree.
SMOKE = """
import sys, torch, hivtp_kernels, hivtp_transformers
from hivtp_kernels import PruneConfig, available_backends, gather_tokens, score_and_select
assert ROOT not in hivtp_kernels.__file__, hivtp_kernels.__file__
torch.manual_seed(0)
q, k = torch.randn(2, 2, 4, 577, 64).unbind()
x = torch.randn(2, 577, 32)
expected = score_and_select(q, k, PruneConfig(budget=192), backend="torch")
missing = {name: reason for name, reason in available_backends("cpu").items() if reason}
assert ("cpu" in missing) == (LABEL == "none"), missing
kept = score_and_select(q, k, PruneConfig(budget=192))
assert torch.equal(kept.indices, expected.indices)
assert torch.equal(gather_tokens(x, kept), gather_tokens(x, expected, backend="torch"))
if LABEL.startswith("cu"):
    import hivtp_kernels._C as C
    assert C.cuda_target.startswith(f"CUDA {VERSION} for sm_75, sm_80"), C.cuda_target
    if not torch.cuda.is_available():
        try:
            features = C.Features(
                data=64, image_stride=0, row_stride=0, row_bytes=16, batch=1, patches=1, prefix=0
            )
            C.cuda_gather_tokens(
                features=features, indices=64, capacity=1, out=64, device=0, stream=0
            )
        except RuntimeError as error:
            assert C.cuda_target in str(error), error
        else:
            raise AssertionError("a launch without a driver")
"""


def pypi_versions(package: str) -> set[str]:
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\b(\d+\.\d+)\.\d+", listed))


def known_versions() -> set[str]:
    """The CUDA versions for which PyPI has both NVRTC and nvFatbin."""
    return set().union(
        *(
            set.intersection(*(pypi_versions(f"nvidia-{n}{s}") for n in ("cuda-nvrtc", "nvfatbin")))
            for s in ("-cu12", "")
        )
    )


def check_asked(asked: list[str], known: set[str]) -> None:
    wrong = [name for name in asked if name not in known | {"cpu", "none"}]
    if wrong:
        in_order = sorted(known, key=lambda version: [int(part) for part in version.split(".")])
        raise SystemExit(
            f"wheels must be cpu, none or a CUDA version for which PyPI has NVRTC and nvFatbin "
            f"({', '.join(in_order)}), got {', '.join(wrong)}"
        )


def environment(folder: Path, requirements: list[str]) -> Path:
    """Create a virtual environment with these packages; returns its Python."""
    run(sys.executable, "-m", "venv", "--clear", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *requirements)
    return python


def run(*command: object, **options: object) -> str:
    """The output of a command; if it fails, exits with that output."""
    words = [str(word) for word in command]
    result = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(words)}\n{result.stdout}")
    return result.stdout


class Source:
    """The sdist, a digest of its files, and the Python with the tools that all wheels need.

    All wheels share this Python and the build folder, so that zig's cache already has their common
    host code from the second wheel on.
    """

    def __init__(self) -> None:
        requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
        self.requirements: list[str] = requirements["requires"]
        tools = [*self.requirements, "wheel", "ziglang", "auditwheel"]
        self.python = python = environment(WORK / "tools-venv", tools)
        code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(WORK)!r}))"
        cpu = os.environ | {"HIVTP_BUILD": "cpu"}
        self.archive = WORK / run(python, "-c", code, cwd=ROOT, env=cpu).splitlines()[-1]
        with tarfile.open(self.archive) as files:
            members = sorted((m for m in files if m.isfile()), key=lambda m: m.name)
            digest = hashlib.sha256((ROOT / "tools" / "zig_cxx.py").read_bytes())
            for member in members:
                if not member.name.endswith("PKG-INFO"):
                    digest.update(member.name.encode() + b"\0" + files.extractfile(member).read())
        self.digest = digest.hexdigest()

    def unpack(self) -> Path:
        folder = WORK / "source"
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(self.archive) as files:
            files.extractall(folder, filter="data")
        return next(folder.iterdir())


def build(name: str, source: Source, out: Path, step: Callable[[], object]) -> dict[str, str]:
    """Build and check one wheel, in three steps; returns its row of the table."""
    label = name if name in ("cpu", "none") else f"cu{name.replace('.', '')}"
    folder = WORK / label
    done = folder / "done.json"
    if done.exists():
        row: dict[str, str] = json.loads(done.read_text())
        if row["source"] == source.digest and (out / row["wheel"]).exists():
            for _ in range(STEPS):
                step()
            return row
    folder.mkdir(parents=True, exist_ok=True)
    compilers = COMPILE["requirements"](name) if label.startswith("cu") else []
    python = environment(folder / "venv", [*source.requirements, *compilers])
    step()

    begin = time.monotonic()
    tree = source.unpack()
    env = os.environ | {
        "HIVTP_BUILD": label if label in ("cpu", "none") else "cuda",
        "HIVTP_CUDA_VERSION": name if label.startswith("cu") else "",
        "CXX": f"{source.python} {ROOT / 'tools' / 'zig_cxx.py'}",
        # Without an nvcc that happens to be installed.
        "PATH": f"{python.parent}:/usr/bin:/bin",
    }
    wheels = folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, tree)
    (folder / "build.log").write_text(run(python, *command, "-v", env=env))
    (wheel,) = wheels.iterdir()
    seconds = time.monotonic() - begin

    step()

    glibc = "any"
    if label != "none":
        shown = run(source.python, "-m", "auditwheel", "show", wheel)
        tag = re.search(r'platform tag:\s+"(manylinux_2_(\d+)_\w+)"', shown)
        if tag is None or int(tag[2]) > 28:
            raise SystemExit(f"{wheel.name} needs a glibc newer than 2.28:\n{shown}")
        glibc = f"2.{tag[2]}"
        platform = tag[1].replace(f"_2_{tag[2]}_", "_2_28_")
        tags = ("-m", "wheel", "tags", "--remove", "--platform-tag", platform, wheel)
        wheel = wheels / run(source.python, *tags).splitlines()[-1]
    found = CHECK["check"](wheel)

    checked = WORK / "checked-venv"
    if not (checked / "done").exists():
        constraints = ("-c", str(ROOT / "constraints.txt"))
        environment(checked, [*constraints, "torch", "triton", "transformers", "numpy"])
        (checked / "done").touch()
    python = checked / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    about = run(python, "-m", "hivtp_kernels", cwd=folder, env=env)
    known = f"LABEL, VERSION, ROOT = {label!r}, {name!r}, {str(ROOT / 'hivtp_kernels')!r}"
    run(python, "-c", known + SMOKE, cwd=folder, env=env)
    run(python, "-m", "pip", "uninstall", "--quiet", "-y", "hivtp_kernels")
    claimed = re.findall(r"(?:sm|compute)_\d+", about)
    if set(claimed) != set(found):
        raise SystemExit(f"{wheel.name} claims {claimed}, but its image has {found}")
    row = {
        "wheel": wheel.name,
        "size": f"{wheel.stat().st_size / 1e6:.1f} MB",
        "build": f"{seconds:.0f} s",
        "architectures": " ".join(found) or "-",
        "glibc": glibc,
        "checks": "listing, NEEDED, image, auditwheel, install, import, CPU",
        "source": source.digest,
    }
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(wheel, out)
    done.write_text(json.dumps(row))
    step()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", nargs="+", help="CUDA versions like 12.8, cpu, none")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    check_asked(options.wheels, known_versions())
    WORK.mkdir(parents=True, exist_ok=True)
    source = Source()
    rows = []
    with tqdm(total=STEPS * len(options.wheels), unit="step") as bar:
        for name in options.wheels:
            bar.set_description(name)
            rows.append(build(name, source, options.out, bar.update))
    cells = [COLUMNS, *([row[column] for column in COLUMNS] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
