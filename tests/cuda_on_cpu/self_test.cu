// self_test.cu: proves the layer itself. Kernels of one warp or block write what each primitive gave; main() compares that with
// a loop over plain arrays, in which the PTX ISA's fragment layouts are written down a second time.
//
// Built by nvcc the same comparisons hold the same statements against a GPU. With the name of a mistake as argument, on a CPU
// only, a kernel makes it, and the layer has to end the program with a report.
#include <cstdio>
#include <random>

#include "machine.h"
// machine.h first: it brings what cuda_utils.cuh and ptx.cuh ask for.
#include "cuda_utils.cuh"
#include "ptx.cuh"

namespace {

constexpr int kLanes = 32;
constexpr int kBlockThreads = 96;

int failures = 0;

void expect(const char* what, bool right) {
  if (right) return;
  ++failures;
  std::printf("FAILED %s\n", what);
}

template <typename T>
struct Numbers {  // an array for kernels
  machine::Array memory;
  std::vector<T> host;
  explicit Numbers(size_t count) : memory("numbers", count * sizeof(T), 16, 0), host(count) {}
  explicit Numbers(const std::vector<T>& values) : Numbers(values.size()) {
    host = values;
    memory.fill_and_protect(host.data());
  }
  T* data() const { return static_cast<T*>(memory.data()); }
  const std::vector<T>& read() {
    const std::string error = machine::finish();
    if (!error.empty()) throw std::runtime_error(error);
    memory.read(host.data());
    return host;
  }
};

// ---- shuffles and votes

constexpr int kShuffles = 5;

__global__ void shuffle_kernel(const int* values, int* out, int argument, int width) {
  const int lane = int(threadIdx.x), mine = values[lane];
  out[lane] = __shfl_sync(~0u, mine, argument, width);
  out[kLanes + lane] = __shfl_xor_sync(~0u, mine, argument, width);
  out[2 * kLanes + lane] = __shfl_down_sync(~0u, mine, unsigned(argument), width);
  out[3 * kLanes + lane] = __shfl_up_sync(~0u, mine, unsigned(argument), width);
  // The halves of a warp on their own, in different order of the lanes.
  const unsigned half = lane < 16 ? 0xFFFFu : 0xFFFF0000u;
  out[4 * kLanes + lane] = __shfl_xor_sync(half, mine, 15 & argument);
}

void test_shuffles() {
  std::vector<int> values(kLanes);
  for (int i = 0; i < kLanes; ++i) values[i] = 100 + 7 * i;
  for (int width = 1; width <= 32; width *= 2)
    for (int argument = 0; argument < 32; ++argument) {
      const Numbers<int> in(values);
      Numbers<int> out(kShuffles * kLanes);
      LRK_LAUNCH(shuffle_kernel, 1, kLanes, 0, nullptr, in.data(), out.data(), argument, width);
      const std::vector<int>& got = out.read();
      for (int lane = 0; lane < kLanes; ++lane) {
        const int section = lane - lane % width, place = lane % width;
        const int crossed = lane ^ argument;
        expect("shfl", got[lane] == values[section + argument % width]);
        expect("shfl_xor", got[kLanes + lane] == values[crossed < section + width ? crossed : lane]);
        expect("shfl_down", got[2 * kLanes + lane] == values[place + argument < width ? lane + argument : lane]);
        expect("shfl_up", got[3 * kLanes + lane] == values[place - argument >= 0 ? lane - argument : lane]);
        expect("shfl_xor of half a warp", got[4 * kLanes + lane] == values[lane ^ (argument & 15)]);
      }
    }
}

__global__ void vote_kernel(unsigned yes, unsigned* out) {
  const int lane = int(threadIdx.x);
  const unsigned mask = lane < 20 ? 0xFFFFFu : 0xFFF00000u;
  const int mine = int(yes >> lane & 1u);
  out[lane] = __ballot_sync(mask, mine);
  out[kLanes + lane] = unsigned(__any_sync(mask, mine));
  out[2 * kLanes + lane] = unsigned(__all_sync(mask, mine));
}

void test_votes() {
  for (const unsigned yes : {0u, ~0u, 0x12345678u, 0xFFFFFu, 0xFFF00000u, 1u, 0x80000000u}) {
    Numbers<unsigned> out(3 * kLanes);
    LRK_LAUNCH(vote_kernel, 1, kLanes, 0, nullptr, yes, out.data());
    const std::vector<unsigned>& got = out.read();
    for (int lane = 0; lane < kLanes; ++lane) {
      const unsigned mask = lane < 20 ? 0xFFFFFu : 0xFFF00000u;
      expect("ballot", got[lane] == (yes & mask));
      expect("any", got[kLanes + lane] == unsigned((yes & mask) != 0));
      expect("all", got[2 * kLanes + lane] == unsigned((yes & mask) == mask));
    }
  }
}

// ---- blocks: indices, barriers, shared memory, atomics

__global__ void block_kernel(int* out, int* sums) {
  LRK_DYN_SMEM(int, shared);
  const int number = int(threadIdx.x + blockDim.x * threadIdx.y), size = int(blockDim.x * blockDim.y);
  const int block = int(blockIdx.x + gridDim.x * blockIdx.y);
  shared[number] = 1000 * block + number;
  __syncthreads();
  for (int round = 0; round < 3; ++round) {  // everybody reads what the next warp wrote
    const int theirs = shared[(number + 33) % size];
    __syncthreads();
    shared[number] = theirs + 1;
    __syncthreads();
  }
  out[block * size + number] = shared[number];
  atomicAdd(&sums[0], number);
  atomicMax(&sums[1], 1000 * block + number);
  if (atomicCAS(&sums[2], -1, block) == -1) atomicExch(&sums[3], block);
}

__global__ void clear_kernel(int* sums) {
  sums[threadIdx.x] = threadIdx.x == 2 ? -1 : 0;
}

void test_blocks() {
  const dim3 grid(3, 2), block(16, kBlockThreads / 16);
  Numbers<int> out(6 * kBlockThreads), sums(4);
  LRK_LAUNCH(clear_kernel, 1, 4, 0, nullptr, sums.data());
  LRK_LAUNCH(block_kernel, grid, block, kBlockThreads * sizeof(int), nullptr, out.data(), sums.data());
  const std::vector<int>& got = out.read();
  for (int b = 0; b < 6; ++b)
    for (int n = 0; n < kBlockThreads; ++n)
      expect("block", got[b * kBlockThreads + n] == 1000 * b + (n + 99) % kBlockThreads + 3);
  const std::vector<int>& total = sums.read();
  expect("atomicAdd", total[0] == 6 * kBlockThreads * (kBlockThreads - 1) / 2);
  expect("atomicMax", total[1] == 5000 + kBlockThreads - 1);
  expect("atomicCAS and atomicExch", total[2] == total[3] && total[2] >= 0 && total[2] < 6);
}

// ---- asynchronous copies: groups land one by one, and the bytes that are outside are zero

__global__ void copy_kernel(const int* in, int* out, int inside) {
  LRK_DYN_SMEM(int, shared);
  const int lane = int(threadIdx.x);
  for (int group = 0; group < 3; ++group) {
    const bool mine = lane + kLanes * group < inside;
    lrk::copy_async(shared + 4 * (lane + kLanes * group), mine ? in + 4 * (lane + kLanes * group) : in, mine);
    lrk::copy_commit();
  }
  lrk::copy_wait<1>();
  __syncwarp();
  for (int i = lane; i < 8 * kLanes; i += kLanes) out[i] = shared[i];  // of groups 0 and 1
#ifdef LRK_CUDA_ON_CPU                                                 // group 2 is under way: on a GPU it may have landed
  for (int i = 8 * kLanes + lane; i < 12 * kLanes; i += kLanes) out[12 * kLanes + i] = shared[i];
#endif
  __syncwarp();
  lrk::copy_wait<0>();
  __syncwarp();
  for (int i = 8 * kLanes + lane; i < 12 * kLanes; i += kLanes) out[i] = shared[i];
}

void test_copies() {
  std::vector<int> values(12 * kLanes);
  for (size_t i = 0; i < values.size(); ++i) values[i] = int(i) + 1;
  for (const int inside : {96, 80, 31, 0}) {
    const Numbers<int> in(values);
    Numbers<int> out(24 * kLanes);
    LRK_LAUNCH(copy_kernel, 1, kLanes, 12 * kLanes * sizeof(int), nullptr, in.data(), out.data(), inside);
    const std::vector<int>& got = out.read();
    for (int i = 0; i < 12 * kLanes; ++i) expect("cp.async", got[i] == (i / 4 < inside ? values[i] : 0));
#ifdef LRK_CUDA_ON_CPU
    int early = 0, poison = 0;
    std::memset(&poison, cuda_on_cpu::settings.poison, sizeof(int));
    for (int i = 20 * kLanes; i < 24 * kLanes; ++i) early += got[i] != poison;
    const bool late = cuda_on_cpu::settings.schedule == cuda_on_cpu::Schedule::reverse ||
                      cuda_on_cpu::settings.schedule == cuda_on_cpu::Schedule::ahead;
    expect("cp.async lands when it is waited for, not before", !late || early == 0);
    if (cuda_on_cpu::settings.schedule == cuda_on_cpu::Schedule::forward) expect("cp.async at once", early == 4 * kLanes);
#endif
  }
}

// ---- matrix fragments, by the formulas of the PTX ISA

template <bool kTranspose>
__global__ void load_kernel(const uint16_t* in, uint32_t* out) {
  LRK_DYN_SMEM(uint16_t, shared);
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += kLanes) shared[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  lrk::load_matrices<kTranspose>(r, shared + 8 * lane);  // matrix lane / 8, row lane % 8
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

template <bool kTranspose>
void test_load() {
  std::vector<uint16_t> values(256);
  for (size_t i = 0; i < values.size(); ++i) values[i] = uint16_t(40000 + 11 * i);
  const Numbers<uint16_t> in(values);
  Numbers<uint32_t> out(4 * kLanes);
  LRK_LAUNCH(load_kernel<kTranspose>, 1, kLanes, 512, nullptr, in.data(), out.data());
  const std::vector<uint32_t>& got = out.read();
  // Number e of matrix m, counted row by row, is in lane e / 2, half e % 2.
  for (int m = 0; m < 4; ++m)
    for (int e = 0; e < 64; ++e) {
      const int row = e / 8, column = e % 8;
      const uint16_t wanted = values[64 * m + (kTranspose ? 8 * column + row : 8 * row + column)];
      expect(kTranspose ? "ldmatrix.trans" : "ldmatrix", uint16_t(got[4 * (e / 2) + m] >> (16 * (e % 2))) == wanted);
    }
}

template <typename T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int lane = int(threadIdx.x);
  const uint32_t mine[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
  float sum[4] = {c[4 * lane], c[4 * lane + 1], c[4 * lane + 2], c[4 * lane + 3]};
  lrk::mma<T>(sum, mine, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sum[i];
}

// Small whole numbers: exact in both types, as are their sums.
template <typename T>
uint16_t bits_of(int value) {
  const T rounded = T(float(value));
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}

template <typename T>
void test_mma() {
  std::mt19937 random(3);
  auto draw = [&] { return int(random() % 17) - 8; };
  int a[16][16], b[16][8], c[16][8];
  for (auto& row : a)
    for (int& v : row) v = draw();
  for (auto& row : b)
    for (int& v : row) v = draw();
  for (auto& row : c)
    for (int& v : row) v = draw();
  std::vector<uint16_t> a_bits(8 * kLanes), b_bits(4 * kLanes);
  std::vector<float> c_numbers(4 * kLanes);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;  // groupID and threadID_in_group of the ISA
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a_bits[8 * lane + i] = bits_of<T>(a[row][column]);
    }
    for (int i = 0; i < 4; ++i) b_bits[4 * lane + i] = bits_of<T>(b[in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)][group]);
    for (int i = 0; i < 4; ++i) c_numbers[4 * lane + i] = float(c[i < 2 ? group : group + 8][in_group * 2 + (i & 1)]);
  }
  auto words = [](const std::vector<uint16_t>& bits) {
    std::vector<uint32_t> packed(bits.size() / 2);
    for (size_t i = 0; i < packed.size(); ++i) packed[i] = bits[2 * i] | uint32_t(bits[2 * i + 1]) << 16;
    return packed;
  };
  const Numbers<uint32_t> a_in(words(a_bits)), b_in(words(b_bits));
  const Numbers<float> c_in(c_numbers);
  Numbers<float> d(4 * kLanes);
  LRK_LAUNCH(mma_kernel<T>, 1, kLanes, 0, nullptr, a_in.data(), b_in.data(), c_in.data(), d.data());
  const std::vector<float>& got = d.read();
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
      int wanted = c[row][column];
      for (int k = 0; k < 16; ++k) wanted += a[row][k] * b[k][column];
      expect("mma", got[4 * lane + i] == float(wanted));
    }
}

