"""zig as a C++ compiler for glibc 2.28 and later: `CXX="python tools/zig_cxx.py"`.

zig, from PyPI as `ziglang`, links against any glibc and brings a static C++ library. It spells the
levels of x86-64 in its own way, and has no --exclude-libs: the symbols of its library are hidden.
It compiles that library, for minutes, anew for other options: one set of them serves what CMake
tries out and what is built.
"""

import os
import platform
import re
import sys

DROPPED = re.compile(r"-Wl,--exclude-libs,ALL|-flto.*")

arguments = [
    re.sub(r"^-march=x86-64-v(\d)$", r"-march=x86_64_v\1", argument)
    for argument in sys.argv[1:]
    if not DROPPED.fullmatch(argument)
]
target = f"{platform.machine()}-linux-gnu.2.28"
zig = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-O3", "-s"]
os.execv(sys.executable, [*zig, *arguments])
