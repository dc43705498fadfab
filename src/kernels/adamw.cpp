// libtorch's fused AdamW, which tch does not offer.

#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>

#include "guarded.h"

// One step on `buffers`: parameters, gradients, first and second moments, all flat. Gradients are
// divided by `scale`. Returns 0, or 1 with a message in `error`.
extern "C" int bireme_fused_adamw(at::Tensor** buffers, double n_steps, double learning_rate,
                                  const double* betas, double epsilon, at::Tensor* scale,
                                  char* error, size_t capacity) {
  return guarded(error, capacity, [&] {
    auto steps = at::full({}, n_steps, buffers[0]->options());
    at::_fused_adamw_({*buffers[0]}, {*buffers[1]}, {*buffers[2]}, {*buffers[3]}, {}, {steps},
                      learning_rate, betas[0], betas[1], /*weight_decay=*/0.0, epsilon,
                      /*amsgrad=*/false, /*maximize=*/false, *scale);
  });
}
