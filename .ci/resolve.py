"""Whether every install resolves on an ordinary machine: PyPI alone, for each supported Python.

    resolve.py UV [CONSTRAINTS]

Each extra of `pyproject.toml` is resolved with the constraints, as the README's two commands are,
and all of them without, as a user's own `pip install`; from metadata, so that nothing is downloaded
that is large. What this machine adds (local wheels, pip's and uv's settings) is kept out.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
SHOWN = ("torch", "triton", "transformers", "numpy")
# What tests/plugins/lmms_eval/run adds to the constraints.
MORE = {"lmms-eval": [ROOT / "tests" / "plugins" / "lmms_eval" / "constraints.txt"]}


def resolve(uv: str, python: str, extra: str, constraints: list[Path]) -> tuple[bool, str]:
    """Whether it resolves, and to what, or why not."""
    command = [uv, "pip", "compile", "--no-config", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--extra", extra, *(word for path in constraints for word in ("-c", path))]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [*command, ROOT / "pyproject.toml"],
            env=kept | {"HOME": home, "XDG_CONFIG_DIRS": home, "UV_CACHE_DIR": CACHE},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        return False, done.stderr.strip()
    pins = dict(line.split("==", 1) for line in done.stdout.splitlines() if "==" in line)
    return True, ", ".join(f"{name} {pins[name].split()[0]}" for name in SHOWN if name in pins)


def main(uv: str, constraints: Path) -> int:
    """Resolve all of them; the exit status says whether all do."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = list(project["optional-dependencies"])
    constrained = [(extra, [constraints, *MORE.get(extra, [])]) for extra in extras]
    asked = list(product(PYTHONS, [*constrained, *((extra, []) for extra in extras)]))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda a: resolve(uv, a[0], *a[1]), asked))
    for (python, (extra, limits)), (fine, text) in zip(asked, results, strict=True):
        how = "constrained" if limits else "free"
        print(f"{'ok' if fine else 'NO'}  Python {python}  {extra:10}{how:12}{text}")
    return 0 if all(fine for fine, _ in results) else 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as CACHE:
        sys.exit(main(sys.argv[1], Path(*sys.argv[2:3] or [ROOT / "constraints.txt"])))
