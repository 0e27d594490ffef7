// completion_cpu.cpp: one pass over the observed entries (formula and symbols in completion.h), compiled once a SIMD level.
//
// Row i's factor and its gradient stay in registers (up to 8 vectors; beyond, in L1). Entries go four at a time: their
// dot products share one transposed reduction and their gathers overlap. 4 K flops an entry and pass; bound by the
// gathers of `other`, so rows 16 entries ahead are prefetched. A unit of work writes its own rows and its own loss slot
// only: the result does not depend on the number of threads.
#include "completion.h"
#include "simd.h"

namespace lrk {
namespace {

constexpr int64_t kPrefetch = 16;  // entries ahead: about 20 ns of work against an L3 hit of 15-20 ns

// Q: vectors a row, known at compile time, or 0: `vectors` of them, factor and gradient in memory.
template <typename T, typename I, int Q>
double rows(const CompletionPass<T, I>& p, int64_t begin, int64_t end, int vectors) {
  typedef typename Vector<T>::type V;
  typedef typename Vector<T>::four Four;
  const int count = Q ? Q : vectors;
  const int64_t last = p.entry_count - 1;
  double total = 0;
  for (int64_t i = begin; i < end; ++i) {
    const T* own = p.own + i * p.width;
    T* grad = p.own_grad ? p.own_grad + i * p.width : nullptr;
    V a[Q ? Q : 1], d[Q ? Q : 1];
    for (int q = 0; q < Q; ++q) {
      a[q] = load<V>(own + q * kLanes<T>);
      d[q] = V{};
    }
    if (!Q && grad)
      for (int q = 0; q < count; ++q) store(grad + q * kLanes<T>, V{});
    const T base = p.offset + (p.own_bias ? p.own_bias[i] : T(0));
    double4 loss = {}, bias = {};

    // `live` of the four entries at e count; the others repeat the first with weight 0.
    auto four = [&](int64_t e, int live) __attribute__((always_inline)) {
      const T* other[4];
      Four target, weight = {T(1), T(1), T(1), T(1)};
      if (live == 4) {
        for (int t = 0; t < 4; ++t) other[t] = p.other + int64_t(p.other_index[e + t]) * p.width;
        target = load<Four>(p.values + e);
        if (p.weights) weight = load<Four>(p.weights + e);
        if (p.other_bias)
          for (int t = 0; t < 4; ++t) target[t] -= p.other_bias[p.other_index[e + t]];
      } else {
        for (int t = 0; t < 4; ++t) {
          const int64_t f = t < live ? e + t : e;
          other[t] = p.other + int64_t(p.other_index[f]) * p.width;
          target[t] = p.values[f] - (p.other_bias ? p.other_bias[p.other_index[f]] : T(0));
          weight[t] = t < live ? (p.weights ? p.weights[f] : T(1)) : T(0);
        }
      }
      V s0 = {}, s1 = {}, s2 = {}, s3 = {};
      for (int q = 0; q < count; ++q) {
        const V x = Q ? a[Q ? q : 0] : load<V>(own + q * kLanes<T>);
        s0 += x * load<V>(other[0] + q * kLanes<T>);
        s1 += x * load<V>(other[1] + q * kLanes<T>);
        s2 += x * load<V>(other[2] + q * kLanes<T>);
        s3 += x * load<V>(other[3] + q * kLanes<T>);
      }
      const Four error = sum4(s0, s1, s2, s3) + (base - target);
      const Four weighted = weight * error;
      loss += widen(weighted) * widen(error);
      bias += widen(weighted);
      if (!grad) return;
      for (int q = 0; q < count; ++q) {
        V g = Q ? d[Q ? q : 0] : load<V>(grad + q * kLanes<T>);
        for (int t = 0; t < 4; ++t) g += weighted[t] * load<V>(other[t] + q * kLanes<T>);
        if (Q)
          d[Q ? q : 0] = g;
        else
          store(grad + q * kLanes<T>, g);
      }
    };

    const int64_t stop = p.offsets[i + 1];
    int64_t e = p.offsets[i];
    for (; e + 4 <= stop; e += 4) {
      for (int t = 0; t < 4; ++t) {
        const int64_t ahead = e + t + kPrefetch < last ? e + t + kPrefetch : last;
        const char* line = reinterpret_cast<const char*>(p.other + int64_t(p.other_index[ahead]) * p.width);
        __builtin_prefetch(line);
        if (count * LRK_VECTOR_BYTES > 64) __builtin_prefetch(line + 64);
      }
      four(e, 4);
    }
    if (e < stop) four(e, int(stop - e));

    for (int q = 0; q < Q; ++q)
      if (grad) store(grad + q * kLanes<T>, d[q]);
    if (p.own_bias_grad) p.own_bias_grad[i] = T((bias[0] + bias[1]) + (bias[2] + bias[3]));
    total += (loss[0] + loss[1]) + (loss[2] + loss[3]);
  }
  return total;
}

template <typename T, typename I>
void pass(const CompletionPass<T, I>& p, int threads) {
  typedef double (*Rows)(const CompletionPass<T, I>&, int64_t, int64_t, int);
  static const Rows by_vectors[9] = {rows<T, I, 0>, rows<T, I, 1>, rows<T, I, 2>, rows<T, I, 3>, rows<T, I, 4>,
                                     rows<T, I, 0>, rows<T, I, 6>, rows<T, I, 0>, rows<T, I, 8>};
  const int vectors = int(p.width / kLanes<T>);
  const Rows run = vectors <= 8 ? by_vectors[vectors] : rows<T, I, 0>;
  const int64_t units = p.plan_size - 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && units > 1)
  for (int64_t unit = 0; unit < units; ++unit) {
    const double part = run(p, p.plan[unit], p.plan[unit + 1], vectors);
    if (p.loss_parts) p.loss_parts[unit] = part;
  }
}

}  // namespace

void LRK_AT_LEVEL(completion_pass)(const CompletionPass<float, int32_t>& p, int threads) {
  pass(p, threads);
}
void LRK_AT_LEVEL(completion_pass)(const CompletionPass<float, int64_t>& p, int threads) {
  pass(p, threads);
}
void LRK_AT_LEVEL(completion_pass)(const CompletionPass<double, int32_t>& p, int threads) {
  pass(p, threads);
}
void LRK_AT_LEVEL(completion_pass)(const CompletionPass<double, int64_t>& p, int threads) {
  pass(p, threads);
}

}  // namespace lrk
