// completion_widths.cpp: the completion pass at one vector width, on any processor, against plain loops in double.
// Built by tests/test_simd_widths.py with LRK_VECTOR_BYTES = 16, 32 or 64: the compiler lowers wide vectors to what there is,
// so the AVX-512 code path (lane counts, shuffles, tails) is run without such a processor.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/completion_cpu.cpp"

template <typename T, typename I>
int check(int64_t width, bool weighted, bool biased, unsigned seed) {
  const int64_t m = 37, n = 29;
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  auto fill = [&](int64_t count) {
    std::vector<T> x(count);
    for (T& v : x) v = T(normal(random));
    return x;
  };
  std::vector<int64_t> offsets{0};
  std::vector<I> index;
  for (int64_t i = 0; i < m; ++i) {  // rows of 0, 1, 2, ... entries, one of 700
    const int64_t count = i == 5 ? 700 : i % 11;
    for (int64_t e = 0; e < count; ++e) index.push_back(I(random() % n));
    offsets.push_back(int64_t(index.size()));
  }
  const int64_t z = int64_t(index.size());
  const auto own = fill(m * width), other = fill(n * width), values = fill(z), own_bias = fill(m), other_bias = fill(n);
  auto weights = fill(z);
  for (T& w : weights) w = std::abs(w);
  std::vector<int64_t> plan{0, 3, 17, m};
  std::vector<double> parts(3);
  std::vector<T> grad(m * width, T(NAN)), bias_grad(m, T(NAN)), loss(m, T(NAN));

  lrk::CompletionPass<T, I> p{};
  p.own_count = m, p.other_count = n, p.entry_count = z, p.width = width;
  p.offsets = offsets.data(), p.other_index = index.data(), p.values = values.data();
  p.weights = weighted ? weights.data() : nullptr;
  p.own = own.data(), p.other = other.data();
  p.own_bias = biased ? own_bias.data() : nullptr, p.other_bias = biased ? other_bias.data() : nullptr;
  p.offset = T(0.3), p.plan = plan.data(), p.plan_size = int64_t(plan.size());
  p.loss_parts = parts.data(), p.own_grad = grad.data(), p.own_bias_grad = bias_grad.data(), p.own_loss = loss.data();
  lrk::LRK_AT_LEVEL(completion_pass)(p, 2);

  double worst = 0, total = 0, total_size = 0;
  auto compare = [&](double got, double wanted, double size) {
    const double error = std::abs(got - wanted) / (size + 1e-30);
    if (!(error <= worst)) worst = error;  // NaN counts
  };
  for (int64_t i = 0; i < m; ++i) {
    std::vector<double> g(width), a(width);
    double b = 0, ba = 0, l = 0, la = 0;
    for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
      const int64_t j = int64_t(index[e]);
      double error = double(p.offset) - values[e] + (biased ? double(own_bias[i]) + other_bias[j] : 0.0);
      double size = std::abs(double(values[e])) + std::abs(error);  // what cancels in the error, for its rounding
      for (int64_t q = 0; q < width; ++q) {
        error += double(own[i * width + q]) * other[j * width + q];
        size += std::abs(double(own[i * width + q]) * other[j * width + q]);
      }
      const double weight = weighted ? weights[e] : 1;
      for (int64_t q = 0; q < width; ++q) {
        g[q] += weight * error * other[j * width + q];
        a[q] += weight * size * std::abs(double(other[j * width + q]));
      }
      b += weight * error, ba += weight * size, l += weight * error * error, la += weight * size * size;
    }
    for (int64_t q = 0; q < width; ++q) compare(grad[i * width + q], g[q], a[q] + (offsets[i] == offsets[i + 1]));
    compare(bias_grad[i], b, ba + (offsets[i] == offsets[i + 1]));
    compare(loss[i], l, la + (offsets[i] == offsets[i + 1]));
    total += l, total_size += la;
  }
  compare(parts[0] + parts[1] + parts[2], total, total_size);
  const double limit = (sizeof(T) == 4 ? 1.2e-7 : 2.3e-16) * 8;
  if (worst <= limit) return 0;
  std::printf("width %d, %d-byte numbers, weighted %d, biased %d: error %.3g above %.3g\n", int(width), int(sizeof(T)),
              weighted, biased, worst, limit);
  return 1;
}

int main() {
  int failed = 0, passed = 0;
  unsigned seed = 1;
  for (int vectors : {1, 2, 3, 4, 5, 6, 7, 8, 9, 17})
    for (int options = 0; options < 4; ++options) {
      const int64_t f = vectors * (LRK_VECTOR_BYTES / 4), d = vectors * (LRK_VECTOR_BYTES / 8);
      for (int bad : {check<float, int32_t>(f, options & 1, options & 2, seed++),
                      check<float, int64_t>(f, options & 1, options & 2, seed++),
                      check<double, int32_t>(d, options & 1, options & 2, seed++),
                      check<double, int64_t>(d, options & 1, options & 2, seed++)})
        bad ? ++failed : ++passed;
    }
  std::printf("%d-byte vectors: %d passed, %d failed\n", LRK_VECTOR_BYTES, passed, failed);
  return failed != 0;
}
