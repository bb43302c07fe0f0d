"""Check what wheels hold: `check_wheels.py WHEEL ...`. A pure wheel holds no extension."""

import sys
import zipfile
from pathlib import Path

SOURCES = {
    f"{path.relative_to(root)}"
    for root in (Path("."), Path("python"))
    for package in ("hivtp_kernels", "hivtp_llava", "hivtp_lmms_eval")
    for path in (root / package).rglob("*.py")
}

for wheel in map(Path, sys.argv[1:]):
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = SOURCES - names
    extensions = [name for name in names if name.endswith(".so")]
    pure = wheel.name.endswith("-none-any.whl")
    assert not missing, f"{wheel.name} lacks {sorted(missing)}"
    assert len(extensions) == (0 if pure else 1), f"{wheel.name} holds {extensions}"
    assert pure or "+cpu-" in wheel.name, f"{wheel.name} has no label of its build"
    stray = [n for n in names if n.split("/")[0] in ("tests", "csrc", "build")]
    assert not stray, f"{wheel.name} holds {stray}"
    print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, {len(names)} files")
