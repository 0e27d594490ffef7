// scheduler.h: runs a grid of CUDA threads on a CPU, one block at a time, a fiber a thread.
//
// A thread runs until it waits for others: at __syncthreads, or in a warp operation. Who runs next is the schedule's choice;
// a correct kernel gives the same bits under all of them.
//
//   random    every warp takes part in a round with probability 1/2, its threads in random order; blocks in random order;
//             half of the asynchronous copies land at once, half when they are waited for
//   forward   threads and blocks in order; copies land at once
//   reverse   the other way round; copies land when they are waited for, as late as they may
//   ahead     one warp runs until it waits at __syncthreads, then the next: neighbours are as far apart as the source allows;
//             blocks in random order; copies land late
//
// scheduler.cpp is never compiled with ThreadSanitizer, which must see the kernels' memory only: what passes through the
// scheduler itself orders nothing, but __syncthreads, __syncwarp, and the start and end of a launch do.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_on_cpu {

enum class Schedule { random, forward, reverse, ahead };

struct Settings {
  Schedule schedule = Schedule::random;
  unsigned seed = 1;
  int poison = 0xFF;  // what memory holds before it is written: 0xFF bytes are a NaN in every type
};
extern Settings settings;

// Line of the source that waits; a default argument of this type takes the caller's.
struct Site {
  const char* file;
  int line;
  Site(const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE()) : file(file_), line(line_) {}
};

// What threadIdx and its like read; of the thread that runs.
struct Here {
  dim3 thread, block, block_size, grid_size;
  int lane;
  unsigned char* shared;
};
extern Here here;

// ---- called by kernels, through cuda.h and ptx.h

// Both are strict where GPUs forgive: a thread that has ended is waited for, for ever, and everybody has to come to the same
// line of the source. Either is reported.
void sync_block(Site site);

// Every lane of `mask` brings `operands`; when all have come, `finish` gets the operands of lanes 0 to 31, null for those
// outside the mask, and computes all results into them.
typedef void (*Finish)(void* const* operands, unsigned mask);
void sync_warp(unsigned mask, void* operands, Finish finish, bool orders_memory, Site site);

struct Copy {  // 16 bytes from global to shared memory, or zeros
  void* to;
  const void* from;  // null: zeros
};
bool lands_now();                        // else start_copy() keeps it back
void start_copy(const Copy& copy);       // of the group that the next end_group() closes
void end_group();                        // commit
bool take_copy(int groups, Copy& copy);  // the next one that has to land before at most `groups` groups are under way

// Ends the program: what went wrong, in which kernel, block and thread.
[[noreturn]] void stop(const std::string& what);
std::string position();  // of the thread that runs, in words; empty between launches

// ---- called by launches, through cuda.h

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  void (*run)(const void*);  // one thread
  const void* arguments;
};
void run_grid(const Launch& launch);

// Every kernel that launch code names is remembered when the program starts, also if it is never launched.
bool remember_kernel(const char* name);
struct KernelUse {
  std::string name;
  long launches;
};
std::vector<KernelUse> kernels();

}  // namespace cuda_on_cpu
