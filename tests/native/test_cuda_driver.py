"""csrc/cuda/driver.cpp over a driver that only records how it is called."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "cuda_driver" / "libcuda.c"

pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").exists(), reason="tests next to an installed wheel"
)

# driver.h, as ctypes can call it.
ENTRIES = """
#include "driver.h"
extern "C" {
int check_stream(int device, void* stream) { return hivtp::check_stream(device, stream); }
int launch(const char* kernel, unsigned shared, int argument, void* stream) {
  void* arguments[] = {&argument};
  return hivtp::launch({kernel, {2, 3, 4}, 128, shared}, arguments, stream);
}
int zero(void* data, size_t bytes, void* stream) { return hivtp::zero(data, bytes, stream); }
}
"""

START = """
import ctypes
driver = ctypes.CDLL({driver!r})
driver.hivtp_cuda_target.restype = driver.hivtp_cuda_detail.restype = ctypes.c_char_p
target = driver.hivtp_cuda_target().decode()
detail = lambda: driver.hivtp_cuda_detail().decode()
stream = lambda address: ctypes.c_void_p(address)
OK, NO_DRIVER, BAD_CONTEXT, FOREIGN_STREAM, FOREIGN_DEVICE, DRIVER_ERROR = 0, 12, 13, 14, 15, 16
BUILT = "; these kernels were built by " + target
"""

WITH_FAKE = """
fake = ctypes.CDLL("libcuda.so.1")
def set_to(name, value, type=ctypes.c_int):
    type.in_dll(fake, "fake_" + name).value = value
def log():
    buffer = (ctypes.c_char * (1 << 16)).in_dll(fake, "fake_log")
    text, buffer.value = buffer.value.decode(), b""
    return text.splitlines()
