// three_factor_widths.cpp: the three-factor update at one vector width, on any processor, against plain loops in double, and
// the conversions of every 16-bit number. Built by tests/test_simd_widths.py with LRK_VECTOR_BYTES = 16, 32 or 64 and the
// sanitizers: the compiler lowers wide vectors to what there is, so the AVX-512 code path is run without such a processor.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/three_factor_cpu.cpp"

using lrk::DType;

struct Shape {
  int64_t tokens, in_features, out_features, rank, depth;
};

template <typename X>
constexpr DType kType = std::is_same_v<X, float>           ? DType::float32
                        : std::is_same_v<X, double>        ? DType::float64
                        : std::is_same_v<X, lrk::Bfloat16> ? DType::bfloat16
                                                           : DType::float16;

typedef std::vector<double> Doubles;

// out (rows, columns) = a (rows, inner) b^T (columns, inner)
Doubles times(const Doubles& a, const Doubles& b, int64_t rows, int64_t columns, int64_t inner) {
  Doubles out(rows * columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t i = 0; i < inner; ++i) out[r * columns + c] += a[r * inner + i] * b[c * inner + i];
  return out;
}
Doubles turn(const Doubles& a, int64_t rows, int64_t columns) {
  Doubles out(a.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * rows + r] = a[r * columns + c];
  return out;
}

