// scheduler.cpp: the fibers behind scheduler.h. Compile without -fsanitize=thread (LRK_TSAN says that the rest has it).
#include "scheduler.h"

#include <ucontext.h>

#include <algorithm>
#include <limits>
#include <map>
#include <memory>

#include "guarded.h"

// Of the two ways to change stacks the one in assembly makes no system calls, several times faster; the sanitizers follow
// swapcontext, as do other processors.
#if defined(__x86_64__) && !defined(LRK_TSAN) && !defined(__SANITIZE_ADDRESS__)
#define SWITCH_IN_ASSEMBLY 1
#else
#define SWITCH_IN_ASSEMBLY 0
#endif

#if defined(LRK_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace cuda_on_cpu {

Settings settings;
Here here = {};

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // its frames are large
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kPage = 4096;
constexpr int kMaxCopies = 256, kMaxGroups = 64;  // under way, a thread

enum class State : uint8_t { ready, at_block, at_warp, ended };

struct Thread {
  void* stack_pointer;
  ucontext_t context;
  void* tsan;
  State state;
  int number, lane, warp;
  Site site;
  unsigned mask;   // of the warp operation it waits in
  void* operands;  // brought to it
  // Rings: copies not landed, and where each group ends, both counted from the start of the kernel.
  Copy copies[kMaxCopies];
  int group_end[kMaxGroups];
  int first_copy, last_copy, first_group, last_group;
};

struct Warp {
  unsigned lanes;    // that exist: the last warp of a block may be short
  unsigned arrived;  // and wait in a warp operation
};

// Stacks, and what ThreadSanitizer calls fibers, for the threads of a block.
struct Pool {
  char* stacks = nullptr;
  int capacity = 0;
  std::vector<void*> tsan;
};
#if defined(LRK_TSAN)
constexpr int kPools = 4;
#else
constexpr int kPools = 1;
#endif
Pool pools[kPools];

// Names, to ThreadSanitizer, of what orders memory. Those of a block are new with every block: it remembers all that was ever
// ordered by a name.
char start_order, end_order;
struct Orders {
  char block, warp[32];
};
[[maybe_unused]] Orders no_orders;
#if defined(LRK_TSAN)
Orders* orders = nullptr;
#else
Orders* const orders = &no_orders;
#endif

const Launch* launch = nullptr;
Thread* current = nullptr;
std::unique_ptr<Thread[]> threads;
std::unique_ptr<Warp[]> warps;
std::unique_ptr<Guarded> shared;
int thread_count = 0, warp_count = 0, waiting = 0, alive = 0;
[[maybe_unused]] void* scheduler_stack_pointer = nullptr;
[[maybe_unused]] ucontext_t scheduler_context;
[[maybe_unused]] void* scheduler_tsan = nullptr;

// SplitMix64. Not one of the standard library's: its templates may be shared with files that ThreadSanitizer watches.
struct RandomBits {
  typedef uint64_t result_type;
  uint64_t state = 0;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return std::numeric_limits<uint64_t>::max(); }
  uint64_t operator()() {
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }
};
RandomBits random_bits;

std::map<std::string, long>& uses() {
  static std::map<std::string, long> map;
  return map;
}

void release(char* order) {
#if defined(LRK_TSAN)
  __tsan_release(order);
#else
  (void)order;
#endif
}
void acquire(char* order) {
#if defined(LRK_TSAN)
  __tsan_acquire(order);
#else
  (void)order;
#endif
}

std::string text(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}
std::string text(const Site& site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

// ---- changing stacks

#if SWITCH_IN_ASSEMBLY
// Keeps what a call must keep on the stack that is left, its top in *from.
__attribute__((naked, noinline)) void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret)");
}
#endif

void leave(Thread& thread) {  // to the scheduler
#if defined(LRK_TSAN)
  __tsan_switch_to_fiber(scheduler_tsan, 1);  // 1: the switch itself orders nothing
#endif
#if SWITCH_IN_ASSEMBLY
  switch_stack(&thread.stack_pointer, scheduler_stack_pointer);
#else
  swapcontext(&thread.context, &scheduler_context);
#endif
}

void enter(Thread& thread) {
  current = &thread;
  const dim3& size = launch->block;
  const unsigned n = unsigned(thread.number);
  here.thread = dim3(n % size.x, n / size.x % size.y, n / (size.x * size.y));
  here.lane = thread.lane;
#if defined(LRK_TSAN)
  __tsan_switch_to_fiber(thread.tsan, 1);
#endif
#if SWITCH_IN_ASSEMBLY
  switch_stack(&scheduler_stack_pointer, thread.stack_pointer);
#else
  swapcontext(&scheduler_context, &thread.context);
#endif
}

void run_thread() {
  acquire(&start_order);
  launch->run(launch->arguments);
  release(&end_order);
  current->state = State::ended;
  --alive;
  leave(*current);
  std::abort();  // nobody enters an ended thread
}

