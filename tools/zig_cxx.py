"""Use zig as a C++ compiler for glibc 2.28 and later: `CXX="python tools/zig_cxx.py"`.

zig, on PyPI as `ziglang`, links against any glibc and ships a static C++ library. It has its own
names for the levels of x86-64, and no --exclude-libs: its library's symbols are hidden already. It
takes minutes to recompile that library for new options, so CMake's checks and the build share one
set of options.
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
