// bindings.cpp: the module _C. Pointers arrive as integers; Python (_native.py) has checked devices, dtypes, shapes and
// contiguity, so only what would crash is tested here: a null pointer (a meta or fake tensor) with something to read.
// The GIL is released around the work.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <type_traits>

#include "completion.h"
#include "dispatch.h"
#include "three_factor.h"
#if LRK_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

lrk::Simd g_simd = lrk::simd_best();

template <typename T>
T* pointer(std::uintptr_t address, int64_t count, const char* name) {
  if (address == 0 && count > 0)
    throw std::invalid_argument(std::string(name) +
                                " has a null data pointer (a meta or fake tensor reached the native kernel)");
  return reinterpret_cast<T*>(address);
}

struct CompletionArguments {  // one completion pass as Python describes it; field order is the call's
  int64_t own_count, other_count, entry_count, width;
  std::uintptr_t offsets, other_index, values, weights, own, other, own_bias, other_bias;
  double offset;
  std::uintptr_t plan;
  int64_t plan_size, long_count, long_row;
  std::uintptr_t loss_parts, own_grad, own_bias_grad, own_loss;
};

template <typename T, typename I>
lrk::CompletionPass<T, I> completion_pass(const CompletionArguments& a) {
  lrk::CompletionPass<T, I> p;
  p.own_count = a.own_count;
  p.other_count = a.other_count;
  p.entry_count = a.entry_count;
  p.width = a.width;
  p.offsets = pointer<const int64_t>(a.offsets, a.own_count + 1, "completion_pass: offsets");
  p.other_index = pointer<const I>(a.other_index, a.entry_count, "completion_pass: other_index");
  p.values = pointer<const T>(a.values, a.entry_count, "completion_pass: values");
  p.weights = pointer<const T>(a.weights, 0, "completion_pass: weights");
  p.own = pointer<const T>(a.own, a.own_count, "completion_pass: own");
  p.other = pointer<const T>(a.other, a.entry_count, "completion_pass: other");
  p.own_bias = pointer<const T>(a.own_bias, 0, "completion_pass: own_bias");
  p.other_bias = pointer<const T>(a.other_bias, 0, "completion_pass: other_bias");
  p.offset = T(a.offset);
  p.plan = pointer<const int64_t>(a.plan, a.plan_size, "completion_pass: plan");
  p.plan_size = a.plan_size;
  p.long_count = a.long_count;
  p.long_row = a.long_row;
  p.loss_parts = pointer<double>(a.loss_parts, 0, "completion_pass: loss_parts");
  p.own_grad = pointer<T>(a.own_grad, 0, "completion_pass: own_grad");
  p.own_bias_grad = pointer<T>(a.own_bias_grad, 0, "completion_pass: own_bias_grad");
  p.own_loss = pointer<T>(a.own_loss, 0, "completion_pass: own_loss");
  return p;
}

template <typename Run>
void for_types(bool is_double, bool wide_index, const CompletionArguments& a, Run run) {
  if (is_double)
    wide_index ? run(completion_pass<double, int64_t>(a)) : run(completion_pass<double, int32_t>(a));
  else
    wide_index ? run(completion_pass<float, int64_t>(a)) : run(completion_pass<float, int32_t>(a));
}

// Writes 1/2 sum w E^2 to `loss`, the units of work in their order, where there are loss_parts.
void completion_cpu(bool is_double, bool wide_index, const CompletionArguments& a, std::uintptr_t loss, int threads) {
  const int lanes = lrk::simd_bytes(g_simd) / (is_double ? 8 : 4);
  if (a.width % lanes != 0)
    throw std::invalid_argument("completion_pass: width must be a multiple of " + std::to_string(lanes) + ", got " +
                                std::to_string(a.width));
  if (a.plan_size < 2 || a.long_count != 0)
    throw std::invalid_argument("completion_pass: the entries were planned for CUDA; move them with ObservedEntries.to()");
  for_types(is_double, wide_index, a, [&](const auto& p) {
    typedef std::remove_const_t<std::remove_pointer_t<decltype(p.own)>> T;
    T* const total = pointer<T>(loss, p.loss_parts != nullptr, "loss");
    py::gil_scoped_release release;
    switch (g_simd) {
#if defined(__x86_64__)
      case lrk::Simd::avx512: lrk::completion_pass_avx512(p, threads); break;
      case lrk::Simd::avx2: lrk::completion_pass_avx2(p, threads); break;
#endif
      default: lrk::completion_pass_portable(p, threads);
    }
    if (!p.loss_parts) return;
    double sum = 0;
    for (int64_t unit = 0; unit + 1 < p.plan_size; ++unit) sum += p.loss_parts[unit];
    *total = T(sum / 2);
  });
}

