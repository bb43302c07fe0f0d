// The CUDA driver, found at run time, and the image of the kernels, embedded in _C.
//
// The library is loaded once per process, for any number of contexts: the driver loads it into each
// context that launches one of its kernels (cuLibraryLoadData, since CUDA 12.0).
#include "driver.h"

#include <dlfcn.h>

#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <utility>

// Defines HIVTP_IMAGE, the path of the image, HIVTP_CUDA_VERSION, and the architectures
// HIVTP_CUBINS and HIVTP_PTX.
#include "image.h"

asm(".pushsection .rodata\n"
    ".balign 16\n"
    "hivtp_image: .incbin \"" HIVTP_IMAGE
    "\"\n"
    ".popsection\n");
extern "C" const char hivtp_image[] __attribute__((visibility("hidden")));

namespace hivtp {
namespace {

constexpr std::initializer_list<int> kCubins = {HIVTP_CUBINS};
constexpr std::initializer_list<int> kPtx = {HIVTP_PTX};

// The part of cuda.h that is used here.
using Context = struct CUctx_st*;
using Device = int;
using Stream = struct CUstream_st*;
using Library = struct CUlib_st*;
using Kernel = struct CUkern_st*;
constexpr int kSuccess = 0, kNotInitialized = 3;
constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // device attributes
constexpr int kMaxDynamicSharedBytes = 8;                                  // a kernel's attribute
constexpr int kCaptureRelaxed = 2;
constexpr uint32_t kSharedBytesForAll = 48 * 1024;  // a kernel must opt in to more

thread_local std::string last_detail;

HivtpStatus fail(HivtpStatus status, const std::string& detail) {
  last_detail = detail + "; these kernels were built by " + hivtp_cuda_target();
  return status;
}

struct Driver {
  void* handle;
  std::string missing;  // why the driver cannot be used
  int (*get_error_string)(int, const char**);
  int (*context_get_current)(Context*);
  int (*context_set_current)(Context);
  int (*context_get_device)(Device*);
  int (*device_get)(Device*, int);
  int (*device_get_attribute)(int*, int, Device);
  int (*primary_context_retain)(Context*, Device);
  int (*stream_get_context)(Stream, Context*);
  int (*exchange_capture_mode)(int*);
  int (*library_load)(Library*, const void*, int*, void**, unsigned, int*, void**, unsigned);
  int (*library_get_kernel)(Kernel*, Library, const char*);
  int (*kernel_set_attribute)(int, int, Kernel, Device);
  int (*launch_kernel)(Kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                       Stream, void**, void**);
  int (*memset_async)(uint64_t, unsigned char, size_t, Stream);

