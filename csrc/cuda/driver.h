// What launch.cpp needs from the CUDA driver. driver.cpp finds the real one at run time.
#ifndef HIVTP_CUDA_DRIVER_H_
#define HIVTP_CUDA_DRIVER_H_

#include <cstddef>
#include <cstdint>

#include "hivtp/api.h"

namespace hivtp {

struct Launch {
  const char* kernel;  // its extern "C" name
  uint32_t grid[3];
  uint32_t threads;       // per block; blocks have one dimension
  uint32_t shared_bytes;  // dynamic shared memory
};

// Checks that there is a driver, a device of that number that the image has code for, a current
// context of this device (made current if the thread has none), and a stream of this context.
// Called once per op, before anything is queued.
HivtpStatus check_stream(int32_t device, void* stream);

// Queues the kernel. `arguments` points to each of its parameters.
HivtpStatus launch(const Launch& launch, void** arguments, void* stream);

// Queues the zeroing of `bytes` of device memory.
HivtpStatus zero(void* data, size_t bytes, void* stream);

}  // namespace hivtp

#endif  // HIVTP_CUDA_DRIVER_H_
