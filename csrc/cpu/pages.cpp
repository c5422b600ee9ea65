#include "cpu/pages.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/accumulate.h>
#include <c10/util/Exception.h>

#include <deque>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace openmythos {
namespace {

constexpr size_t kLarge = size_t(256) << 10;  // from here on a tensor's memory comes from here
constexpr size_t kKept = size_t(512) << 20;  // bytes kept for later tensors at most
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kGrain = size_t(256) << 10;  // sizes are multiples, so that tensors of nearly equal sizes can follow each other

constexpr size_t up_to_multiple(size_t n, size_t of) {
  return (n + of - 1) / of * of;
}

struct Block {
  char* data = nullptr;
  size_t size = 0;
};

#if defined(__unix__) || defined(__APPLE__)
// Zeroed memory from the system that begins at a huge page's border.
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

void unmap(const Block& block) {
  munmap(block.data, block.size);
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
bool has_huge_pages() { return false; }
constexpr bool kMaps = false;
#endif

// Hands out blocks and keeps those that come back, up to kKept bytes; the ones kept longest go first.
class Pages final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>(take(bytes));
    char* const data = block->data;
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, block.release(), &give_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  // The last block kept that is large enough and at most twice as large; else a new one.
  Block take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      for (auto it = kept_.rbegin(); it != kept_.rend(); ++it) {
        if (it->size < bytes || it->size / 2 > bytes) continue;
        const Block block = *it;
        kept_.erase(std::next(it).base());
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

  static void give_back(void* context);

  std::mutex mutex_;
  std::deque<Block> kept_;
  size_t bytes_kept_ = 0;
};

Pages& pages() {
  static Pages* const all = new Pages;  // tensors may outlive every static object
  return *all;
}

void Pages::give_back(void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  c10::profiledCPUMemoryReporter().Delete(block->data);
  pages().keep(*block);
}

bool is_large(size_t bytes) {
  // Where PyTorch fills what nothing has been written to, it shall fill this too.
  const auto& context = at::globalContext();
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  return kMaps && bytes >= kLarge && !filled;
}

constexpr size_t kAlignment = 64;

// Every tensor at its place in the memory, which stays until the last of them is gone.
std::vector<at::Tensor> apart(const std::vector<at::Tensor>& like, char* data, const std::shared_ptr<void>& memory) {
  std::vector<at::Tensor> result;
  result.reserve(like.size());
  for (const auto& t : like) {
    result.push_back(at::from_blob(data, t.sizes(), [memory](void*) {}, t.options()));
    data += up_to_multiple(t.nbytes(), kAlignment);
  }
  return result;
}

size_t bytes_together(const std::vector<at::Tensor>& like) {
  size_t bytes = 0;
  for (const auto& t : like) bytes += up_to_multiple(t.nbytes(), kAlignment);
  return bytes;
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto dtype = options.dtype();
  if (!is_large(c10::multiply_integers(sizes) * dtype.itemsize())) return at::empty(sizes, options);
  return at::detail::empty_generic(
      sizes, &pages(), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::typeMetaToScalarType(dtype), std::nullopt);
}

std::vector<at::Tensor> empty_together(const std::vector<at::Tensor>& like) {
  const size_t bytes = bytes_together(like);
  if (is_large(bytes)) {
    const auto memory = std::make_shared<c10::DataPtr>(pages().allocate(bytes));
    return apart(like, static_cast<char*>(memory->get()), memory);
  }
  std::vector<at::Tensor> result;
  for (const auto& t : like) result.push_back(at::empty(t.sizes(), t.options()));
  return result;
}

std::vector<at::Tensor> zeros_together(const std::vector<at::Tensor>& like) {
  const size_t bytes = bytes_together(like);
  if (is_large(bytes) && has_huge_pages()) {
    const auto memory = std::shared_ptr<Block>(new Block(map(bytes)), [](Block* block) {
      c10::profiledCPUMemoryReporter().Delete(block->data);
      unmap(*block);
      delete block;
    });
    c10::profiledCPUMemoryReporter().New(memory->data, bytes);
    return apart(like, memory->data, memory);
  }
  auto result = empty_together(like);
  for (auto& t : result) t.zero_();
  return result;
}

}  // namespace openmythos