#if LRK_WITH_CUDA

int64_t completion_cuda_workspace(bool is_double, bool wide_index, const CompletionArguments& a, bool want_loss) {
  int64_t bytes = 0;
  for_types(is_double, wide_index, a, [&](const auto& p) { bytes = lrk::completion_cuda_workspace(p, want_loss); });
  return bytes;
}

// Queues the pass on `stream` of GPU `device`. Rows must be 16-byte aligned: a misaligned load would end the CUDA context.
void completion_cuda(bool is_double, bool wide_index, const CompletionArguments& a, std::uintptr_t workspace,
                     std::uintptr_t loss, int device, std::uintptr_t stream) {
  if ((a.own | a.other | a.own_grad | workspace) % 16 != 0 || a.width * (is_double ? 8 : 4) % 16 != 0)
    throw std::invalid_argument("completion_pass: rows of own, other and own_grad, and the workspace, must be 16-byte aligned");
  const int64_t segments = a.plan_size - 2 * a.long_count - 1;  // a long row has two at least
  if (a.long_count == 0 ? segments != 0 : segments < 2 * a.long_count)
    throw std::invalid_argument("completion_pass: the entries were planned for the CPU; move them with ObservedEntries.to()");
  if (a.long_row < 1 || a.long_row > INT32_MAX / 2)
    throw std::invalid_argument("completion_pass: long_row must be from 1 to 2^30, got " + std::to_string(a.long_row));
  for_types(is_double, wide_index, a, [&](const auto& p) {
    typedef std::remove_const_t<std::remove_pointer_t<decltype(p.own)>> T;
    void* const scratch = pointer<void>(workspace, lrk::completion_cuda_workspace(p, loss != 0), "workspace");
    py::gil_scoped_release release;
    // torch's CUDA runtime is another copy than ours; both keep the thread's current device.
    if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess)
      throw std::runtime_error(std::string("completion_pass: cudaSetDevice failed: ") + cudaGetErrorString(error));
    lrk::completion_pass_cuda(p, scratch, reinterpret_cast<T*>(loss), reinterpret_cast<void*>(stream));
  });
}

#endif

struct ThreeFactorArguments {  // what both directions of the three-factor op share; field order is the call's
  int64_t tokens, in_features, out_features, rank, depth;
  int type, factor_type;
  std::uintptr_t x;
  int64_t x_stride;
  std::uintptr_t left, core, right;
  double scale, shift;
  int drop_threshold;
  std::uintptr_t seed;
};

template <typename Parameters>
Parameters three_factor(const ThreeFactorArguments& a) {
  if (a.rank < 1 || a.rank > lrk::kMaxRank)
    throw std::invalid_argument("three_factor_linear: the kernels take ranks from 1 to " + std::to_string(lrk::kMaxRank) +
                                ", got " + std::to_string(a.rank));
  Parameters p;
  p.tokens = a.tokens;
  p.in_features = a.in_features;
  p.out_features = a.out_features;
  p.rank = a.rank;
  p.depth = a.depth;
  p.type = static_cast<lrk::DType>(a.type);
  p.factor_type = static_cast<lrk::DType>(a.factor_type);
  p.x = pointer<const void>(a.x, a.tokens * a.in_features, "three_factor_linear: x");
  p.x_stride = a.x_stride;
  p.left = pointer<const void>(a.left, a.out_features, "three_factor_linear: left");
  p.core = pointer<const void>(a.core, a.depth, "three_factor_linear: core");
  p.right = pointer<const void>(a.right, a.in_features, "three_factor_linear: right");
  p.scale = a.scale;
  p.shift = a.shift;
  p.drop_threshold = a.drop_threshold;
  p.seed = pointer<const int64_t>(a.seed, a.drop_threshold, "three_factor_linear: seed");
  return p;
}

lrk::ThreeFactorForward three_factor_forward(const ThreeFactorArguments& a, std::uintptr_t bias, std::uintptr_t y,
                                             std::uintptr_t z) {
  auto p = three_factor<lrk::ThreeFactorForward>(a);
  p.bias = pointer<const void>(bias, 0, "bias");
  p.y = pointer<void>(y, a.tokens * a.out_features, "three_factor_linear: y");
  p.z = pointer<void>(z, a.tokens, "three_factor_linear: z");
  return p;
}

