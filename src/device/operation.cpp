// Operations of our own in libtorch's autograd, of which tch has none.

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

// Calls `back` once: with the gradient of the output, which is now its, it gives those of the `n` inputs, which are then ours.
extern "C" void bireme_go_back(void* back, at::Tensor* gradient, at::Tensor** of_inputs, size_t n);
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
    bireme_go_back(back, new at::Tensor(std::move(gradients[0])), of_inputs.data(), of_inputs.size());
    for (size_t i = 0; i < given.size(); ++i) {
      given[i] = std::move(*of_inputs[i]);
      delete of_inputs[i];
    }
    return given;
  }
};

}  // namespace

// Lets `output` follow from `inputs`, if any of them is learnt and operations are recorded. `back` is ours to free.
extern "C" void bireme_follows(at::Tensor* output, at::Tensor** inputs, size_t n, void* back) {
  torch::autograd::variable_list all;
  for (size_t i = 0; i < n; ++i) all.push_back(*inputs[i]);
  bool is_learnt = std::any_of(all.begin(), all.end(), [](const at::Tensor& input) { return input.requires_grad(); });
  if (!is_learnt || !c10::GradMode::is_enabled()) return bireme_forget(back);
  std::shared_ptr<Operation> operation(new Operation(torch::autograd::collect_next_edges(all), back),
                                       torch::autograd::deleteNode);
  torch::autograd::create_gradient_edge(*output, std::move(operation));
}
