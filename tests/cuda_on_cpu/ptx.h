// ptx.h: the functions of csrc/ptx.cuh, which says what they do, on a CPU. Included after cuda.h, before a .cu file.
#pragma once
#include "cuda.h"

namespace lrk {

inline void require_aligned(const void* address, const char* instruction) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    cuda_on_cpu::stop(std::string("misaligned ") + instruction + ": the address is " +
                      std::to_string(reinterpret_cast<uintptr_t>(address) % 16) + " bytes after a multiple of 16");
}

// ---- asynchronous copies. They land in the thread that started them, at once or when it waits, as the schedule says.

inline void land(const cuda_on_cpu::Copy& copy) {
  auto* const to = static_cast<uint32_t*>(copy.to);
  const auto* const from = static_cast<const uint32_t*>(copy.from);
  for (int i = 0; i < 4; ++i) to[i] = from ? from[i] : 0;
}

inline void copy_async(void* shared, const void* global, bool inside) {
  require_aligned(shared, "cp.async (shared)");
  require_aligned(global, "cp.async (global)");
  const cuda_on_cpu::Copy copy = {shared, inside ? global : nullptr};
  if (cuda_on_cpu::lands_now())
    land(copy);
  else
    cuda_on_cpu::start_copy(copy);
}
inline void copy_commit() {
  cuda_on_cpu::end_group();
}
template <int kGroups>
void copy_wait() {
  cuda_on_cpu::Copy copy;
  while (cuda_on_cpu::take_copy(kGroups, copy)) land(copy);
}

// ---- matrix fragments

struct MatrixRows {
  uint16_t row[8];  // that this lane's address names: row lane % 8 of matrix lane / 8
  uint32_t result[4];
};
CUDA_ON_CPU_UNSEEN inline uint32_t entry(void* const* operands, int matrix, int row, int column) {
  return static_cast<const MatrixRows*>(operands[8 * matrix + row])->row[column];
}
template <bool kTranspose>
CUDA_ON_CPU_UNSEEN void finish_load_matrices(void* const* operands, unsigned) {
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = kTranspose ? entry(operands, matrix, column, row) : entry(operands, matrix, row, column);
      const uint32_t high = kTranspose ? entry(operands, matrix, column + 1, row) : entry(operands, matrix, row, column + 1);
      static_cast<MatrixRows*>(operands[lane])->result[matrix] = low | high << 16;
    }
}
template <bool kTranspose>
void load_matrices(uint32_t (&r)[4], const void* row, cuda_on_cpu::Site site = {}) {
  require_aligned(row, "ldmatrix");
  MatrixRows mine;
  for (int i = 0; i < 8; ++i) mine.row[i] = static_cast<const uint16_t*>(row)[i];
  cuda_on_cpu::sync_warp(~0u, &mine, finish_load_matrices<kTranspose>, false, site);
  for (int i = 0; i < 4; ++i) r[i] = mine.result[i];
}

template <typename T>
inline float number(uint32_t pair, int half) {
  T value;
  value.bits = uint16_t(pair >> (16 * half));
  return static_cast<float>(value);
}

// The layout of m16n8k16, PTX ISA, "Matrix Fragments for mma.m16n8k16": register r of a lane holds of A row
// lane / 4 (+ 8 for r = 1, 3), columns lane % 4 * 2 and the next (+ 8 for r = 2, 3); of B rows lane % 4 * 2 and the next
// (+ 8 for r = 1), column lane / 4; number i of D is row lane / 4 (+ 8 for i = 2, 3), column lane % 4 * 2 + i % 2.
struct MmaOperands {
  uint32_t a[4], b[2];
  float d[4];
};
template <typename T>
CUDA_ON_CPU_UNSEEN void finish_mma(void* const* operands, unsigned) {
  float a[16][16], b[8][16];  // b transposed
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MmaOperands*>(operands[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][pair + r / 2 * 8 + half] = number<T>(mine.a[r], half);
      for (int r = 0; r < 2; ++r) b[group][pair + r * 8 + half] = number<T>(mine.b[r], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      static_cast<MmaOperands*>(operands[lane])->d[i] += sum;
    }
}
template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, cuda_on_cpu::Site site = {}) {
  MmaOperands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  cuda_on_cpu::sync_warp(~0u, &mine, finish_mma<T>, false, site);
  for (int i = 0; i < 4; ++i) d[i] = mine.d[i];
}

template <typename T>
uint32_t pack(float low, float high) {
  return T(low).bits | uint32_t(T(high).bits) << 16;
}

}  // namespace lrk