template <typename T>
__global__ void round_kernel(const float* in, uint32_t* out, int count) {
  for (int i = int(threadIdx.x); i < count / 2; i += kLanes) out[i] = lrk::pack<T>(in[2 * i], in[2 * i + 1]);
}

// pack() rounds to nearest, ties to even: between two neighbours of the type the nearer one comes out.
template <typename T>
void test_rounding(int mantissa) {
  std::vector<float> values;
  std::vector<float> wanted;
  for (int i = 0; i < 64; ++i)
    for (const double part : {0.0, 0.25, 0.5, 0.75}) {
      const double step = 1.0 / (1 << mantissa);
      values.push_back(float(1 + (i + part) * step));
      wanted.push_back(float(1 + (part < 0.5 ? i : part > 0.5 ? i + 1 : i + i % 2) * step));
    }
  const Numbers<float> in(values);
  Numbers<uint32_t> out(values.size() / 2);
  LRK_LAUNCH(round_kernel<T>, 1, kLanes, 0, nullptr, in.data(), out.data(), int(values.size()));
  const std::vector<uint32_t>& got = out.read();
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits = uint16_t(got[i / 2] >> (16 * (i % 2)));
    T number;
    std::memcpy(&number, &bits, 2);
    expect("pack", float(number) == wanted[i]);
  }
}

