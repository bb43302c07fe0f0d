// A CUDA driver that only records how it is called. Tests set its answers. It has one current
// context for all threads.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3 };

int fake_initialized = 1, fake_device = 0, fake_capability = 80;
void* fake_context = (void*)0x100;
void* fake_stream_context = (void*)0x100;
const char* fake_failing = "";  // the call that fails
char fake_log[1 << 16];

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define NOTE(...)                                                   \
  do {                                                              \
    pthread_mutex_lock(&mutex);                                     \
    const size_t used = strlen(fake_log);                           \
    snprintf(fake_log + used, sizeof fake_log - used, __VA_ARGS__); \
    pthread_mutex_unlock(&mutex);                                   \
    if (!strcmp(fake_failing, __func__)) return INVALID_VALUE;      \
  } while (0)

int cuGetErrorString(int error, const char** text) {
  *text = error == INVALID_VALUE ? "invalid argument" : NULL;
  return *text ? SUCCESS : INVALID_VALUE;
}

int cuCtxGetCurrent(void** context) {
  if (!fake_initialized) return NOT_INITIALIZED;
  *context = fake_context;
  return SUCCESS;
}

int cuCtxSetCurrent(void* context) {
  NOTE("current %p\n", context);
  fake_context = context;
  return SUCCESS;
}

int cuCtxGetDevice(int* device) {
  NOTE("");
  *device = fake_device;
  return SUCCESS;
}

int cuDeviceGet(int* device, int number) {
  NOTE("");
  *device = number;
  return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  NOTE("retain %d\n", device);
  fake_device = device;
  *context = (void*)0x100;
  return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != fake_device || (attribute != 75 && attribute != 76)) return INVALID_VALUE;
  *value = attribute == 75 ? fake_capability / 10 : fake_capability % 10;
  return SUCCESS;
}

int cuStreamGetCtx(void* stream, void** context) {
  NOTE("stream %p\n", stream);
  *context = fake_stream_context;
  return SUCCESS;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  static __thread int current = 0;
  const int before = current;
  current = *mode;
  *mode = before;
  NOTE("capture mode %d\n", current);
  return SUCCESS;
}

int cuLibraryLoadData(void** library, const void* image, int* options, void** values,
                      unsigned count, int* library_options, void** library_values,
                      unsigned library_count) {
  NOTE("load %.10s\n", (const char*)image);
  if (options || values || count || library_options || library_values || library_count) {
    return INVALID_VALUE;
  }
  *library = (void*)0x200;
  return SUCCESS;
}

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  NOTE("find %s in %p\n", name, library);
  *kernel = (void*)(uintptr_t)name[0];
  return SUCCESS;
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  NOTE("attribute %d = %d of %c on %d\n", attribute, value, (char)(uintptr_t)kernel, device);
  return SUCCESS;
}

int cuLaunchKernel(void* kernel, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                   unsigned threads_y, unsigned threads_z, unsigned shared, void* stream,
                   void** arguments, void** extra) {
  NOTE("launch %c %u,%u,%u %u,%u,%u %u %p: %d\n", (char)(uintptr_t)kernel, x, y, z, threads_x,
       threads_y, threads_z, shared, stream, *(int*)arguments[0]);
  return extra ? INVALID_VALUE : SUCCESS;
}

int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void* stream) {
  NOTE("memset %#llx %d %zu %p\n", (unsigned long long)address, value, bytes, stream);
  return SUCCESS;
}
