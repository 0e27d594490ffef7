// guarded.h: memory between two pages that nobody may touch, which can say whose bytes a wild access hit or overwrote.
//
// An array touches only one of the two pages: by default it ends at one, with `at_begin` it begins after one. The bytes between
// it and the other page hold the poison and are looked at afterwards; AddressSanitizer, where it is on, watches them.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_cpu {

class Guarded {
 public:
  // `data` lies `shift` bytes after a multiple of `alignment`.
  Guarded(std::string name, size_t bytes, size_t alignment, size_t shift, int poison, bool at_begin)
      : name_(std::move(name)), bytes_(bytes), poison_(uint8_t(poison)) {
    inner_ = (bytes + alignment + shift + kPage - 1) / kPage * kPage;
    void* const map = mmap(nullptr, inner_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) {
      std::perror("mmap");
      std::abort();
    }
    first_ = static_cast<uint8_t*>(map) + kPage;
    mprotect(first_, inner_, PROT_READ | PROT_WRITE);
    const uintptr_t end = reinterpret_cast<uintptr_t>(first_) + inner_;
    data_ = at_begin ? first_ + shift : reinterpret_cast<uint8_t*>((end - bytes - shift) / alignment * alignment + shift);
    std::memset(first_, poison, inner_);
    watch_slack(true);
    older_ = newest();
    if (older_) older_->newer_ = this;
    newest() = this;
  }
  ~Guarded() {
    watch_slack(false);
    munmap(first_ - kPage, inner_ + 2 * kPage);
    (newer_ ? newer_->older_ : newest()) = older_;
    if (older_) older_->newer_ = newer_;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  uint8_t* data() const { return data_; }
  void fill(const void* bytes) {
    if (bytes_) std::memcpy(data_, bytes, bytes_);
  }
  void make_read_only() { mprotect(first_, inner_, PROT_READ); }

  // Empty, or which bytes around the array were overwritten.
  std::string damage() {
    watch_slack(false);
    std::string found;
    for (const uint8_t* p = first_; p < first_ + inner_ && found.empty(); ++p)
      if ((p < data_ || p >= data_ + bytes_) && *p != poison_) found = "overwrote a byte " + place_of(p);
    watch_slack(true);
    return found;
  }

  // Where an address lies: the nearest array within a page of it, or empty.
  static std::string describe(const void* address) {
    const auto* const p = static_cast<const uint8_t*>(address);
    for (const Guarded* g = newest(); g; g = g->older_)
      if (p >= g->first_ - kPage && p < g->first_ + g->inner_ + kPage) return g->place_of(p);
    return "";
  }

 private:
  static constexpr size_t kPage = 4096;
  static Guarded*& newest() {
    static Guarded* list = nullptr;
    return list;
  }
  std::string place_of(const uint8_t* p) const {
    const std::string array = name_ + " (" + std::to_string(bytes_) + " bytes)";
    if (p < data_) return std::to_string(data_ - p) + " before the start of " + array;
    if (p >= data_ + bytes_) return std::to_string(p - (data_ + bytes_)) + " past the end of " + array;
    return "at " + std::to_string(p - data_) + " inside " + array;
  }
  void watch_slack(bool on) {
#if defined(__SANITIZE_ADDRESS__)
    if (on) {
      __asan_poison_memory_region(first_, data_ - first_);
      __asan_poison_memory_region(data_ + bytes_, first_ + inner_ - (data_ + bytes_));
    } else {
      __asan_unpoison_memory_region(first_, inner_);
    }
#else
    (void)on;
#endif
  }

  std::string name_;
  size_t bytes_, inner_;
  uint8_t poison_;
  uint8_t *first_, *data_;
  Guarded *older_ = nullptr, *newer_ = nullptr;
};

}  // namespace cuda_on_cpu