// Blocks take turns with the pools. A fiber costs ThreadSanitizer more than a millisecond, and a race between two blocks is
// seen where their threads are different fibers: between any two of kPools neighbours in the order of blocks.
void prepare_pool(Pool& pool) {
  if (thread_count <= pool.capacity) return;
  const size_t each = kStackBytes + kPage;
  if (pool.stacks) munmap(pool.stacks, pool.capacity * each);
  pool.capacity = thread_count;
  pool.stacks = static_cast<char*>(
      mmap(nullptr, pool.capacity * each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (int i = 0; i < pool.capacity; ++i) mprotect(pool.stacks + i * each, kPage, PROT_NONE);
#if defined(LRK_TSAN)
  while (int(pool.tsan.size()) < pool.capacity) pool.tsan.push_back(__tsan_create_fiber(0));
#endif
}

void prepare_thread(const Pool& pool, int number) {
  Thread& t = threads[number];
  t.state = State::ready;
  t.number = number;
  t.lane = number % 32;
  t.warp = number / 32;
  t.first_copy = t.last_copy = t.first_group = t.last_group = 0;
  char* const stack = pool.stacks + number * (kStackBytes + kPage) + kPage;
#if SWITCH_IN_ASSEMBLY
  void** const top = reinterpret_cast<void**>(stack + kStackBytes - 64);  // what a call of run_thread would find, 8 mod 16
  top[0] = reinterpret_cast<void*>(&run_thread);
  std::fill(top - 6, top, nullptr);
  t.stack_pointer = top - 6;
#else
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = stack;
  t.context.uc_stack.ss_size = kStackBytes;
  t.context.uc_link = nullptr;
  makecontext(&t.context, run_thread, 0);
#endif
#if defined(LRK_TSAN)
  t.tsan = pool.tsan[number];
#endif
}

// ---- who runs next

void collect_ready(std::vector<Thread*>& ready, int warp) {
  for (int i = 32 * warp; i < std::min(thread_count, 32 * warp + 32); ++i)
    if (threads[i].state == State::ready) ready.push_back(&threads[i]);
}

// The threads of one round, in order; empty where nobody can run.
void choose(std::vector<Thread*>& ready) {
  ready.clear();
  static std::vector<int> order;
  order.resize(warp_count);
  for (int w = 0; w < warp_count; ++w) order[w] = w;
  if (settings.schedule == Schedule::ahead) {
    // The warp that ran last goes on as long as it can.
    if (current) collect_ready(ready, current->warp);
    if (ready.empty()) {
      std::shuffle(order.begin(), order.end(), random_bits);
      for (int w = 0; w < warp_count && ready.empty(); ++w) collect_ready(ready, order[w]);
    }
    std::shuffle(ready.begin(), ready.end(), random_bits);
    return;
  }
  const bool random = settings.schedule == Schedule::random;
  for (int w : order)
    if (!random || random_bits() % 2) collect_ready(ready, w);
  if (ready.empty() && random)  // everybody sat out
    for (int w : order) collect_ready(ready, w);
  if (random) std::shuffle(ready.begin(), ready.end(), random_bits);
  if (settings.schedule == Schedule::reverse) std::reverse(ready.begin(), ready.end());
}

[[noreturn]] void stop_in_deadlock() {
  std::map<std::string, int> groups;
  for (int i = 0; i < thread_count; ++i) {
    const Thread& t = threads[i];
    ++groups[t.state == State::ended      ? "ended"
             : t.state == State::at_block ? "wait for the block at " + text(t.site)
                                          : "wait for their warp at " + text(t.site)];
  }
  std::string list;
  for (const auto& [what, count] : groups) list += (list.empty() ? "" : ", ") + std::to_string(count) + " " + what;
  stop("deadlock, of " + std::to_string(thread_count) + " threads: " + list);
}

void run_block(dim3 block) {
  here.block = block;
  static int turn = 0;
  Pool& pool = pools[turn++ % kPools];
  prepare_pool(pool);
#if defined(LRK_TSAN)
  scheduler_tsan = __tsan_get_current_fiber();
  shared.reset();  // a new mapping is one that ThreadSanitizer has seen nobody use
  if (orders) munmap(orders, kPage);
  orders = static_cast<Orders*>(mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
#endif
  if (!shared)
    shared = std::make_unique<Guarded>("shared memory", launch->shared_bytes, 16, 0, settings.poison,
                                       settings.schedule == Schedule::reverse);
  here.shared = shared->data();
  for (size_t i = 0; i < launch->shared_bytes; ++i) here.shared[i] = uint8_t(settings.poison);
  for (int w = 0; w < warp_count; ++w) {
    const int lanes = std::min(32, thread_count - 32 * w);
    warps[w] = {lanes == 32 ? ~0u : (1u << lanes) - 1, 0};
  }
  for (int i = 0; i < thread_count; ++i) prepare_thread(pool, i);
  alive = thread_count;
  waiting = 0;
  current = nullptr;
  release(&start_order);

  static std::vector<Thread*> ready;
  while (alive > 0) {
    choose(ready);
    if (ready.empty()) stop_in_deadlock();
    for (Thread* thread : ready) enter(*thread);
  }
  current = nullptr;
  if (const std::string damage = shared->damage(); !damage.empty()) stop(damage);
}

// All lanes of the mask have arrived.
void finish_warp(Warp& warp, unsigned mask, Finish finish) {
  void* operands[32] = {};
  Thread* const first = &threads[current->warp * 32];
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& t = first[lane];
    if (t.mask != mask || t.site.line != current->site.line)
      stop("lanes " + std::to_string(current->lane) + " and " + std::to_string(lane) +
           " of a warp meet in different operations, at " + text(current->site) + " and " + text(t.site));
    operands[lane] = t.operands;
    t.state = State::ready;
  }
  warp.arrived &= ~mask;
  finish(operands, mask);
}

}  // namespace

// ---- waiting

void sync_block(Site site) {
  Thread& me = *current;
  release(&orders->block);
  me.state = State::at_block;
  me.site = site;
  if (++waiting == thread_count) {
    for (int i = 0; i < thread_count; ++i)
      if (threads[i].site.line != site.line)
        stop("__syncthreads under a condition: thread " + std::to_string(i) + " waits at " + text(threads[i].site) +
             ", thread " + std::to_string(me.number) + " at " + text(site));
    for (int i = 0; i < thread_count; ++i) threads[i].state = State::ready;
    waiting = 0;
  }
  leave(me);
  acquire(&orders->block);
}

void sync_warp(unsigned mask, void* operands, Finish finish, bool orders_memory, Site site) {
  Thread& me = *current;
  Warp& warp = warps[me.warp];
  mask &= warp.lanes;
  if (!(mask >> me.lane & 1)) stop("a warp operation at " + text(site) + " whose mask leaves out the caller");
  if (orders_memory) release(&orders->warp[me.warp]);
  me.state = State::at_warp;
  me.site = site;
  me.mask = mask;
  me.operands = operands;
  warp.arrived |= 1u << me.lane;
  if ((mask & ~warp.arrived) == 0) finish_warp(warp, mask, finish);
  leave(me);
  if (orders_memory) acquire(&orders->warp[me.warp]);
}

// ---- asynchronous copies

bool lands_now() {
  return settings.schedule == Schedule::forward || (settings.schedule == Schedule::random && random_bits() % 2);
}

void start_copy(const Copy& copy) {
  Thread& me = *current;
  if (me.last_copy - me.first_copy == kMaxCopies) stop("more copies under way than the layer has room for");
  me.copies[me.last_copy++ % kMaxCopies] = copy;
}

void end_group() {
  Thread& me = *current;
  if (me.last_group - me.first_group == kMaxGroups) stop("more groups of copies under way than the layer has room for");
  me.group_end[me.last_group++ % kMaxGroups] = me.last_copy;
}

bool take_copy(int groups, Copy& copy) {
  Thread& me = *current;
  while (me.last_group - me.first_group > groups) {
    if (me.first_copy < me.group_end[me.first_group % kMaxGroups]) {
      copy = me.copies[me.first_copy++ % kMaxCopies];
      return true;
    }
    ++me.first_group;
  }
  return false;
}

// ---- reports

std::string position() {
  if (!launch) return "";
  std::string where = std::string(launch->kernel) + ", block " + text(here.block);
  return current ? where + ", thread " + text(here.thread) : where;
}

void stop(const std::string& what) {
  const std::string where = position();
  std::fprintf(stderr, "cuda_on_cpu: %s%s%s\n", what.c_str(), where.empty() ? "" : " in ", where.c_str());
  std::abort();
}

// ---- launches

bool remember_kernel(const char* name) {
  uses()[name];
  return true;
}

std::vector<KernelUse> kernels() {
  std::vector<KernelUse> list;
  for (const auto& [name, launches] : uses()) list.push_back({name, launches});
  return list;
}

void run_grid(const Launch& what) {
  launch = &what;
  ++uses()[what.kernel];
  here.grid_size = what.grid;
  here.block_size = what.block;
  thread_count = int(what.block.x * what.block.y * what.block.z);
  warp_count = (thread_count + 31) / 32;
  threads = std::make_unique<Thread[]>(thread_count);
  warps = std::make_unique<Warp[]>(warp_count);
  shared.reset();
  random_bits.state = settings.seed;

  std::vector<dim3> blocks;
  for (unsigned z = 0; z < what.grid.z; ++z)
    for (unsigned y = 0; y < what.grid.y; ++y)
      for (unsigned x = 0; x < what.grid.x; ++x) blocks.emplace_back(x, y, z);
  if (settings.schedule == Schedule::reverse)
    std::reverse(blocks.begin(), blocks.end());
  else if (settings.schedule != Schedule::forward)
    std::shuffle(blocks.begin(), blocks.end(), random_bits);
  for (const dim3& block : blocks) run_block(block);
  acquire(&end_order);
  shared.reset();
  launch = nullptr;
}

}  // namespace cuda_on_cpu
