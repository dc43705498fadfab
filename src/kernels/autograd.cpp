// Autograd operations with a backward pass in Rust, backward passes from given gradients, and sums
// of many tensors at once, which tch does not offer.

#include <ATen/ops/_foreach_add.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "guarded.h"

// Runs the backward closure in `slot` once. Takes ownership of `gradient`, the gradient of the
// output, and returns ownership of the gradients of the `n` inputs. Returns 0, or 1 with a message
// in `error` and no gradients.
extern "C" int bireme_run_backward(void* slot, at::Tensor* gradient, at::Tensor** input_gradients,
                                   size_t n, char* error, size_t capacity);
// Frees `slot`, whether the closure has run or not.
extern "C" void bireme_free_backward(void* slot);

namespace {

struct Operation : torch::autograd::Node {
  void* slot;

  Operation(torch::autograd::edge_list&& inputs, void* slot)
      : Node(std::move(inputs)), slot(slot) {}
  ~Operation() override { bireme_free_backward(slot); }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    torch::autograd::variable_list results(num_outputs());
    // The loss does not depend on the output.
    if (!gradients[0].defined()) return results;
    std::vector<at::Tensor*> input_gradients(num_outputs());
    char error[1024] = "";
    auto* gradient = new at::Tensor(std::move(gradients[0]));
    int failed = bireme_run_backward(slot, gradient, input_gradients.data(), input_gradients.size(),
                                     error, sizeof error);
    // Throws; autograd passes the exception to the caller of the backward pass.
    TORCH_CHECK(failed == 0, error);
    for (size_t i = 0; i < results.size(); ++i) {
      results[i] = std::move(*input_gradients[i]);
      delete input_gradients[i];
    }
    return results;
  }
};

}  // namespace

// Makes `output` depend on `inputs` in autograd's graph if gradients are recorded and an input
// requires one. Takes ownership of `slot`, also if it fails. Returns 0, or 1 with a message in
// `error`.
extern "C" int bireme_attach_backward(at::Tensor* output, at::Tensor** inputs, size_t n, void* slot,
                                      char* error, size_t capacity) {
  bool is_owned = false;
  int failed = guarded(error, capacity, [&] {
    torch::autograd::variable_list all;
    for (size_t i = 0; i < n; ++i) all.push_back(*inputs[i]);
    auto requires_grad = [](const at::Tensor& input) { return input.requires_grad(); };
    if (!c10::GradMode::is_enabled() || !std::any_of(all.begin(), all.end(), requires_grad)) return;
    auto edges = torch::autograd::collect_next_edges(all);
    auto* node = new Operation(std::move(edges), slot);
    // The node frees the slot from here on.
    is_owned = true;
    std::shared_ptr<Operation> operation(node, torch::autograd::deleteNode);
    torch::autograd::create_gradient_edge(*output, std::move(operation));
  });
  if (!is_owned) bireme_free_backward(slot);
  return failed;
}

namespace {

std::vector<at::Tensor> tensors(at::Tensor* const* pointers, size_t n) {
  std::vector<at::Tensor> all;
  for (size_t i = 0; i < n; ++i) all.push_back(*pointers[i]);
  return all;
}

}  // namespace

// Writes the gradients by the `n_inputs` inputs, given those of the `n_outputs` outputs, to
// `input_gradients`; the caller owns them. They are undefined where no output depends on the input.
// Returns 0, or 1 with a message in `error` and no gradients.
extern "C" int bireme_backward(at::Tensor** outputs, at::Tensor** output_gradients,
                               size_t n_outputs, at::Tensor** inputs, size_t n_inputs,
                               at::Tensor** input_gradients, char* error, size_t capacity) {
  return guarded(error, capacity, [&] {
    auto gradients = torch::autograd::grad(
        tensors(outputs, n_outputs), tensors(inputs, n_inputs),
        tensors(output_gradients, n_outputs), /*retain_graph=*/false, /*create_graph=*/false,
        /*allow_unused=*/true);
    for (size_t i = 0; i < n_inputs; ++i) input_gradients[i] = new at::Tensor(gradients[i]);
  });
}

// Adds `n` terms to `n` sums of the same sizes. Returns 0, or 1 with a message in `error`.
extern "C" int bireme_add_all(at::Tensor** sums, at::Tensor** terms, size_t n, char* error,
                              size_t capacity) {
  return guarded(error, capacity, [&] { at::_foreach_add_(tensors(sums, n), tensors(terms, n)); });
}
