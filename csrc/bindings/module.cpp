// hivtp_kernels._C: the structs and functions of api.h in Python. Functions take their parameters
// by keyword, pointers as integers, run without the GIL and raise what they return.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "hivtp/api.h"
#include "hivtp/portable.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Pointer = std::uintptr_t;
using View = std::pair<Pointer, std::array<int64_t, 3>>;  // data; strides of batch, head and token
using Pair = std::array<int32_t, 2>;
using Classes = std::array<int32_t, 4>;

// How Python passes a parameter of type T: integers and structs as they are, pointers as integers.
template <class T>
struct Parameter {
  using Type = T;
  static T from(T value) { return value; }
};
template <class T>
struct Parameter<T*> {
  using Type = Pointer;
  static T* from(Pointer address) { return reinterpret_cast<T*>(address); }
};
template <class Struct>
struct StructParameter {
  using Type = const Struct&;
  static const Struct* from(const Struct& value) { return &value; }
};
template <>
struct Parameter<const HivtpAttention*> : StructParameter<HivtpAttention> {};
template <>
struct Parameter<const HivtpSelectParams*> : StructParameter<HivtpSelectParams> {};
template <>
struct Parameter<const HivtpSelection*> : StructParameter<HivtpSelection> {};
template <>
struct Parameter<const HivtpFeatures*> : StructParameter<HivtpFeatures> {};

void checked(const char* function, HivtpStatus status) {
  if (status == HIVTP_OK) return;
  std::string text = std::string(function) + ": " + hivtp_status_text(status);
#ifdef HIVTP_CUDA
  if (status >= HIVTP_NO_DRIVER) text += std::string(": ") + hivtp_cuda_detail();
#endif
  if (status == HIVTP_NULL_POINTER || status == HIVTP_MISALIGNED_WORKSPACE ||
      status >= HIVTP_NO_DRIVER) {
    throw std::runtime_error(text);
  }
  throw std::invalid_argument(text);
}

int64_t checked(const char* function, int64_t bytes) {
  if (bytes >= 0) return bytes;
  throw std::invalid_argument(std::string(function) + ": no workspace for invalid arguments");
}

// Binds a function of api.h; `names` are the keywords of its parameters.
template <class Result, class... T, class... Names>
void bind(py::module_& m, const char* name, Result (*function)(T...), Names... names) {
  const auto call = [name, function](typename Parameter<T>::Type... arguments) {
    Result result;
    {
      py::gil_scoped_release unlocked;
      result = function(Parameter<T>::from(arguments)...);
    }
    return checked(name, result);
  };
  m.def(name, call, py::kw_only(), py::arg(names)...);
}

// Binds a struct of api.h, which Python constructs by keyword and cannot change.
template <class Struct, class... T, class... Names>
void bind_struct(py::module_& m, const char* name, Struct (*make)(T...), Names... names) {
  // Local to the module: the tests load the same bindings for their emulator next to these.
  py::class_<Struct>(m, name, py::module_local())
      .def(py::init(make), py::kw_only(), py::arg(names)...);
}

void set_views(const char* name, HivtpView (&views)[HIVTP_MAX_LAYERS], size_t layers,
               const std::vector<View>& values) {
  if (values.size() != layers || layers > HIVTP_MAX_LAYERS) {
    throw std::invalid_argument(std::string(name) + " must have one view per layer, at most " +
                                HIVTP_STRING(HIVTP_MAX_LAYERS));
  }
  for (size_t layer = 0; layer < layers; ++layer) {
    const auto& [data, strides] = values[layer];
    views[layer] = {reinterpret_cast<const void*>(data), strides[0], strides[1], strides[2]};
  }
}

HivtpAttention make_attention(const std::vector<View>& q, const std::vector<View>& k,
                              const std::vector<View>& lse, int32_t batch, int32_t heads,
                              int32_t tokens, int32_t head_dim, int32_t prefix, int32_t dtype,
                              int32_t rows, float scale) {
  HivtpAttention a{};
  set_views("q", a.q, k.size(), q);
  set_views("k", a.k, k.size(), k);
  if (!lse.empty()) set_views("lse", a.lse, k.size(), lse);
  a.layers = int32_t(k.size());
  a.batch = batch;
  a.heads = heads;
  a.tokens = tokens;
  a.head_dim = head_dim;
  a.prefix = prefix;
  a.dtype = dtype;
  a.rows = rows;
  a.scale = scale;
  return a;
}

HivtpSelectParams make_params(Pair grid, Pair regions, Pair window, Classes base, Classes cut,
                              int32_t capacity, bool fill) {
  HivtpSelectParams params{grid[0],   grid[1], regions[0], regions[1], window[0],
                           window[1], {},      {},         capacity,   fill};
  for (int kind = 0; kind < 4; ++kind) {
    params.quota_base[kind] = base[kind];
    params.quota_cut[kind] = cut[kind];
  }
  return params;
}