lrk::ThreeFactorBackward three_factor_backward(const ThreeFactorArguments& a, std::uintptr_t dy, int64_t dy_stride,
                                               std::uintptr_t z, std::uintptr_t dx, std::uintptr_t dleft, std::uintptr_t dcore,
                                               std::uintptr_t dright) {
  auto p = three_factor<lrk::ThreeFactorBackward>(a);
  p.dy = pointer<const void>(dy, a.tokens * a.out_features, "three_factor_linear: dy");
  p.dy_stride = dy_stride;
  p.z = pointer<const void>(z, a.tokens, "three_factor_linear: z");
  p.dx = pointer<void>(dx, 0, "dx");
  p.dleft = pointer<void>(dleft, 0, "dleft");
  p.dcore = pointer<void>(dcore, 0, "dcore");
  p.dright = pointer<void>(dright, 0, "dright");
  return p;
}

#if defined(__x86_64__)
#define LRK_CALL_AT_LEVEL(function, ...)                                \
  switch (g_simd) {                                                     \
    case lrk::Simd::avx512: return lrk::function##_avx512(__VA_ARGS__); \
    case lrk::Simd::avx2: return lrk::function##_avx2(__VA_ARGS__);     \
    default: return lrk::function##_portable(__VA_ARGS__);              \
  }
#else
#define LRK_CALL_AT_LEVEL(function, ...) return lrk::function##_portable(__VA_ARGS__);
#endif

int64_t workspace_at_level(const lrk::ThreeFactor& p, bool backward) {
  LRK_CALL_AT_LEVEL(three_factor_workspace, p, backward)
}
void run_at_level(const lrk::ThreeFactorForward& p, void* workspace, int threads) {
  LRK_CALL_AT_LEVEL(three_factor_forward, p, workspace, threads)
}
void run_at_level(const lrk::ThreeFactorBackward& p, void* workspace, int threads) {
  LRK_CALL_AT_LEVEL(three_factor_backward, p, workspace, threads)
}

template <typename Parameters>
void three_factor_cpu(const Parameters& p, bool backward, int threads) {
  py::gil_scoped_release release;
  const int64_t bytes = workspace_at_level(p, backward);
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(64, size_t(bytes / 64 + 1) * 64), &std::free);
  if (!workspace) throw std::bad_alloc();
  run_at_level(p, workspace.get(), threads);
}

#if LRK_WITH_CUDA

// Queues `run` on `stream` of GPU `device`.
template <typename Parameters>
void three_factor_cuda(const Parameters& p, bool backward, std::uintptr_t workspace, int device, std::uintptr_t stream,
                       void (*run)(const Parameters&, void*, void*)) {
  void* const scratch =
      pointer<void>(workspace, lrk::three_factor_cuda_workspace(p, backward), "three_factor_linear: workspace");
  py::gil_scoped_release release;
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess)
    throw std::runtime_error(std::string("three_factor_linear: cudaSetDevice failed: ") + cudaGetErrorString(error));
  run(p, scratch, reinterpret_cast<void*>(stream));
}

#endif

// What this process can run CUDA kernels on; `reason` says why nothing, and is empty where there is a GPU.
py::dict cuda_info() {
  int count = 0, driver = 0, runtime = 0;
  std::string reason;
#if LRK_WITH_CUDA
  cudaDriverGetVersion(&driver);  // 0 without a driver
  cudaRuntimeGetVersion(&runtime);
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // forget it: the next launch check must not find it
    count = 0;
    reason = driver == 0 ? "no CUDA driver is installed" : cudaGetErrorString(error);
  } else if (count == 0) {
    reason = "no GPU is visible";
  }
#else
  reason = LRK_NO_CUDA;
