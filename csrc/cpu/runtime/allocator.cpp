// Why an allocator of our own. The system maps a fresh page at its first use, and with 4 KiB pages this takes several
// times as long as writing the page. malloc returns large blocks to the system, so PyTorch pays this for every large
// result. Here, results of 256 KiB and more lie in huge pages, and freed blocks serve the next results.
//
// PyTorch's own switch (THP_MEM_ALLOC_ENABLE) asks for huge pages but keeps nothing: each result is mapped and cleared
// again. It covers tensors of at least 2 MiB, and only the user can set it, for the whole process.
//
// General allocators (jemalloc, mimalloc) replace malloc for the whole process, which a library cannot do for its user.
// Nor do they offer what gradients need: many tensors in one block, each with its own storage, whose parts return to
// the system one by one, and zeros that are never written because fresh pages are zero.
#include "cpu/runtime/allocator.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <deque>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace openmythos {
namespace {

constexpr size_t kLarge = size_t(256) << 10;  // smaller tensors come from PyTorch's allocator
constexpr size_t kKept = size_t(512) << 20;   // most bytes kept for later tensors
constexpr size_t kHugePage = size_t(2) << 20;
// Block sizes are multiples of this, so that tensors of nearly equal sizes can reuse each other's blocks.
constexpr size_t kGrain = size_t(256) << 10;

constexpr size_t up_to_multiple(size_t n, size_t of) { return (n + of - 1) / of * of; }

struct Block {
  char* data = nullptr;
  size_t size = 0;
};

#if defined(__unix__) || defined(__APPLE__)
// Zeroed memory from the system, aligned to a huge page.
Block map(size_t bytes) {
  const size_t size = up_to_multiple(bytes, kGrain), whole = size + kHugePage;
  void* mapped = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK_WITH(OutOfMemoryError, mapped != MAP_FAILED, "the system has no ", whole, " bytes of memory left");
  char* const first = static_cast<char*>(mapped);
  const size_t before = up_to_multiple(reinterpret_cast<size_t>(first), kHugePage) - reinterpret_cast<size_t>(first);
  char* const data = first + before;
  if (before) munmap(first, before);
  munmap(data + size, kHugePage - before);
#if defined(MADV_HUGEPAGE)
  madvise(data, size, MADV_HUGEPAGE);
#endif
  return {data, size};
}

void unmap(const Block& block) { munmap(block.data, block.size); }

// Returns the pages that lie wholly in [begin, end) to the system; their contents are lost.
void discard(char* begin, char* end) {
  static const size_t page = sysconf(_SC_PAGESIZE);
  const size_t first = up_to_multiple(reinterpret_cast<size_t>(begin), page),
               last = reinterpret_cast<size_t>(end) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

bool has_huge_pages() {
  static const bool has = [] {
    std::string choice;
    std::getline(std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled"), choice);
    return !choice.empty() && choice.find("[never]") == std::string::npos;
  }();
  return has;
}

constexpr bool kMaps = true;
#else
Block map(size_t) { return {}; }
void unmap(const Block&) {}
void discard(char*, char*) {}
bool has_huge_pages() { return false; }
constexpr bool kMaps = false;
#endif

// A block that holds several tensors, each with a storage of its own.
struct Shared {
  struct Part {
    Shared* of;
    char* data;
    bool freed = false;
  };

  Block block;
  bool reusable;            // whether later tensors may take it once all parts are freed
  std::vector<Part> parts;  // by address
  size_t left = 0;          // parts in use

  void discard_freed() {
    for (size_t i = 0; i < parts.size();) {
      size_t end = i;
      while (end < parts.size() && parts[end].freed) ++end;
      if (end > i) discard(parts[i].data, end < parts.size() ? parts[end].data : block.data + block.size);
      i = end + 1;
    }
  }
};

// Keeps freed blocks for reuse, up to kKept bytes; beyond that the oldest are unmapped.
class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>(take(bytes));
    char* const data = block->data;
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, block.release(), &give_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Memory for tensors of these sizes in bytes, in one block. `zeroed`: fresh from the system, hence all zeros.
  std::vector<c10::DataPtr> allocate_together(const std::vector<size_t>& sizes, bool zeroed) {
    size_t bytes = 0;
    for (const size_t size : sizes) bytes += up_to_multiple(size, kAlignment);
    const Block block = zeroed ? map(bytes) : take(bytes);
    auto* const shared = new Shared{block, !zeroed, {}, sizes.size()};
    c10::profiledCPUMemoryReporter().New(block.data, bytes);
    char* data = block.data;
    for (const size_t size : sizes) {
      shared->parts.push_back({shared, data});
      data += up_to_multiple(size, kAlignment);
    }
    std::vector<c10::DataPtr> result;
    for (auto& part : shared->parts) result.emplace_back(part.data, &part, &give_back_part, c10::Device(c10::kCPU));
    return result;
  }

 private:
  static constexpr size_t kAlignment = 64;

  // The smallest block that is large enough and at most twice as large, of several the one freed last; else a new one.
  // Taking the one freed last of all sizes would give the gradients' block, larger than all others, to the next
  // forward.
  Block take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      // A step's gradients are freed one by one, all before the next step allocates. A shared block still in use now
      // holds a gradient that somebody keeps; the memory of the others goes back.
      for (Shared* const shared : partly_freed_) shared->discard_freed();
      partly_freed_.clear();
      auto best = kept_.end();
      for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        if (it->size < bytes || it->size / 2 > bytes) continue;
        if (best == kept_.end() || it->size <= best->size) best = it;
      }
      if (best != kept_.end()) {
        const Block block = *best;
        kept_.erase(best);
        bytes_kept_ -= block.size;
        return block;
      }
    }
    return map(bytes);
  }

  void keep(const Block& block) {
    if (block.size > kKept) return unmap(block);
    const std::lock_guard lock(mutex_);
    kept_.push_back(block);
    bytes_kept_ += block.size;
    while (bytes_kept_ > kKept) {
      unmap(kept_.front());
      bytes_kept_ -= kept_.front().size;
      kept_.pop_front();
    }
  }

  void free_part(Shared::Part& part) {
    Shared* const shared = part.of;
    {
      const std::lock_guard lock(mutex_);
      part.freed = true;
      const auto listed = std::find(partly_freed_.begin(), partly_freed_.end(), shared);
      if (--shared->left > 0) {
        if (listed == partly_freed_.end()) partly_freed_.push_back(shared);
        return;
      }
      if (listed != partly_freed_.end()) partly_freed_.erase(listed);
    }
    c10::profiledCPUMemoryReporter().Delete(shared->block.data);
    shared->reusable ? keep(shared->block) : unmap(shared->block);
    delete shared;
  }

  static void give_back(void* context);
  static void give_back_part(void* context);

  std::mutex mutex_;
  std::vector<Shared*> partly_freed_;  // since the last call of `take`
  std::deque<Block> kept_;
  size_t bytes_kept_ = 0;
};

