// Where the gradients of experts' weights lie.
#include "cpu/moe_grouped.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace openmythos::moe {
namespace {

// Zeros that cost nothing until somebody reads or writes them: fresh pages of the system. With one token four of many
// experts have a gradient; writing the zeros of all others would take longer than everything else.
at::Tensor untouched_zeros(int64_t count, at::TensorOptions options) {
#if defined(__unix__) || defined(__APPLE__)
  const size_t bytes = count * options.dtype().itemsize();
  void* memory = bytes ? mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
  if (memory != MAP_FAILED) {
    return at::from_blob(memory, {count}, [bytes](void* p) { munmap(p, bytes); }, options);
  }
#endif
  return at::zeros({count}, options);
}

}  // namespace

Experts gradients(const Experts& experts, bool needed, const Plan* plan) {
  Experts result;
  result.inner = experts.inner;
  if (!needed || experts.size() == 0) return result;
  const auto idle = [&](int64_t e) { return plan && plan->rows(e) == 0; };
  int64_t unused = 0;
  for (int64_t e = 0; e < experts.size(); ++e) unused += idle(e);
  const at::Tensor& like = experts.gate[0];
  // Every matrix begins at a multiple of 64 bytes or more.
  const int64_t each = (like.numel() + 63) / 64 * 64;
  const at::Tensor zeros = untouched_zeros(3 * unused * each, like.options());
  int64_t at = 0;
  for (const auto e : c10::irange(experts.size())) {
    for (auto [to, from] : {std::pair{&result.gate, &experts.gate}, {&result.up, &experts.up}, {&result.down, &experts.down}}) {
      const at::Tensor& w = (*from)[e];
      if (idle(e)) {
        // A tensor of its own on the common pages, which the last of them returns: no gradient is a view of another.
        char* memory = static_cast<char*>(zeros.mutable_data_ptr()) + each * w.element_size() * at++;
        to->push_back(at::from_blob(memory, w.sizes(), [zeros](void*) {}, w.options()));
      } else {
        to->push_back(at::empty(w.sizes(), w.options()));
      }
    }
  }
  return result;
}

}  // namespace openmythos::moe
