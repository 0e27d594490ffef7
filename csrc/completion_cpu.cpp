// completion_cpu.cpp: one pass over the observed entries (formula and symbols in completion.h), compiled once a SIMD level.
//
// Row i's factor and its gradient stay in registers (up to 8 vectors; beyond, in L1). Entries go four at a time: their
// dot products share one transposed reduction and their gathers overlap. 4 K flops an entry and pass; bound by the
// gathers of `other`, so rows 32 entries ahead are prefetched. A unit of work writes its own rows and its own loss slot
// only: the result does not depend on the number of threads.
#include "completion.h"
#include "simd.h"

namespace lrk {
namespace {

constexpr int64_t kPrefetch = 32;        // entries ahead: 60 ns of work, an L3 hit and a TLB miss; 16 took twice the time there
constexpr int64_t kCached = 256 * 1024;  // bytes of `other` that a core's own cache holds: prefetching only costs
constexpr int64_t kRun = 256;            // entries whose loss is summed in T before it is added in double

// Rows [begin, end); returns their sum of w E^2. Q: vectors a row, known at compile time, or 0: `vectors` of them, with the
// factor and its gradient in memory.
template <typename T, typename I, int Q>
double rows(const CompletionPass<T, I>& shared, int64_t begin, int64_t end, int vectors) {
  const CompletionPass<T, I> p = shared;  // a copy no store can alias
  typedef typename Vector<T>::type V;
  typedef typename Vector<T>::four Four;
  constexpr int L = kLanes<T>;
  constexpr int R = Q ? Q : 1;
  constexpr bool kTwo = Q == 1 || Q == 2;  // two chains of additions: a single one would be bound by its latency
  const int64_t width = int64_t(Q ? Q : vectors) * L;
  const bool far = p.other_count * width * int64_t(sizeof(T)) > kCached;
  double total = 0;
  for (int64_t i = begin; i < end; ++i) {
    const T* own = p.own + i * width;
    T* grad = p.own_grad ? p.own_grad + i * width : nullptr;
    V a[R] = {}, d[R] = {}, d2[R] = {};
    for (int q = 0; q < Q; ++q) a[q] = load<V>(own + q * L);
    if (!Q && grad)
      for (int q = 0; q < vectors; ++q) store(grad + q * L, V{});
    const T base = p.offset + (p.own_bias ? p.own_bias[i] : T(0));
    const int64_t stop = p.offsets[i + 1];
    double4 loss = {}, bias = {};
    for (int64_t run = p.offsets[i]; run < stop; run += kRun) {
      const int64_t run_stop = run + kRun < stop ? run + kRun : stop;
      Four run_loss = {}, run_bias = {};
      for (int64_t e = run; e < run_stop; e += 4) {
        const I* index = p.other_index + e;
        const T *b0, *b1, *b2, *b3;
        Four target, weight = {T(1), T(1), T(1), T(1)};
        if (e + 4 <= run_stop) {
          if (far && e + kPrefetch + 4 <= p.entry_count)
            for (int t = 0; t < 4; ++t) {
              const char* line = reinterpret_cast<const char*>(p.other + int64_t(index[kPrefetch + t]) * width);
              __builtin_prefetch(line);
              if (width * int64_t(sizeof(T)) > 64) __builtin_prefetch(line + 64);
            }
          b0 = p.other + int64_t(index[0]) * width;
          b1 = p.other + int64_t(index[1]) * width;
          b2 = p.other + int64_t(index[2]) * width;
          b3 = p.other + int64_t(index[3]) * width;
          target = load<Four>(p.values + e);
          if (p.weights) weight = load<Four>(p.weights + e);
          if (p.other_bias)
            target -= Four{p.other_bias[index[0]], p.other_bias[index[1]], p.other_bias[index[2]], p.other_bias[index[3]]};
        } else {  // the last one to three: the others repeat the first with weight 0
          const int live = int(run_stop - e);
          const int64_t j0 = index[0], j1 = index[live > 1 ? 1 : 0], j2 = index[live > 2 ? 2 : 0];
          b0 = b3 = p.other + j0 * width;
          b1 = p.other + j1 * width;
          b2 = p.other + j2 * width;
          const T* v = p.values + e;
          target = Four{v[0], v[live > 1 ? 1 : 0], v[live > 2 ? 2 : 0], v[0]};
          if (p.other_bias) target -= Four{p.other_bias[j0], p.other_bias[j1], p.other_bias[j2], p.other_bias[j0]};
          const T* w = p.weights ? p.weights + e : nullptr;
          weight = Four{w ? w[0] : T(1), live > 1 ? (w ? w[1] : T(1)) : T(0), live > 2 ? (w ? w[2] : T(1)) : T(0), T(0)};
        }

        const V x0 = Q ? a[0] : load<V>(own);
        V s0 = x0 * load<V>(b0), s1 = x0 * load<V>(b1), s2 = x0 * load<V>(b2), s3 = x0 * load<V>(b3);
        for (int q = 1; q < (Q ? Q : vectors); ++q) {
          const V x = Q ? a[Q ? q : 0] : load<V>(own + q * L);
          s0 += x * load<V>(b0 + q * L);
          s1 += x * load<V>(b1 + q * L);
          s2 += x * load<V>(b2 + q * L);
          s3 += x * load<V>(b3 + q * L);
        }
        Four error = sum4(s0, s1, s2, s3) + (base - target);
        if (e + 4 > run_stop)  // an overflow stays infinite: in its copies it would add 0 x inf = NaN
          error = Four{T(0), T(1), T(2), T(3)} < T(run_stop - e) ? error : Four{};
        const Four weighted = weight * error;
        run_loss += weighted * error;
        run_bias += weighted;
        if (!grad) continue;
        // Read the four rows again, from L1: kept in registers they would push the accumulators out.
        asm("" : "+r"(b0), "+r"(b1), "+r"(b2), "+r"(b3));
        const V w0 = weighted[0] - V{}, w1 = weighted[1] - V{}, w2 = weighted[2] - V{}, w3 = weighted[3] - V{};
        for (int q = 0; q < Q; ++q) {
          d[q] += w0 * load<V>(b0 + q * L);
          d[q] += w1 * load<V>(b1 + q * L);
          V& second = kTwo ? d2[q] : d[q];
          second += w2 * load<V>(b2 + q * L);
          second += w3 * load<V>(b3 + q * L);
        }
        for (int q = 0; q < (Q ? 0 : vectors); ++q) {
          V g = load<V>(grad + q * L);
          g += w0 * load<V>(b0 + q * L);
          g += w1 * load<V>(b1 + q * L);
          g += w2 * load<V>(b2 + q * L);
          g += w3 * load<V>(b3 + q * L);
          store(grad + q * L, g);
        }
      }
      loss += widen(run_loss);
      bias += widen(run_bias);
    }
    for (int q = 0; q < Q; ++q)
      if (grad) store(grad + q * L, d[q] + d2[q]);
    if (p.own_bias_grad) p.own_bias_grad[i] = T((bias[0] + bias[1]) + (bias[2] + bias[3]));
    const double row_loss = (loss[0] + loss[1]) + (loss[2] + loss[3]);
    if (p.own_loss) p.own_loss[i] = T(row_loss);
    total += row_loss;
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