Allocator& allocator() {
  static Allocator* const one = new Allocator;  // never destroyed: tensors may outlive every static object
  return *one;
}

void Allocator::give_back(void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  c10::profiledCPUMemoryReporter().Delete(block->data);
  allocator().keep(*block);
}

void Allocator::give_back_part(void* context) { allocator().free_part(*static_cast<Shared::Part*>(context)); }

bool is_large(size_t bytes) {
  // In deterministic mode PyTorch fills uninitialized memory; leave such tensors to it.
  const auto& context = at::globalContext();
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  return kMaps && bytes >= kLarge && !filled;
}

// A dense tensor with the sizes and dtype of `like` in this memory.
at::Tensor placed(const at::Tensor& like, c10::DataPtr memory) {
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), like.nbytes(), std::move(memory), &allocator(), /*resizable=*/true);
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(storage)), c10::DispatchKeySet(c10::DispatchKey::CPU), like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_contiguous(like.sizes());
  return result;
}

std::vector<at::Tensor> together(const std::vector<at::Tensor>& like, bool zeroed) {
  std::vector<size_t> sizes;
  for (const auto& t : like) sizes.push_back(t.nbytes());
  auto memory = allocator().allocate_together(sizes, zeroed);
  std::vector<at::Tensor> result;
  for (size_t i = 0; i < like.size(); ++i) result.push_back(placed(like[i], std::move(memory[i])));
  return result;
}

size_t bytes_of(const std::vector<at::Tensor>& like) {
  size_t bytes = 0;
  for (const auto& t : like) bytes += t.nbytes();
  return bytes;
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto dtype = options.dtype();
  if (!is_large(c10::multiply_integers(sizes) * dtype.itemsize())) return at::empty(sizes, options);
  return at::detail::empty_generic(
      sizes, &allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::typeMetaToScalarType(dtype), std::nullopt);
}

std::vector<at::Tensor> empty_together(const std::vector<at::Tensor>& like) {
  if (is_large(bytes_of(like))) return together(like, false);
  std::vector<at::Tensor> result;
  for (const auto& t : like) result.push_back(at::empty(t.sizes(), t.options()));
  return result;
}

std::vector<at::Tensor> zeros_together(const std::vector<at::Tensor>& like) {
  if (is_large(bytes_of(like)) && has_huge_pages()) return together(like, true);
  auto result = empty_together(like);
  for (auto& t : result) t.zero_();
  return result;
}

}  // namespace openmythos