"""


def compile_library(compiler, out, *arguments):
    subprocess.run([compiler, "-shared", "-fPIC", "-o", out, *arguments], check=True)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_driver")
    compile_library("cc", folder / "libcuda.so.1", FAKE, "-pthread")
    (folder / "image.fatbin").write_bytes(b"fake image" + bytes(6))
    (folder / "image.h").write_text(
        f'#define HIVTP_IMAGE "{folder / "image.fatbin"}"\n'
        '#define HIVTP_CUDA_VERSION "12.8"\n'
        "#define HIVTP_CUBINS 75, 80, 86\n"
        "#define HIVTP_PTX 90\n"
    )
    (folder / "entries.cpp").write_text(ENTRIES)
    sources = [ROOT / "csrc" / "cuda" / "driver.cpp", folder / "entries.cpp"]
    includes = [f"-I{d}" for d in (folder, ROOT / "csrc" / "include", ROOT / "csrc" / "cuda")]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", "-ldl"]
    compile_library("c++", folder / "driver.so", *sources, *includes, *flags)
    return folder


@pytest.fixture
def run(libraries):
    """Run a script in a new process, over the fake driver or one in another folder."""

    def run(script, driver=None):
        start = START.format(driver=str(libraries / "driver.so"))
        start += WITH_FAKE if driver is None else ""
        result = subprocess.run(
            [sys.executable, "-c", start + textwrap.dedent(script)],
            env=os.environ | {"LD_LIBRARY_PATH": str(driver or libraries)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr

    return run


def test_target_and_supported_devices(run):
    run("""
    assert target == "CUDA 12.8 for sm_75, sm_80, sm_86 and compute_90"
    # 72, 87 and 88 are Tegra, which needs its own machine code; from 90 on there is PTX.
    devices = (70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 101, 110, 120)
    runs = [n for n in devices if driver.hivtp_cuda_runs_on(n // 10, n % 10)]
    assert runs == [75, 80, 86, 89, 90, 100, 101, 110, 120], runs
    """)


def test_no_driver(run, tmp_path):
    # A file that cannot be loaded comes first in the search path, before any real driver.
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    run(
        """
        assert driver.check_stream(0, None) == NO_DRIVER
        assert "libcuda.so.1: file too short" in detail(), detail()
        assert detail().endswith(BUILT), detail()
        """,
        driver=tmp_path,
    )


def test_an_old_driver(run, tmp_path):
    old = FAKE.read_text().replace("cuLibraryLoadData", "cuModuleLoadData")
    (tmp_path / "old.c").write_text(old)
    compile_library("cc", tmp_path / "libcuda.so.1", tmp_path / "old.c", "-pthread")
    run(
        """
        assert driver.check_stream(0, None) == NO_DRIVER
        lacks = "libcuda.so.1 lacks cuLibraryLoadData, which drivers have since CUDA 12.0"
        assert detail() == lacks + BUILT, detail()
        """,
        driver=tmp_path,
    )


def test_before_anything_used_cuda(run):
    run("""
    set_to("initialized", 0)
    assert driver.check_stream(0, None) == BAD_CONTEXT
    assert detail() == "nothing has used CUDA yet" + BUILT, detail()
    assert log() == []
    """)


def test_a_thread_without_a_context_gets_the_primary_one_retained_once(run):
    run("""
    for number, calls in enumerate((["retain 2", "current 0x100"], ["current 0x100"])):
        set_to("context", None, ctypes.c_void_p)
        assert driver.check_stream(2, None) == OK
        assert log() == calls, (number, calls)
        assert driver.check_stream(2, stream(0x5000)) == OK
        assert log() == ["stream 0x5000"]
    set_to("context", None, ctypes.c_void_p)
    assert driver.check_stream(3, None) == OK
    assert log() == ["retain 3", "current 0x100"]
    """)


def test_a_context_of_another_device(run):
    run("""
    set_to("device", 1)
    assert driver.check_stream(0, None) == BAD_CONTEXT
    assert detail() == "it belongs to device 1, not device 0" + BUILT, detail()
    assert driver.check_stream(1, None) == OK
    """)


def test_streams(run):
    run("""
    for default in (None, 1, 2):
        assert driver.check_stream(0, stream(default)) == OK
    assert log() == []
    assert driver.check_stream(0, stream(0x5000)) == OK
    assert log() == ["stream 0x5000"]
    set_to("stream_context", 0x101, ctypes.c_void_p)
    assert driver.check_stream(0, stream(0x5000)) == FOREIGN_STREAM
    assert detail() == "it belongs to another context or device" + BUILT
    """)


def test_a_device_without_code_in_the_image(run):
    run("""
    set_to("device", 3)
    for capability, status in ((87, FOREIGN_DEVICE), (70, FOREIGN_DEVICE), (75, OK), (89, OK)):
        set_to("capability", capability)
        assert driver.check_stream(3, None) == status, capability
        if capability == 70:
            assert detail() == "device 3 is sm_70" + BUILT
    """)


def test_launch(run):
    run("""
    found = ["load fake image", "find kernel in 0x200"]
    for argument in (7, 8):
        assert driver.launch(b"kernel", 1024, argument, stream(0x5000)) == OK
        launch = f"launch k 2,3,4 128,1,1 1024 0x5000: {argument}"
        assert log() == ["capture mode 2", *found, launch, "capture mode 0"]
        found = []
    """)


def test_loaded_once_for_all_contexts_and_threads(run):
    run("""
    import threading
    def work():
        for kernel in (b"a", b"b") * 50:
            assert driver.check_stream(0, None) == driver.launch(kernel, 0, 0, None) == OK
    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    set_to("context", 0x300, ctypes.c_void_p)
    [t.join() for t in threads]
    lines = log()
    assert sum(line.startswith("load") for line in lines) == 1
    assert sum(line.startswith("find") for line in lines) == 2
    """)


def test_the_limit_of_shared_memory_is_raised_once_and_never_lowered(run):
    run("""
    for shared in (48 << 10, 50000, 90000, 50000, 90000):
        assert driver.launch(b"kernel", shared, 0, None) == OK
    set_to("device", 1)
    assert driver.launch(b"kernel", 50000, 0, None) == OK
    assert driver.launch(b"other", 50000, 0, None) == OK
    assert [line for line in log() if line.startswith("attribute")] == [
        "attribute 8 = 50000 of k on 0",
        "attribute 8 = 90000 of k on 0",
        "attribute 8 = 50000 of k on 1",
        "attribute 8 = 50000 of o on 1",
    ]
    """)


def test_zero(run):
    run("""
    assert driver.zero(ctypes.c_void_p(0x7000), ctypes.c_size_t(12), stream(0x5000)) == OK
    assert log() == ["memset 0x7000 0 12 0x5000"]
    """)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("cuCtxSetCurrent", "cuCtxSetCurrent"),
        ("cuCtxGetDevice", "cuCtxGetDevice"),
        ("cuDeviceGet", "finding device 0"),
        ("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRetain"),
        ("cuStreamGetCtx", "cuStreamGetCtx"),
        ("cuLibraryLoadData", "loading the kernels"),
        ("cuLibraryGetKernel", "finding kernel"),
        ("cuKernelSetAttribute", "50000 bytes of shared memory for kernel"),
        ("cuLaunchKernel", "launching kernel"),
        ("cuMemsetD8Async", "cuMemsetD8Async"),
    ],
)
def test_driver_errors_and_the_next_try(call, text, run):
    run(f"""
    def work():
        return (
            driver.check_stream(0, stream(0x5000))
            or driver.launch(b"kernel", 50000, 0, None)
            or driver.zero(ctypes.c_void_p(0x7000), ctypes.c_size_t(4), None)
        )
    set_to("context", None, ctypes.c_void_p)
    set_to("failing", b"{call}", ctypes.c_char_p)
    assert work() == DRIVER_ERROR
    assert detail() == "{text}: invalid argument (1)" + BUILT, detail()
    set_to("failing", b"", ctypes.c_char_p)
    assert work() == OK
    modes = [line for line in log() if line.startswith("capture")]
    assert modes[-1] == "capture mode 0", modes
    """)