HivtpSelection make_selection(Pointer indices, Pointer counts, Pointer stage) {
  return {reinterpret_cast<int32_t*>(indices), reinterpret_cast<int32_t*>(counts),
          reinterpret_cast<int8_t*>(stage)};
}

HivtpFeatures make_features(Pointer data, int64_t image_stride, int64_t row_stride,
                            int64_t row_bytes, int32_t batch, int32_t patches, int32_t prefix) {
  return {reinterpret_cast<const void*>(data),
          image_stride,
          row_stride,
          row_bytes,
          batch,
          patches,
          prefix};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = HIVTP_STRING(HIVTP_VERSION);
  m.attr("variant") = HIVTP_STRING(HIVTP_BUILD);
  m.attr("cpu_target") = hivtp_cpu_target();

  // A test compares these with hivtp_kernels/types.py.
  m.attr("MAX_LAYERS") = HIVTP_MAX_LAYERS;
  m.attr("MAX_TOKENS") = HIVTP_MAX_TOKENS;
  m.attr("MAX_HEAD_DIM") = HIVTP_MAX_HEAD_DIM;
  m.attr("MAX_PATCHES") = HIVTP_MAX_PATCHES;
  m.attr("DTYPES") = py::dict("float32"_a = int(HIVTP_FLOAT32), "float16"_a = int(HIVTP_FLOAT16),
                              "bfloat16"_a = int(HIVTP_BFLOAT16));
  m.attr("ROWS") = py::dict("cls"_a = int(HIVTP_ROWS_CLS), "all"_a = int(HIVTP_ROWS_ALL));
  m.attr("STAGES") = py::dict("PADDING"_a = int(HIVTP_PADDING), "GLOBAL"_a = int(HIVTP_GLOBAL),
                              "LOCAL"_a = int(HIVTP_LOCAL), "FILLED"_a = int(HIVTP_FILLED));

  bind_struct(m, "Attention", make_attention, "q", "k", "lse", "batch", "heads", "tokens",
              "head_dim", "prefix", "dtype", "rows", "scale");
  bind_struct(m, "SelectParams", make_params, "grid", "regions", "window", "quota_base",
              "quota_cut", "capacity", "fill");
  bind_struct(m, "Selection", make_selection, "indices", "counts", "stage");
  bind_struct(m, "Features", make_features, "data", "image_stride", "row_stride", "row_bytes",
              "batch", "patches", "prefix");

  // clang-format off: one line per op
  bind(m, "attention_scores_workspace", hivtp_cpu_scores_workspace_bytes, "attention", "threads");
  bind(m, "select_tokens_workspace", hivtp_cpu_select_workspace_bytes, "params", "threads");
  bind(m, "score_and_select_workspace", hivtp_cpu_score_and_select_workspace_bytes, "attention", "params", "threads");
  bind(m, "attention_scores", hivtp_cpu_attention_scores, "attention", "scores", "workspace", "threads");
  bind(m, "select_tokens", hivtp_cpu_select_tokens, "scores", "image_stride", "batch", "params", "selection", "workspace", "threads");
  bind(m, "score_and_select", hivtp_cpu_score_and_select, "attention", "params", "selection", "workspace", "threads");
  bind(m, "gather_tokens", hivtp_cpu_gather_tokens, "features", "indices", "capacity", "out", "threads");
  bind(m, "pack_tokens", hivtp_cpu_pack_tokens, "features", "indices", "capacity", "cu_seqlens", "total", "out", "threads");

#ifdef HIVTP_CUDA
  m.attr("cuda_target") = hivtp_cuda_target();
  m.def("cuda_runs_on", &hivtp_cuda_runs_on, "major"_a, "minor"_a);
  bind(m, "cuda_attention_scores_workspace", hivtp_cuda_scores_workspace_bytes, "attention");
  bind(m, "cuda_score_and_select_workspace", hivtp_cuda_score_and_select_workspace_bytes, "attention", "params");
  bind(m, "cuda_attention_scores", hivtp_cuda_attention_scores, "attention", "scores", "workspace", "device", "stream");
  bind(m, "cuda_select_tokens", hivtp_cuda_select_tokens, "scores", "image_stride", "batch", "params", "selection", "device", "stream");
  bind(m, "cuda_score_and_select", hivtp_cuda_score_and_select, "attention", "params", "selection", "workspace", "device", "stream");
  bind(m, "cuda_gather_tokens", hivtp_cuda_gather_tokens, "features", "indices", "capacity", "out", "device", "stream");
  bind(m, "cuda_pack_tokens", hivtp_cuda_pack_tokens, "features", "indices", "capacity", "cu_seqlens", "total", "out", "device", "stream");
#endif
  // clang-format on
}
