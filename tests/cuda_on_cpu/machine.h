// machine.h: where driver.cpp and self_test.cu differ between the two machines they run on, and nowhere else.
//
// With LRK_CUDA_ON_CPU, built by g++: arrays are guarded memory, kernels run under scheduler.h. Else, built by nvcc: arrays are
// cudaMalloc'ed in the exact size, so that compute-sanitizer sees an access one byte outside.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef LRK_CUDA_ON_CPU

#include <unistd.h>

#include <csignal>

#include "cuda.h"
#include "guarded.h"

namespace machine {

class Array {
 public:
  // Begins `shift` bytes after a multiple of `alignment`; holds the poison. Empty arrays are null, as torch's are.
  Array(const std::string& name, size_t bytes, size_t alignment, size_t shift)
      : bytes_(bytes),
        memory_(name, bytes, alignment, shift, cuda_on_cpu::settings.poison,
                cuda_on_cpu::settings.schedule == cuda_on_cpu::Schedule::reverse) {}
  void* data() const { return bytes_ ? memory_.data() : nullptr; }
  void fill_and_protect(const void* bytes) {
    memory_.fill(bytes);
    memory_.make_read_only();
  }
  void read(void* to) const {
    if (bytes_) std::memcpy(to, memory_.data(), bytes_);
  }
  std::string damage() { return memory_.damage(); }

 private:
  size_t bytes_;
  cuda_on_cpu::Guarded memory_;
};

inline std::string running;  // the call under way, for reports

inline void report_fault(int, siginfo_t* info, void*) {
  const std::string place = cuda_on_cpu::Guarded::describe(info->si_addr), thread = cuda_on_cpu::position();
  std::fprintf(stderr, "cuda_on_cpu: access of address %p, %s, in %s\n", info->si_addr,
               place.empty() ? "which is of no array" : place.c_str(), thread.empty() ? "no kernel" : thread.c_str());
  std::fprintf(stderr, "cuda_on_cpu: in call %s\n", running.c_str());
  _exit(3);
}
inline void report_abort(int) {
  std::fprintf(stderr, "cuda_on_cpu: in call %s\n", running.c_str());
  _exit(3);
}

// Options: --schedule NAME, --seed NUMBER, --poison NUMBER.
inline void start(int argc, char** argv) {
  static const char* const kNames[] = {"random", "forward", "reverse", "ahead"};
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i], value = argv[i + 1];
    if (option == "--seed") {
      cuda_on_cpu::settings.seed = unsigned(std::stoul(value));
    } else if (option == "--poison") {
      cuda_on_cpu::settings.poison = std::stoi(value);
    } else if (option == "--schedule") {
      int number = 0;
      while (number < 4 && value != kNames[number]) ++number;
      if (number == 4) throw std::runtime_error("no schedule " + value);
      cuda_on_cpu::settings.schedule = cuda_on_cpu::Schedule(number);
    } else {
      throw std::runtime_error("no option " + option);
    }
  }
  static char stack[64 << 10];  // a fault may be an overflow of the fiber's own
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof(stack);
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  action.sa_sigaction = report_fault;
#if !defined(__SANITIZE_ADDRESS__)  // whose own report says more
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
#endif
  action.sa_flags = SA_ONSTACK;
  action.sa_handler = report_abort;
  sigaction(SIGABRT, &action, nullptr);
}

inline void begin(const std::string& call) {
  running = call;
}
// An error that no check_launch() has seen.
inline std::string finish() {
  return cudaGetLastError();
}
inline std::vector<cuda_on_cpu::KernelUse> kernels() {
  return cuda_on_cpu::kernels();
}

}  // namespace machine

#else

#include <cuda_runtime.h>

namespace machine {

struct KernelUse {
  std::string name;
  long launches;
};

inline int poison = 0xFF;

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

class Array {
 public:
  Array(const std::string&, size_t bytes, size_t, size_t shift) : bytes_(bytes), shift_(shift) {
    if (bytes == 0) return;
    require(cudaMalloc(&memory_, shift + bytes), "cudaMalloc");
    require(cudaMemset(memory_, poison, shift + bytes), "cudaMemset");
  }
  ~Array() { cudaFree(memory_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  void* data() const { return bytes_ ? static_cast<char*>(memory_) + shift_ : nullptr; }
  void fill_and_protect(const void* bytes) {
    if (bytes_) require(cudaMemcpy(data(), bytes, bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void read(void* to) const {
    if (bytes_) require(cudaMemcpy(to, data(), bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
  std::string damage() { return ""; }

 private:
  size_t bytes_, shift_;
  void* memory_ = nullptr;
};

inline void start(int argc, char** argv) {
  for (int i = 1; i + 1 < argc; i += 2)
    if (std::string(argv[i]) == "--poison") poison = std::atoi(argv[i + 1]);
  require(cudaFree(nullptr), "cudaFree");
}
inline void begin(const std::string&) {}
inline std::string finish() {
  const cudaError_t ran = cudaDeviceSynchronize(), left = cudaGetLastError();
  const cudaError_t error = ran != cudaSuccess ? ran : left;
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
inline std::vector<KernelUse> kernels() {
  return {};
}

}  // namespace machine

#endif