template <typename X, typename F>
int check(const Shape& s, bool dropped, bool biased, unsigned number) {
  typedef std::conditional_t<std::is_same_v<X, double>, double, float> A;
  const auto [t, n, m, k, depth] = s;
  const int64_t pitch = n + 3, dy_pitch = m + 5;
  std::mt19937 random(number);
  std::normal_distribution<double> normal;
  auto fill = [&](auto* kind, int64_t count, double scale) {
    std::vector<std::remove_pointer_t<decltype(kind)>> x(count);
    for (auto& v : x) lrk::narrow_one(&v, A(scale * normal(random)));
    return x;
  };
  auto widened = [](const auto& x) {
    Doubles out(x.size());
    for (size_t i = 0; i < x.size(); ++i) out[i] = double(lrk::widen_one(x[i]));
    return out;
  };
  X* x_kind = nullptr;
  F* f_kind = nullptr;
  const auto x = fill(x_kind, t * pitch, 1), dy = fill(x_kind, t * dy_pitch, 1), bias = fill(x_kind, m, 1);
  const auto left = fill(f_kind, m * k, 1 / std::sqrt(k)), right = fill(f_kind, k * n, 1 / std::sqrt(n + 1.0));
  const auto core = fill(f_kind, depth * k * k, 1 / std::sqrt(k));
  std::vector<X> y(t * m), dx(t * n);
  std::vector<A> z(2 * t * k, A(NAN));
  std::vector<F> dleft(m * k), dcore(depth * k * k), dright(k * n);
  const int64_t seed = 0x123456789abcdef;

  lrk::ThreeFactorForward f{};
  f.tokens = t, f.in_features = n, f.out_features = m, f.rank = k, f.depth = depth;
  f.type = kType<X>, f.factor_type = kType<F>, f.x = x.data(), f.x_stride = pitch;
  f.left = left.data(), f.core = core.data(), f.right = right.data(), f.scale = 0.7;
  f.shift = depth ? 0.3 : 0;
  f.drop_threshold = dropped ? 20000 : 0, f.seed = &seed;
  f.bias = biased ? bias.data() : nullptr, f.y = y.data(), f.z = z.data();
  lrk::ThreeFactorBackward b{};
  static_cast<lrk::ThreeFactor&>(b) = f;
  b.dy = dy.data(), b.dy_stride = dy_pitch, b.z = z.data();
  b.dx = dx.data(), b.dleft = dleft.data(), b.dcore = depth ? dcore.data() : nullptr, b.dright = dright.data();
  for (bool backward : {false, true}) {
    const int64_t bytes = (lrk::LRK_AT_LEVEL(three_factor_workspace)(f, backward) + 63) / 64 * 64;
    void* workspace = std::aligned_alloc(64, size_t(bytes));
    std::memset(workspace, 0xFF, size_t(bytes));  // NaN
    backward ? lrk::LRK_AT_LEVEL(three_factor_backward)(b, workspace, 2)
             : lrk::LRK_AT_LEVEL(three_factor_forward)(f, workspace, 2);
    std::free(workspace);
  }

  // The same by plain loops.
  Doubles mask(t * n, 1.0), xs(t * n), dys(t * m);
  for (int64_t r = 0; r < t; ++r) {
    std::vector<double> line(n + 8);
    if (dropped && n) lrk::mask_row<double>(line.data(), f, 65536.0 / (65536 - 20000), r, 0, n);
    for (int64_t c = 0; c < n; ++c) {
      if (dropped) mask[r * n + c] = line[c];
      xs[r * n + c] = mask[r * n + c] * double(lrk::widen_one(x[r * pitch + c]));
    }
    for (int64_t c = 0; c < m; ++c) dys[r * m + c] = double(lrk::widen_one(dy[r * dy_pitch + c]));
  }
  const Doubles l = widened(left), r = widened(right), cores = widened(core);
  std::vector<Doubles> prefixes(1, Doubles(k * k)), suffixes(depth + 1);
  for (int64_t i = 0; i < k; ++i) prefixes[0][i * k + i] = 1;
  suffixes[depth] = prefixes[0];
  auto layer = [&](int64_t i) { return Doubles(cores.begin() + i * k * k, cores.begin() + (i + 1) * k * k); };
  for (int64_t i = 0; i < depth; ++i) prefixes.push_back(times(layer(i), turn(prefixes[i], k, k), k, k, k));
  for (int64_t i = depth - 1; i >= 0; --i) suffixes[i] = times(suffixes[i + 1], turn(layer(i), k, k), k, k, k);
  Doubles c = prefixes[depth];
  for (int64_t i = 0; i < k; ++i) c[i * k + i] -= f.shift;
  const Doubles z1 = times(xs, r, t, k, n);
  Doubles z2 = times(z1, c, t, k, k), g2 = times(dys, turn(l, m, k), t, k, m), g1 = times(g2, turn(c, k, k), t, k, k);
  for (double& v : z2) v *= f.scale;
  for (double& v : g1) v *= f.scale;
  Doubles want_y = times(z2, l, t, m, k), want_dx = times(g1, turn(r, k, n), t, n, k);
  for (int64_t i = 0; i < t * m; ++i) want_y[i] += biased ? double(lrk::widen_one(bias[i % m])) : 0.0;
  for (int64_t i = 0; i < t * n; ++i) want_dx[i] *= mask[i];
  Doubles dc = times(turn(g2, t, k), turn(z1, t, k), k, k, t), want_dcore;
  for (double& v : dc) v *= f.scale;
  for (int64_t i = 0; i < depth; ++i) {
    const Doubles g = times(times(turn(suffixes[i + 1], k, k), turn(dc, k, k), k, k, k), prefixes[i], k, k, k);
    want_dcore.insert(want_dcore.end(), g.begin(), g.end());
  }

  const double unit = std::is_same_v<X, double> ? 2.3e-16 : 1.2e-7;
  int bad = 0;
  auto compare = [&](const char* name, const Doubles& got, const Doubles& want, double rounding) {
    double scale = 1e-30, worst = 0;
    for (double v : want) scale = std::max(scale, std::abs(v));
    for (size_t i = 0; i < want.size(); ++i) {
      const double error = std::abs(got[i] - want[i]) / scale;
      if (!(error <= worst)) worst = error;  // NaN counts
    }
    if (worst <= 40 * unit + rounding) return;
    std::printf("%ld x %ld -> %ld, rank %ld, depth %ld, type %d %d, dropout %d, bias %d: %s is off by %.3g\n", long(t), long(n),
                long(m), long(k), long(depth), int(kType<X>), int(kType<F>), dropped, biased, name, worst);
    ++bad;
  };
  auto rounding = [](DType type) { return type == DType::bfloat16 ? 4e-3 : type == DType::float16 ? 5e-4 : 0.0; };
  const double of_x = rounding(kType<X>), of_f = rounding(kType<F>);
  Doubles both = z1;
  both.insert(both.end(), z2.begin(), z2.end());
  compare("z", widened(z), both, 0);
  compare("y", widened(y), want_y, of_x);
  compare("dx", widened(dx), want_dx, of_x);
  compare("dleft", widened(dleft), times(turn(dys, t, m), turn(z2, t, k), m, k, t), of_f);
  compare("dright", widened(dright), times(turn(g1, t, k), turn(xs, t, n), k, n, t), of_f);
  compare("dcore", widened(dcore), want_dcore, of_f);
  return bad;
}

