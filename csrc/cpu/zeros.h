// Zeros that cost nothing until they are looked at: pages that the system hands out zeroed, at their first use.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <memory>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define OPENMYTHOS_HAS_MMAP
#endif

namespace openmythos {

// As many tensors of zeros as there are in `like`, each with that one's sizes, dense. They share one mapping, which lives
// as long as any of them; where the system has none to give, they are ordinary tensors.
inline std::vector<at::Tensor> untouched_zeros(const std::vector<at::Tensor>& like) {
  std::vector<at::Tensor> result;
  result.reserve(like.size());
#if defined(OPENMYTHOS_HAS_MMAP)
  const auto padded = [](const at::Tensor& t) { return (t.nbytes() + 63) / 64 * 64; };
  size_t bytes = 0;
  for (const auto& t : like) bytes += padded(t);
  void* first = bytes ? mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
  if (first != MAP_FAILED) {
    const std::shared_ptr<void> mapping(first, [bytes](void* p) { munmap(p, bytes); });
    char* at = static_cast<char*>(first);
    for (const auto& t : like) {
      result.push_back(at::from_blob(at, t.sizes(), [mapping](void*) {}, t.options()));
      at += padded(t);
    }
    return result;
  }
#endif
  for (const auto& t : like) result.push_back(at::zeros(t.sizes(), t.options()));
  return result;
}

}  // namespace openmythos
