// hivtp_kernels._C: takes pointers as integers, calls api.h without the GIL, raises what it
// returns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "hivtp/api.h"

#define HIVTP_STRING_(text) #text
#define HIVTP_STRING(text) HIVTP_STRING_(text)

namespace py = pybind11;

namespace {

using Pointer = std::uintptr_t;
using View = std::tuple<Pointer, int64_t, int64_t, int64_t>;
using Pair = std::array<int32_t, 2>;
using Classes = std::array<int32_t, 4>;

template <class T>
T* at(Pointer address) {
  return reinterpret_cast<T*>(address);
}

void raise_unless_ok(const char* op, HivtpStatus status) {
  if (status == HIVTP_OK) return;
  std::string text = std::string(op) + ": " + hivtp_status_text(status);
#ifdef HIVTP_CUDA
  if (status >= HIVTP_NO_DRIVER) text += std::string(": ") + hivtp_cuda_detail();
#endif
  if (status == HIVTP_NULL_POINTER || status == HIVTP_MISALIGNED_WORKSPACE ||
      status >= HIVTP_NO_DRIVER) {
    throw std::runtime_error(text);
  }
  throw std::invalid_argument(text);
}

int64_t workspace(const char* op, int64_t bytes) {
  if (bytes < 0) throw std::invalid_argument(std::string(op) + ": no workspace for such arguments");
  return bytes;
}

void set_views(const char* name, HivtpView (&views)[HIVTP_MAX_LAYERS], int32_t layers,
               const std::vector<View>& values) {
  if (int32_t(values.size()) != layers || layers > HIVTP_MAX_LAYERS) {
    throw std::invalid_argument(std::string(name) + " must have one view a layer, at most 8");
  }
  for (int32_t layer = 0; layer < layers; ++layer) {
    const auto& [data, batch, head, token] = values[layer];
    views[layer] = {at<void>(data), batch, head, token};
  }
}

HivtpAttention make_attention(const std::vector<View>& q, const std::vector<View>& k,
                              const std::vector<View>& lse, int32_t batch, int32_t heads,
                              int32_t tokens, int32_t head_dim, int32_t prefix, int32_t dtype,
                              int32_t rows, float scale) {
  HivtpAttention a{};
  a.layers = int32_t(k.size());
  set_views("q", a.q, a.layers, q);
  set_views("k", a.k, a.layers, k);
  if (!lse.empty()) set_views("lse", a.lse, a.layers, lse);
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

HivtpRule make_rule(Pair grid, Pair regions, Pair window, Classes base, Classes cut,
                    int32_t capacity, bool fill) {
  HivtpRule rule{grid[0],   grid[1], regions[0], regions[1], window[0],
                 window[1], {},      {},         capacity,   fill};
  for (int kind = 0; kind < 4; ++kind) {
    rule.quota_base[kind] = base[kind];
    rule.quota_cut[kind] = cut[kind];
  }
  return rule;
}

// What `call` takes, it has as plain C++ by now, so the GIL can go.
template <class Call>
void run(const char* op, Call call) {
  HivtpStatus status;
  {
    py::gil_scoped_release unlocked;
    status = call();
  }
  raise_unless_ok(op, status);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = HIVTP_STRING(HIVTP_VERSION);
  m.attr("variant") = HIVTP_STRING(HIVTP_BUILD);
  m.attr("cpu_target") = hivtp_cpu_target();

  // Local to the module: the tests load the same bindings over their emulator beside these.
  py::class_<HivtpAttention>(m, "Attention", py::module_local())
      .def(py::init(&make_attention), py::arg("q"), py::arg("k"), py::arg("lse"), py::arg("batch"),
           py::arg("heads"), py::arg("tokens"), py::arg("head_dim"), py::arg("prefix"),
           py::arg("dtype"), py::arg("rows"), py::arg("scale"));
  py::class_<HivtpRule>(m, "Rule", py::module_local())
      .def(py::init(&make_rule), py::arg("grid"), py::arg("regions"), py::arg("window"),
           py::arg("quota_base"), py::arg("quota_cut"), py::arg("capacity"), py::arg("fill"));

  m.def("attention_scores_workspace", [](const HivtpAttention& attention, int32_t threads) {
    return workspace("attention_scores", hivtp_cpu_scores_workspace_bytes(&attention, threads));
  });
  m.def("select_tokens_workspace", [](const HivtpRule& rule, int32_t threads) {
    return workspace("select_tokens", hivtp_cpu_select_workspace_bytes(&rule, threads));
  });
  m.def("score_and_select_workspace",
        [](const HivtpAttention& attention, const HivtpRule& rule, int32_t threads) {
          return workspace("score_and_select",
                           hivtp_cpu_score_and_select_workspace_bytes(&attention, &rule, threads));
        });

  m.def("attention_scores",
        [](const HivtpAttention& attention, Pointer scores, Pointer workspace, int32_t threads) {
          run("attention_scores", [&, attention] {
            return hivtp_cpu_attention_scores(&attention, at<float>(scores), at<void>(workspace),
                                              threads);
          });
        });
  m.def("select_tokens",
        [](Pointer scores, int64_t image_stride, int32_t batch, const HivtpRule& rule,
           Pointer indices, Pointer counts, Pointer stage, Pointer workspace, int32_t threads) {
          const HivtpSelection out{at<int32_t>(indices), at<int32_t>(counts), at<int8_t>(stage)};
          run("select_tokens", [&, rule] {
            return hivtp_cpu_select_tokens(at<float>(scores), image_stride, batch, &rule, &out,
                                           at<void>(workspace), threads);
          });
        });
  m.def("score_and_select", [](const HivtpAttention& attention, const HivtpRule& rule,
                               Pointer indices, Pointer counts, Pointer stage, Pointer workspace,
                               int32_t threads) {
    const HivtpSelection out{at<int32_t>(indices), at<int32_t>(counts), at<int8_t>(stage)};
    run("score_and_select", [&, attention, rule] {
      return hivtp_cpu_score_and_select(&attention, &rule, &out, at<void>(workspace), threads);
    });
  });
  m.def("gather_tokens", [](Pointer x, int64_t image_stride, int64_t row_stride, int64_t row_bytes,
                            int32_t batch, int32_t patches, int32_t prefix, Pointer indices,
                            int32_t capacity, Pointer out, int32_t threads) {
    const HivtpFeatures features{at<void>(x), image_stride, row_stride, row_bytes,
                                 batch,       patches,      prefix};
    run("gather_tokens", [&] {
      return hivtp_cpu_gather_tokens(&features, at<int32_t>(indices), capacity, at<void>(out),
                                     threads);
    });
  });
  m.def("pack_tokens",
        [](Pointer x, int64_t image_stride, int64_t row_stride, int64_t row_bytes, int32_t batch,
           int32_t patches, int32_t prefix, Pointer indices, int32_t capacity, Pointer cu_seqlens,
           int64_t total, Pointer out, int32_t threads) {
          const HivtpFeatures features{at<void>(x), image_stride, row_stride, row_bytes,
                                       batch,       patches,      prefix};
          run("pack_tokens", [&] {
            return hivtp_cpu_pack_tokens(&features, at<int32_t>(indices), capacity,
                                         at<int32_t>(cu_seqlens), total, at<void>(out), threads);
          });
        });

#ifdef HIVTP_CUDA
  m.attr("cuda_target") = hivtp_cuda_target();
  m.def("cuda_runs_on", &hivtp_cuda_runs_on);

  m.def("cuda_attention_scores_workspace", [](const HivtpAttention& attention) {
    return workspace("attention_scores", hivtp_cuda_scores_workspace_bytes(&attention));
  });
  m.def("cuda_score_and_select_workspace",
        [](const HivtpAttention& attention, const HivtpRule& rule) {
          return workspace("score_and_select",
                           hivtp_cuda_score_and_select_workspace_bytes(&attention, &rule));
        });

  m.def("cuda_attention_scores", [](const HivtpAttention& attention, Pointer scores,
                                    Pointer workspace, int32_t device, Pointer stream) {
    run("attention_scores", [&, attention] {
      return hivtp_cuda_attention_scores(&attention, at<float>(scores), at<void>(workspace), device,
                                         at<void>(stream));
    });
  });
  m.def("cuda_select_tokens",
        [](Pointer scores, int64_t image_stride, int32_t batch, const HivtpRule& rule,
           Pointer indices, Pointer counts, Pointer stage, int32_t device, Pointer stream) {
          const HivtpSelection out{at<int32_t>(indices), at<int32_t>(counts), at<int8_t>(stage)};
          run("select_tokens", [&, rule] {
            return hivtp_cuda_select_tokens(at<float>(scores), image_stride, batch, &rule, &out,
                                            device, at<void>(stream));
          });
        });
  m.def("cuda_score_and_select",
        [](const HivtpAttention& attention, const HivtpRule& rule, Pointer indices, Pointer counts,
           Pointer stage, Pointer workspace, int32_t device, Pointer stream) {
          const HivtpSelection out{at<int32_t>(indices), at<int32_t>(counts), at<int8_t>(stage)};
          run("score_and_select", [&, attention, rule] {
            return hivtp_cuda_score_and_select(&attention, &rule, &out, at<void>(workspace), device,
                                               at<void>(stream));
          });
        });
  m.def("cuda_gather_tokens",
        [](Pointer x, int64_t image_stride, int64_t row_stride, int64_t row_bytes, int32_t batch,
           int32_t patches, int32_t prefix, Pointer indices, int32_t capacity, Pointer out,
           int32_t device, Pointer stream) {
          const HivtpFeatures features{at<void>(x), image_stride, row_stride, row_bytes,
                                       batch,       patches,      prefix};
          run("gather_tokens", [&] {
            return hivtp_cuda_gather_tokens(&features, at<int32_t>(indices), capacity,
                                            at<void>(out), device, at<void>(stream));
          });
        });
  m.def("cuda_pack_tokens",
        [](Pointer x, int64_t image_stride, int64_t row_stride, int64_t row_bytes, int32_t batch,
           int32_t patches, int32_t prefix, Pointer indices, int32_t capacity, Pointer cu_seqlens,
           int64_t total, Pointer out, int32_t device, Pointer stream) {
          const HivtpFeatures features{at<void>(x), image_stride, row_stride, row_bytes,
                                       batch,       patches,      prefix};
          run("pack_tokens", [&] {
            return hivtp_cuda_pack_tokens(&features, at<int32_t>(indices), capacity,
                                          at<int32_t>(cu_seqlens), total, at<void>(out), device,
                                          at<void>(stream));
          });
        });
#endif
}