// Every 16-bit number widens to what arithmetic says and narrows back to itself; halves between neighbours go to the even one.
template <typename H>
int conversions(int exponent_bits, int fraction_bits) {
  int bad = 0;
  const int bias = (1 << (exponent_bits - 1)) - 1, largest = (1 << exponent_bits) - 1;
  auto value = [&](uint32_t bits) {
    const int exponent = int(bits >> fraction_bits), fraction = int(bits & ((1u << fraction_bits) - 1));
    return exponent ? std::ldexp(double((1 << fraction_bits) + fraction), exponent - bias - fraction_bits)
                    : std::ldexp(double(fraction), 1 - bias - fraction_bits);
  };
  for (uint32_t bits = 0; bits < 0x8000; ++bits)
    for (uint32_t sign : {0u, 0x8000u}) {
      const H number{uint16_t(bits | sign)};
      const float wide = lrk::widen_one(number);
      float row[17];
      const std::vector<H> line(17, number);
      lrk::widen_row(row, line.data(), 17);
      H back[LRK_VECTOR_BYTES / 4], one;
      lrk::narrow_one(&one, wide);
      lrk::narrow(back, wide - lrk::Vector<float>::type{});
      const bool special = int(bits >> fraction_bits) == largest, nan = special && (bits & ((1u << fraction_bits) - 1));
      if (nan) {
        bad += !(std::isnan(wide) && std::isnan(row[16]) && std::isnan(lrk::widen_one(one)) &&
                 std::isnan(lrk::widen_one(back[0])));
        continue;
      }
      const double wanted = (special ? INFINITY : value(bits)) * (sign ? -1 : 1);
      bad += double(wide) != wanted || double(row[0]) != wanted || double(row[16]) != wanted;
      bad += one.bits != number.bits || (bits && back[0].bits != number.bits);
      if (special || int((bits + 1) >> fraction_bits) == largest) continue;
      const double half = (value(bits) + value(bits + 1)) / 2;
      for (double nudge : {-1e-3, 0.0, 1e-3}) {
        const float between = float(half + nudge * (value(bits + 1) - value(bits)));
        const uint32_t want = nudge < 0 || (nudge == 0 && bits % 2 == 0) ? bits : bits + 1;
        lrk::narrow_one(&one, sign ? -between : between);
        lrk::narrow(back, (sign ? -between : between) - lrk::Vector<float>::type{});
        bad += one.bits != (want | sign) || back[0].bits != (want | sign);
      }
    }
  return bad;
}

int main() {
  int failed = 0, passed = 0;
  unsigned number = 1;
  const Shape shapes[] = {{1, 1, 1, 1, 1},      {0, 7, 5, 3, 2},       {5, 0, 4, 2, 1},     {5, 4, 0, 2, 3},
                          {3, 100, 97, 16, 3},  {17, 33, 40, 8, 0},    {49, 97, 64, 9, 2},  {64, 96, 96, 16, 3},
                          {97, 200, 31, 17, 1}, {130, 65, 193, 33, 4}, {40, 50, 60, 64, 2}, {29, 31, 17, 130, 1},
                          {25, 12, 13, 256, 1}};
  for (const Shape& shape : shapes)
    for (int options = 0; options < 4; ++options) {
      const bool dropped = options & 1, biased = options & 2;
      for (int bad :
           {check<float, float>(shape, dropped, biased, number++), check<double, double>(shape, dropped, biased, number++),
            check<lrk::Bfloat16, float>(shape, dropped, biased, number++),
            check<lrk::Bfloat16, lrk::Bfloat16>(shape, dropped, biased, number++),
            check<lrk::Float16, float>(shape, dropped, biased, number++)})
        bad ? ++failed : ++passed;
    }
  const int wrong = conversions<lrk::Bfloat16>(8, 7) + conversions<lrk::Float16>(5, 10);
  std::printf("%d-byte vectors: %d passed, %d failed, %d conversions wrong\n", LRK_VECTOR_BYTES, passed, failed, wrong);
  return failed != 0 || wrong != 0;
}