  Driver() : handle(dlopen("libcuda.so.1", RTLD_NOW)) {
    if (!handle) {
      missing = dlerror();
      return;
    }
    find(get_error_string, "cuGetErrorString");
    find(context_get_current, "cuCtxGetCurrent");
    find(context_set_current, "cuCtxSetCurrent");
    find(context_get_device, "cuCtxGetDevice");
    find(device_get, "cuDeviceGet");
    find(device_get_attribute, "cuDeviceGetAttribute");
    find(primary_context_retain, "cuDevicePrimaryCtxRetain");
    find(stream_get_context, "cuStreamGetCtx");
    find(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
    find(library_load, "cuLibraryLoadData");
    find(library_get_kernel, "cuLibraryGetKernel");
    find(kernel_set_attribute, "cuKernelSetAttribute");
    find(launch_kernel, "cuLaunchKernel");
    find(memset_async, "cuMemsetD8Async");
  }

  template <class Function>
  void find(Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (!function && missing.empty()) {
      missing = std::string("libcuda.so.1 lacks ") + name + ", which drivers have since CUDA 12.0";
    }
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

HivtpStatus check(int result, const std::string& call) {
  if (result == kSuccess) return HIVTP_OK;
  const char* text = nullptr;
  driver().get_error_string(result, &text);
  return fail(HIVTP_DRIVER_ERROR,
              call + ": " + (text ? text : "unknown error") + " (" + std::to_string(result) + ")");
}

// A thread may not load a library while any stream is being captured, except in relaxed mode.
class Relaxed {
 public:
  Relaxed() { driver().exchange_capture_mode(&mode_); }
  ~Relaxed() { driver().exchange_capture_mode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  int mode_ = kCaptureRelaxed;  // then the previous mode
};

// The image's kernels by name. A failure is not remembered: the next call tries again.
class Image {
 public:
  HivtpStatus find(const char* name, Kernel& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!library_) {
      const int result =
          driver().library_load(&library_, hivtp_image, nullptr, nullptr, 0, nullptr, nullptr, 0);
      if (const HivtpStatus status = check(result, "loading the kernels")) return status;
    }
    Kernel& known = kernels_[name];
    if (!known) {
      const int result = driver().library_get_kernel(&known, library_, name);
      if (const HivtpStatus status = check(result, std::string("finding ") + name)) return status;
    }
    kernel = known;
    return HIVTP_OK;
  }

  // Allows a kernel this much shared memory on the current device. The limit never decreases, as
  // another thread may be about to launch the kernel with more.
  HivtpStatus allow(Kernel kernel, const char* name, uint32_t bytes) {
    if (bytes <= kSharedBytesForAll) return HIVTP_OK;
    Device device = 0;
    int result = driver().context_get_device(&device);
    if (const HivtpStatus status = check(result, "cuCtxGetDevice")) return status;
    const std::lock_guard<std::mutex> lock(mutex_);
    uint32_t& allowed = allowed_[{kernel, device}];
    if (bytes <= allowed) return HIVTP_OK;
    result = driver().kernel_set_attribute(kMaxDynamicSharedBytes, int(bytes), kernel, device);
    const std::string call = std::to_string(bytes) + " bytes of shared memory for " + name;
    if (const HivtpStatus status = check(result, call)) return status;
    allowed = bytes;
    return HIVTP_OK;
  }

 private:
  std::mutex mutex_;
  Library library_ = nullptr;
  std::map<std::string, Kernel, std::less<>> kernels_;
  std::map<std::pair<Kernel, Device>, uint32_t> allowed_;
};

Image& image() {
  // Never destroyed: the driver may be unloaded first when the process ends.
  static Image& loaded = *new Image;
  return loaded;
}

// "sm_75, sm_80 and compute_80"
std::string architectures() {
  std::string text;
  size_t left = kCubins.size() + kPtx.size();
  const auto add = [&](const char* kind, int architecture) {
    --left;
    text += kind + std::to_string(architecture) + (left > 1 ? ", " : left == 1 ? " and " : "");
  };
  for (const int architecture : kCubins) add("sm_", architecture);
  for (const int architecture : kPtx) add("compute_", architecture);
  return text;
}

// Xavier, Orin and its successor, Thor as CUDA 12 and as CUDA 13 name it.
bool is_tegra(int architecture) {
  return architecture == 72 || architecture == 87 || architecture == 88 || architecture == 101 ||
         architecture == 110;
}

// The default streams, null, 1 and 2, belong to whatever context is current.
bool is_default(void* stream) {
  return reinterpret_cast<uintptr_t>(stream) <= 2;
}

// The primary context of a device, which torch uses. Retained once per process and never released.
HivtpStatus primary_context(Device device, Context& context) {
  static std::mutex mutex;
  static std::map<Device, Context>& retained = *new std::map<Device, Context>;
  const std::lock_guard<std::mutex> lock(mutex);
  Context& known = retained[device];
  if (!known) {
    const int result = driver().primary_context_retain(&known, device);
    if (const HivtpStatus status = check(result, "cuDevicePrimaryCtxRetain")) return status;
  }
  context = known;
  return HIVTP_OK;
}

// Finds the current context and checks that it belongs to that device. A thread in which nothing
// has used CUDA has none, even if torch works in it: torch's allocator calls the driver only when
// its cache is empty.
HivtpStatus current_context(int32_t ordinal, Device& device, Context& context) {
  const Driver& cuda = driver();
  int result = cuda.context_get_current(&context);
  if (result == kNotInitialized) return fail(HIVTP_BAD_CONTEXT, "nothing has used CUDA yet");
  if (const HivtpStatus status = check(result, "cuCtxGetCurrent")) return status;
  result = cuda.device_get(&device, ordinal);
  if (result) return check(result, "finding device " + std::to_string(ordinal));
  if (!context) {
    if (const HivtpStatus status = primary_context(device, context)) return status;
    return check(cuda.context_set_current(context), "cuCtxSetCurrent");
  }
  Device current = 0;
  result = cuda.context_get_device(&current);
  if (const HivtpStatus status = check(result, "cuCtxGetDevice")) return status;
  if (current == device) return HIVTP_OK;
  return fail(HIVTP_BAD_CONTEXT, "it belongs to device " + std::to_string(current) +
                                     ", not device " + std::to_string(ordinal));
}

}  // namespace

HivtpStatus check_stream(int32_t ordinal, void* stream) {
  const Driver& cuda = driver();
  if (!cuda.missing.empty()) return fail(HIVTP_NO_DRIVER, cuda.missing);
  Context context = nullptr;
  Device device = 0;
  if (const HivtpStatus status = current_context(ordinal, device, context)) return status;
  int result = 0;
  if (!is_default(stream)) {
    Context owner = nullptr;
    result = cuda.stream_get_context(static_cast<Stream>(stream), &owner);
    if (const HivtpStatus status = check(result, "cuStreamGetCtx")) return status;
    if (owner != context)
      return fail(HIVTP_FOREIGN_STREAM, "it belongs to another context or device");
  }
  int major = 0, minor = 0;
  result = cuda.device_get_attribute(&major, kComputeCapabilityMajor, device);
  if (!result) result = cuda.device_get_attribute(&minor, kComputeCapabilityMinor, device);
  if (const HivtpStatus status = check(result, "asking for the architecture")) return status;
  if (!hivtp_cuda_runs_on(major, minor)) {
    return fail(HIVTP_FOREIGN_DEVICE, "device " + std::to_string(ordinal) + " is sm_" +
                                          std::to_string(10 * major + minor));
  }
  return HIVTP_OK;
}

HivtpStatus launch(const Launch& launch, void** arguments, void* stream) {
  const Relaxed relaxed;
  Kernel kernel = nullptr;
  if (const HivtpStatus status = image().find(launch.kernel, kernel)) return status;
  if (const HivtpStatus status = image().allow(kernel, launch.kernel, launch.shared_bytes)) {
    return status;
  }
  const auto [x, y, z] = launch.grid;
  const int result =
      driver().launch_kernel(kernel, x, y, z, launch.threads, 1, 1, launch.shared_bytes,
                             static_cast<Stream>(stream), arguments, nullptr);
  return check(result, std::string("launching ") + launch.kernel);
}

HivtpStatus zero(void* data, size_t bytes, void* stream) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  return check(driver().memset_async(address, 0, bytes, static_cast<Stream>(stream)),
               "cuMemsetD8Async");
}

}  // namespace hivtp

const char* hivtp_cuda_target(void) {
  static const std::string target = "CUDA " HIVTP_CUDA_VERSION " for " + hivtp::architectures();
  return target.c_str();
}

int32_t hivtp_cuda_runs_on(int32_t major, int32_t minor) {
  const int device = 10 * major + minor;
  for (const int architecture : hivtp::kCubins) {
    if (architecture == device) return 1;
    // Machine code of a lower minor version runs too, except to or from Tegra: CUDA promises this
    // only among desktop devices.
    const bool tegra = hivtp::is_tegra(architecture) || hivtp::is_tegra(device);
    if (!tegra && architecture / 10 == major && architecture < device) return 1;
  }
  for (const int architecture : hivtp::kPtx) {
    if (architecture <= device) return 1;
  }
  return 0;
}

const char* hivtp_cuda_detail(void) {
  return hivtp::last_detail.c_str();
}