// ---- mistakes

#ifdef LRK_CUDA_ON_CPU

__global__ void mistaken_kernel(int mistake, const int* in, int* out) {
  LRK_DYN_SMEM(int, shared);
  const int t = int(threadIdx.x);
  switch (mistake) {
    case 0:  // a barrier that half the block does not reach
      if (t < 48) __syncthreads();
      break;
    case 1:  // two barriers at once
      if (t < 48)
        __syncthreads();
      else
        __syncthreads();
      break;
    case 2:  // lanes of one warp in different operations
      if (t % 2)
        out[t] = __shfl_xor_sync(~0u, t, 1);
      else
        out[t] = __shfl_sync(~0u, t, 1);
      break;
    case 3:  // a lane outside the mask is read
      out[t] = t % 32 < 16 ? __shfl_sync(0xFFFFu, t, 20) : 0;
      break;
    case 4:  // the caller is outside its mask
      out[t] = __shfl_sync(1u, t, 0);
      break;
    case 5: lrk::copy_async(shared + 4, in + 1, true); break;
    case 6: {
      uint32_t r[4];
      lrk::load_matrices<false>(r, shared + 1);
      break;
    }
    case 7: out[kBlockThreads + t] = 1; break;
    case 8: out[-1 - t] = 1; break;
    case 9: const_cast<int*>(in)[t] = 1; break;
    case 10: shared[kBlockThreads + t] = 1; break;
    case 11: out[kBlockThreads - 1] = 1; break;     // within the page: found by the bytes around
    case 12: shared[kBlockThreads - 1] = 1; break;  // likewise
  }
}
__global__ void empty_kernel(int*) {}

