"""Check what wheels hold: `check_wheels.py WHEEL ...`. A pure wheel holds no extension."""

import io
import re
import struct
import sys
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).parents[1]
SOURCES = {
    f"{path.relative_to(root)}"
    for root in (ROOT, ROOT / "python")
    for package in root.glob("hivtp_*")
    for path in package.rglob("*.py")
}
LIBRARIES = ("libc.so", "libm.so", "libpthread.so", "libdl.so", "ld-linux")


def needed(library: bytes) -> set[str]:
    """The NEEDED entries of an ELF file."""
    dynamic = ELFFile(io.BytesIO(library)).get_section_by_name(".dynamic")
    return {tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}


def architectures(library: bytes) -> list[str]:
    """What the fatbin in it holds, by the headers of its entries: "sm_80", "compute_90"."""
    begin = library.find(struct.pack("<IHH", 0xBA55ED50, 1, 16))
    if begin < 0:
        return []
    (size,) = struct.unpack_from("<Q", library, begin + 8)
    entry, end, found = begin + 16, begin + 16 + size, []
    while entry < end:
        kind, _, header, payload = struct.unpack_from("<HHIQ", library, entry)
        (architecture,) = struct.unpack_from("<I", library, entry + 28)
        found.append(f"{ {1: 'compute', 2: 'sm'}[kind] }_{architecture}")
        entry += header + payload
    return found


def check(wheel: Path) -> list[str]:
    """Returns what its device code is for."""
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    missing = SOURCES - names
    extensions = [name for name in names if name.endswith(".so")]
    pure = wheel.name.endswith("-none-any.whl")
    assert SOURCES and not missing, f"{wheel.name} lacks {sorted(missing)}"
    assert len(extensions) == (0 if pure else 1), f"{wheel.name} holds {extensions}"
    label = re.search(r"\+(cpu|cu\d+)-", wheel.name)
    assert pure or label, f"{wheel.name} has no label of its build"
    stray = [
        n
        for n in names
        if n.split("/")[0] in ("tests", "csrc", "build", "tools", "bench", "examples", "docs")
    ]
    assert not stray, f"{wheel.name} holds {stray}"
    most = 10 << 20 if label and label[1] != "cpu" else 600_000
    assert wheel.stat().st_size < most, f"{wheel.name} has {wheel.stat().st_size} bytes"
    found = []
    if label:
        library = archive.read(extensions[0])
        others = [name for name in needed(library) if not name.startswith(LIBRARIES)]
        assert not others, f"{wheel.name} needs {others}"
        found = architectures(library)
        assert bool(found) == label[1].startswith("cu"), f"{wheel.name} has code for {found}"
    return found


if __name__ == "__main__":
    for wheel in map(Path, sys.argv[1:]):
        found = " ".join(check(wheel)) or "no device code"
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, {found}")
