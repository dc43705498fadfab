// Operations of our own in libtorch's autograd, of which tch has none.

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "guarded.h"

// Calls `back` once, with the gradient of the output, which it takes over; the gradients of the `n` inputs become the
// caller's. Returns 0, or 1 with a message in `error` and no gradients.
extern "C" int bireme_go_back(void* back, at::Tensor* gradient, at::Tensor** of_inputs, size_t n, char* error,
                              size_t capacity);
// Frees `back`, called or not.
extern "C" void bireme_forget(void* back);

namespace {

struct Operation : torch::autograd::Node {
  void* back;

  Operation(torch::autograd::edge_list&& inputs, void* back) : Node(std::move(inputs)), back(back) {}
  ~Operation() override { bireme_forget(back); }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    torch::autograd::variable_list given(num_outputs());
    // Nothing follows from the output.
    if (!gradients[0].defined()) return given;
    std::vector<at::Tensor*> of_inputs(num_outputs());
    char error[1024] = "";
    int failed = bireme_go_back(back, new at::Tensor(std::move(gradients[0])), of_inputs.data(), of_inputs.size(),
                                error, sizeof error);
    // An exception, which autograd hands on to whoever asked for the gradients.
    TORCH_CHECK(failed == 0, error);
    for (size_t i = 0; i < given.size(); ++i) {
      given[i] = std::move(*of_inputs[i]);
      delete of_inputs[i];
    }
    return given;
  }
};

}  // namespace

// Makes `output` depend on `inputs` in autograd's graph, if one of them requires a gradient and gradients are recorded.
// Takes `back` over, also where it fails: returns 0, or 1 with a message in `error`.
extern "C" int bireme_follows(at::Tensor* output, at::Tensor** inputs, size_t n, void* back, char* error,
                              size_t capacity) {
  bool is_owned = false;
  int failed = guarded(error, capacity, [&] {
    torch::autograd::variable_list all;
    for (size_t i = 0; i < n; ++i) all.push_back(*inputs[i]);
    auto is_learnt = [](const at::Tensor& input) { return input.requires_grad(); };
    if (!c10::GradMode::is_enabled() || !std::any_of(all.begin(), all.end(), is_learnt)) return;
    auto edges = torch::autograd::collect_next_edges(all);
    auto* node = new Operation(std::move(edges), back);
    is_owned = true;
    std::shared_ptr<Operation> operation(node, torch::autograd::deleteNode);
    torch::autograd::create_gradient_edge(*output, std::move(operation));
  });
  if (!is_owned) bireme_forget(back);
  return failed;
}