struct Mistake {
  const char* name;
  int number;
};
constexpr Mistake kMistakes[] = {{"barrier-missed", 0},       {"barriers-mixed", 1},      {"warp-mixed", 2},
                                 {"lane-outside-mask", 3},    {"caller-outside-mask", 4}, {"copy-misaligned", 5},
                                 {"matrix-misaligned", 6},    {"past-the-end", 7},        {"before-the-start", 8},
                                 {"input-written", 9},        {"past-shared", 10},        {"slack-written", 11},
                                 {"shared-slack-written", 12}};

int make_mistake(const std::string& name) {
  const Numbers<int> in(std::vector<int>(kBlockThreads, 1));
  Numbers<int> out(kBlockThreads - 1);  // one less, so that the page is not the end
  std::string error;
  if (name == "shared-not-allowed") {
    LRK_LAUNCH(empty_kernel, 1, 32, 49 << 10, nullptr, out.data());
  } else if (name == "shared-too-large") {
    cudaFuncSetAttribute(&empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10);
  } else if (name == "block-too-large") {
    LRK_LAUNCH(empty_kernel, 1, 1025, 0, nullptr, out.data());
  } else if (name == "grid-empty") {
    LRK_LAUNCH(empty_kernel, 0, 32, 0, nullptr, out.data());
  } else {
    for (const Mistake& mistake : kMistakes)
      if (name == mistake.name)
        LRK_LAUNCH(mistaken_kernel, 1, kBlockThreads, (kBlockThreads - 1) * sizeof(int), nullptr, mistake.number, in.data(),
                   out.data());
    error = out.memory.damage();
  }
  try {
    lrk::check_launch("self_test", name.c_str());
  } catch (const std::exception& refused) {
    error = refused.what();
  }
  if (error.empty()) return 0;  // nothing was noticed
  std::fprintf(stderr, "%s\n", error.c_str());
  return 3;
}

#endif

}  // namespace

int main(int argc, char** argv) {
  machine::start(argc, argv);
#ifdef LRK_CUDA_ON_CPU
  if (argc % 2 == 0) return make_mistake(argv[argc - 1]);
#endif
  test_shuffles();
  test_votes();
  test_blocks();
  test_copies();
  test_load<false>();
  test_load<true>();
  test_mma<__nv_bfloat16>();
  test_mma<__half>();
  test_rounding<__nv_bfloat16>(7);
  test_rounding<__half>(10);
  std::printf("%d wrong\n", failures);
  return failures != 0;
}