#endif
  py::dict info;
  info["device_count"] = count;
  info["driver_version"] = driver;  // 1000 major + 10 minor, as CUDA counts
  info["runtime_version"] = runtime;
  info["reason"] = reason;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of lowrank_kernels; called by lowrank_kernels._native only.";
  m.attr("version") = LRK_VERSION;
  m.attr("compiler") = LRK_COMPILER;
  m.attr("openmp") = bool(LRK_OPENMP);
  m.attr("has_cuda") = bool(LRK_WITH_CUDA);
  m.attr("no_cuda") = LRK_NO_CUDA;  // why it was built without, else empty
  m.attr("cuda_version") = LRK_CUDA_VERSION;
  m.attr("cuda_architectures") = LRK_CUDA_ARCHITECTURES;

  m.def("simd_level", [] { return lrk::simd_name(g_simd); });
  m.def("simd_bytes", [] { return lrk::simd_bytes(g_simd); });
  m.def("simd_levels", [] {
    py::list names;
    for (auto level : {lrk::Simd::portable, lrk::Simd::avx2, lrk::Simd::avx512})
      if (lrk::simd_supported(level)) names.append(lrk::simd_name(level));
    return names;
  });
  m.def(
      "set_simd_level", [](const std::string& name) { g_simd = lrk::simd_from_name(name); },
      "For tests: use a lower SIMD level than the best one.");

  py::class_<CompletionArguments>(m, "CompletionArguments")
      .def(py::init([](int64_t own_count, int64_t other_count, int64_t entry_count, int64_t width, std::uintptr_t offsets,
                       std::uintptr_t other_index, std::uintptr_t values, std::uintptr_t weights, std::uintptr_t own,
                       std::uintptr_t other, std::uintptr_t own_bias, std::uintptr_t other_bias, double offset,
                       std::uintptr_t plan, int64_t plan_size, int64_t long_count, int64_t long_row, std::uintptr_t loss_parts,
                       std::uintptr_t own_grad, std::uintptr_t own_bias_grad, std::uintptr_t own_loss) {
        return CompletionArguments{own_count, other_count, entry_count, width,      offsets,    other_index,   values,
                                   weights,   own,         other,       own_bias,   other_bias, offset,        plan,
                                   plan_size, long_count,  long_row,    loss_parts, own_grad,   own_bias_grad, own_loss};
      }));
  m.def("completion_cpu", &completion_cpu);
  py::class_<ThreeFactorArguments>(m, "ThreeFactorArguments")
      .def(py::init([](int64_t tokens, int64_t in_features, int64_t out_features, int64_t rank, int64_t depth, int type,
                       int factor_type, std::uintptr_t x, int64_t x_stride, std::uintptr_t left, std::uintptr_t core,
                       std::uintptr_t right, double scale, double shift, int drop_threshold, std::uintptr_t seed) {
        return ThreeFactorArguments{tokens,   in_features, out_features, rank,  depth, type,  factor_type,    x,
                                    x_stride, left,        core,         right, scale, shift, drop_threshold, seed};
      }));
  m.attr("max_rank") = lrk::kMaxRank;
  m.def("three_factor_forward_cpu", [](const ThreeFactorArguments& a, std::uintptr_t bias, std::uintptr_t y, std::uintptr_t z,
                                       int threads) { three_factor_cpu(three_factor_forward(a, bias, y, z), false, threads); });
  m.def("three_factor_backward_cpu",
        [](const ThreeFactorArguments& a, std::uintptr_t dy, int64_t dy_stride, std::uintptr_t z, std::uintptr_t dx,
           std::uintptr_t dleft, std::uintptr_t dcore, std::uintptr_t dright, int threads) {
          three_factor_cpu(three_factor_backward(a, dy, dy_stride, z, dx, dleft, dcore, dright), true, threads);
        });
  m.def("cuda_info", &cuda_info);
#if LRK_WITH_CUDA
  m.def("three_factor_cuda_workspace", [](const ThreeFactorArguments& a, bool backward) {
    return lrk::three_factor_cuda_workspace(three_factor<lrk::ThreeFactorForward>(a), backward);
  });
  m.def("three_factor_forward_cuda", [](const ThreeFactorArguments& a, std::uintptr_t bias, std::uintptr_t y, std::uintptr_t z,
                                        std::uintptr_t workspace, int device, std::uintptr_t stream) {
    three_factor_cuda(three_factor_forward(a, bias, y, z), false, workspace, device, stream, &lrk::three_factor_forward_cuda);
  });
  m.def("three_factor_backward_cuda", [](const ThreeFactorArguments& a, std::uintptr_t dy, int64_t dy_stride, std::uintptr_t z,
                                         std::uintptr_t dx, std::uintptr_t dleft, std::uintptr_t dcore, std::uintptr_t dright,
                                         std::uintptr_t workspace, int device, std::uintptr_t stream) {
    three_factor_cuda(three_factor_backward(a, dy, dy_stride, z, dx, dleft, dcore, dright), true, workspace, device, stream,
                      &lrk::three_factor_backward_cuda);
  });
  m.def("completion_cuda_workspace", &completion_cuda_workspace);
  m.def("completion_cuda", &completion_cuda);
#endif
}
