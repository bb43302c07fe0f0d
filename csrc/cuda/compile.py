"""Compile the kernels into one fatbin: `compile.py OUT VERSION ARCHITECTURES`; CMake calls this.

With `nvcc` if it is on the PATH, else with NVRTC and nvFatbin from PyPI; needs no GPU or driver.
Writes `image.fatbin` and `image.h`. VERSION is like 13.0, or empty for any; ARCHITECTURES are like
"8.0 9.0+PTX", or empty for all.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
INCLUDES = (ROOT / "include", ROOT / "cuda" / "kernels")
# The default: those that the compiler knows, and PTX of the newest for future devices.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


class Nvcc:
    def __init__(self, path: str) -> None:
        self.path = path
        text = subprocess.run([path, "--version"], check=True, capture_output=True, text=True)
        release = re.search(r"release (\d+\.\d+)", text.stdout)
        if release is None:
            raise SystemExit(f"{path} --version does not print a release")
        self.version = release[1]

    def __str__(self) -> str:
        return f"{self.path} {self.version}"

    def known(self) -> set[int]:
        command = [self.path, "--list-gpu-code"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {int(number) for number in re.findall(r"sm_(\d+)$", text, re.MULTILINE)}

    def fatbin(self, source: str, cubins: list[int], ptx: list[int], out: Path) -> bytes:
        (out / "image.cu").write_text(source)
        targets = [(a, f"sm_{a}") for a in cubins] + [(a, f"compute_{a}") for a in ptx]
        command = [
            self.path, "-fatbin", str(out / "image.cu"), "-o", str(out / "nvcc.fatbin"),
            "-std=c++17", "-Werror=all-warnings", "-Xfatbin", "-compress-all", "--threads=0",
            *(f"-I{folder}" for folder in INCLUDES),
            *(f"-gencode=arch=compute_{a},code={code}" for a, code in targets),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return (out / "nvcc.fatbin").read_bytes()


class Nvrtc:
    def __init__(self, nvrtc: Path, nvfatbin: Path) -> None:
        self.path = nvrtc
        # NVRTC looks for these by name, and finds them if they are loaded.
        for builtins in nvrtc.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
        self.nvrtc, self.nvfatbin = ctypes.CDLL(str(nvrtc)), ctypes.CDLL(str(nvfatbin))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call_nvrtc("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def __str__(self) -> str:
        return f"{self.path} {self.version}"

    def known(self) -> set[int]:
        count = ctypes.c_int()
        self._call_nvrtc("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call_nvrtc("nvrtcGetSupportedArchs", numbers)
        return set(numbers)

    def fatbin(self, source: str, cubins: list[int], ptx: list[int], _: Path) -> bytes:
        targets = [("CUBIN", f"sm_{a}", a) for a in cubins]
        targets += [("PTX", f"compute_{a}", a) for a in ptx]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            codes = list(pool.map(lambda t: self._compile(source, t[0], t[1]), targets))
        options = (ctypes.c_char_p * 1)(b"-compress-all")
        handle = ctypes.c_void_p()
        self._call_nvfatbin("nvFatbinCreate", ctypes.byref(handle), options, ctypes.c_size_t(1))
        for (kind, name, architecture), code in zip(targets, codes, strict=True):
            add = [handle, code, ctypes.c_size_t(len(code)), b"%d" % architecture, name.encode()]
            if kind == "CUBIN":
                self._call_nvfatbin("nvFatbinAddCubin", *add)
            else:
                self._call_nvfatbin("nvFatbinAddPTX", *add, b"")
        size = ctypes.c_size_t()
        self._call_nvfatbin("nvFatbinSize", handle, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        self._call_nvfatbin("nvFatbinGet", handle, image)
        self._call_nvfatbin("nvFatbinDestroy", ctypes.byref(handle))
        return image.raw

    def _compile(self, source: str, kind: str, target: str) -> bytes:
        program = ctypes.c_void_p()
        text = source.encode()
        self._call_nvrtc(
            "nvrtcCreateProgram", ctypes.byref(program), text, b"image.cu", 0, None, None
        )
        options = [f"-arch={target}", "-std=c++17", *(f"-I{folder}" for folder in INCLUDES)]
        encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        result = self.nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        log = self._read("nvrtcGetProgramLog", program).rstrip(b"\0").decode().strip()
        if result or log:
            raise SystemExit(f"NVRTC {self.version} for {target}:\n{log}")
        code = self._read(f"nvrtcGet{kind}", program)
        self._call_nvrtc("nvrtcDestroyProgram", ctypes.byref(program))
        return code

    def _read(self, name: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call_nvrtc(f"{name}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call_nvrtc(name, program, text)
        return text.raw

    def _call_nvrtc(self, name: str, *arguments: object) -> None:
        _check(self.nvrtc, name, self.nvrtc.nvrtcGetErrorString, arguments)

    def _call_nvfatbin(self, name: str, *arguments: object) -> None:
        _check(self.nvfatbin, name, self.nvfatbin.nvFatbinGetErrorString, arguments)


def _check(
    library: ctypes.CDLL, name: str, text: Callable[[int], bytes], arguments: tuple[object, ...]
) -> None:
    result = getattr(library, name)(*arguments)
    if result:
        text.restype = ctypes.c_char_p  # type: ignore[attr-defined]
        raise SystemExit(f"{name}: {text(result).decode()}")


def _compilers() -> Iterator[Nvcc | Nvrtc]:
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Nvcc(nvcc)
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for nvfatbin in sorted(Path(folder).glob("*/lib/libnvfatbin.so.*")):
            major = nvfatbin.suffix
            yield from (Nvrtc(p, nvfatbin) for p in Path(folder).glob(f"*/lib/libnvrtc.so{major}"))


def find_compiler(version: str) -> Nvcc | Nvrtc | None:
    """The first device compiler of that CUDA version, like 13.0, or of any version if empty."""
    return next((c for c in _compilers() if version in ("", c.version)), None)


def no_compiler(version: str) -> SystemExit:
    found = ", ".join(map(str, _compilers())) or "none"
    return SystemExit(
        f"There is no device compiler{f' of CUDA {version}' if version else ''} (found: {found}). "
        "Put nvcc on the PATH, or set HIVTP_CUDA_VERSION to compile with NVRTC and nvFatbin from "
        "PyPI, which isolated builds install."
    )


def requirements(version: str) -> list[str]:
    """The PyPI packages of a device compiler for that CUDA version."""
    if not re.fullmatch(r"\d+\.\d+", version):
        raise SystemExit(f"HIVTP_CUDA_VERSION must be like 12.8 or 13.0, got {version!r}")
    suffix = "-cu12" if version.startswith("12.") else ""
    return [f"nvidia-{name}{suffix}=={version}.*" for name in ("cuda-nvrtc", "nvfatbin")]


def architectures(asked: str, known: set[int]) -> tuple[list[int], list[int]]:
    """The architectures to compile to machine code, and those to compile to PTX."""
    cubins = [a for a in ARCHITECTURES if a in known]
    ptx = cubins[-1:]
    items = [item for item in re.split(r"[;,\s]+", asked) if item]
    if not items:
        return cubins, ptx
    legal = {f"{a // 10}.{a % 10}": a for a in sorted(known) if a >= ARCHITECTURES[0]}
    wrong = [item for item in items if item.removesuffix("+PTX") not in legal]
    if wrong:
        raise SystemExit(
            "HIVTP_CUDA_ARCHS (or, without it, TORCH_CUDA_ARCH_LIST) must list some of "
            f"{' '.join(legal)}, each with or without +PTX, got {' '.join(wrong)}"
        )
    cubins = sorted({legal[item.removesuffix("+PTX")] for item in items})
    ptx = sorted({legal[item.removesuffix("+PTX")] for item in items if item.endswith("+PTX")})
    return cubins, ptx


def main(out: Path, version: str, asked: str) -> None:
    compiler = find_compiler(version)
    if compiler is None:
        raise no_compiler(version)
    cubins, ptx = architectures(asked, compiler.known())
    names = sorted(path.name for path in (ROOT / "cuda" / "kernels").glob("*.cu"))
    source = "".join(f'#include "{name}"\n' for name in names)
    out.mkdir(parents=True, exist_ok=True)
    image = compiler.fatbin(source, cubins, ptx, out)
    (out / "image.fatbin").write_bytes(image)
    (out / "image.h").write_text(
        f'#define HIVTP_IMAGE "{out.resolve() / "image.fatbin"}"\n'
        f'#define HIVTP_CUDA_VERSION "{compiler.version}"\n'
        f"#define HIVTP_CUBINS {', '.join(map(str, cubins))}\n"
        f"#define HIVTP_PTX {', '.join(map(str, ptx))}\n"
    )
    print(f"{compiler}: {len(image) / 1024:.0f} KiB, sm {cubins}, PTX {ptx}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
