// The kernels, compiled for the emulator, by name.
#include "emulator.h"

#include <cstring>
#include <utility>

#include "cuda/kernels/gather.cu"
#include "cuda/kernels/score.cu"
#include "cuda/kernels/select.cu"

namespace emulator {
namespace {

// `arguments` points to each parameter, as for the driver.
template <class... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<Parameters*>(arguments[I])...);
}

template <class... Parameters>
void call(void (*kernel)(Parameters...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

struct Named {
  const char* name;
  Kernel kernel;
};

#define HIVTP_NAMED(kernel) {#kernel, [](void** arguments) { call(kernel, arguments); }}

constexpr Named kKernels[] = {
    HIVTP_NAMED(hivtp_gather),      HIVTP_NAMED(hivtp_pack),        HIVTP_NAMED(hivtp_select),
    HIVTP_NAMED(hivtp_cls_f32),     HIVTP_NAMED(hivtp_cls_f16),     HIVTP_NAMED(hivtp_cls_bf16),
    HIVTP_NAMED(hivtp_lse_f32),     HIVTP_NAMED(hivtp_lse_f16),     HIVTP_NAMED(hivtp_lse_bf16),
    HIVTP_NAMED(hivtp_columns_f32), HIVTP_NAMED(hivtp_columns_f16), HIVTP_NAMED(hivtp_columns_bf16),
};

}  // namespace

Kernel find(const char* name) {
  for (const Named& known : kKernels) {
    if (!std::strcmp(known.name, name)) return known.kernel;
  }
  return nullptr;
}

}  // namespace emulator
