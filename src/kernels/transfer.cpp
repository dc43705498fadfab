// Pinned host memory, and copies from it that do not wait, which tch does not offer.

#include <ATen/ops/empty.h>

#include "guarded.h"

// Writes a tensor of `n` bytes in pinned memory to `block`; the caller owns it. Returns 0, or 1
// with a message in `error`.
extern "C" int bireme_pinned_bytes(int64_t n, at::Tensor** block, char* error, size_t capacity) {
  return guarded(error, capacity, [&] {
    auto options = at::TensorOptions().dtype(at::kByte).pinned_memory(true);
    *block = new at::Tensor(at::empty({n}, options));
  });
}

// Returns 0, or 1 with a message in `error`.
extern "C" int bireme_copy_without_waiting(at::Tensor* to, at::Tensor* from, char* error,
                                           size_t capacity) {
  return guarded(error, capacity, [&] { to->copy_(*from, /*non_blocking=*/true); });
}
