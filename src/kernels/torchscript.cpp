// Additions to libtorch's tracer that tch lacks: several outputs, names of arguments, and modules
// that can move to another device. Functions return 0, or 1 with a message in `error`.

#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/passes/fixup_trace_scope_blocks.h>
#include <torch/csrc/jit/passes/normalize_ops.h>
#include <torch/script.h>

#include <cstdio>

#include "guarded.h"

namespace {

// Creates the tensors of the trace on the device of the first input instead of the device on which
// the module was traced.
void use_device_of_input(torch::jit::Graph& graph) {
  torch::jit::WithInsertPoint at_start(graph.block()->nodes().front());
  auto* device = graph.insert(torch::jit::prim::device, {graph.inputs()[1]});
  for (auto* node : graph.nodes()) {
    for (auto* input : node->inputs()) {
      if (input != device && input->type()->kind() == c10::TypeKind::DeviceObjType) {
        node->replaceInputWith(input, device);
      }
    }
  }
}

// Sets the K of each `topk` to the width of the last input, at most the number of scores. The trace
// records sizes as constants.
void set_top_k(torch::jit::Graph& graph) {
  std::vector<torch::jit::Node*> rankings;
  for (auto* node : graph.nodes()) {
    if (node->kind() == torch::jit::aten::topk) rankings.push_back(node);
  }
  for (auto* node : rankings) {
    torch::jit::WithInsertPoint before(node);
    auto* width = graph.insert(torch::jit::aten::size, {graph.inputs().back(), int64_t{1}});
    auto* scores = graph.insert(torch::jit::aten::size, {node->input(0), int64_t{1}});
    node->replaceInput(1, graph.insert(torch::jit::prim::min, {width, scores}));
  }
}

}  // namespace

extern "C" {

// Ends the trace that `atm_create_for_tracing` began: `module.forward` takes arguments of these
// names and returns the outputs as a tuple. `topk` returns as many scores as the last argument has
// columns, or all if there are fewer.
int bireme_end_tracing(torch::jit::Module* module, torch::Tensor** outputs, size_t n_outputs,
                       const char** arguments, size_t n_arguments, char* error, size_t capacity) {
  int failed = guarded(error, capacity, [&] {
    auto state = torch::jit::tracer::getTracingState();
    TORCH_CHECK(state, "no trace has begun");
    auto graph = state->graph;
    TORCH_CHECK(graph->inputs().size() == n_arguments + 1, "a name is needed for each argument");
    for (size_t i = 0; i < n_arguments; ++i) graph->inputs()[i + 1]->setDebugName(arguments[i]);
    std::vector<torch::jit::Value*> values;
    for (size_t i = 0; i < n_outputs; ++i) values.push_back(state->getOutput(*outputs[i], i));
    graph->registerOutput(graph->insertNode(graph->createTuple(values))->output());
    torch::jit::FixupTraceScopeBlocks(graph, module);
    torch::jit::NormalizeOps(graph);
    use_device_of_input(*graph);
    set_top_k(*graph);
    auto* forward = module->_ivalue()->compilation_unit()->create_function("forward", graph);
    module->type()->addMethod(forward);
  });
  torch::jit::tracer::setTracingState(nullptr);
  return failed;
}

// Ends a trace without a result.
void bireme_abandon_tracing() { torch::jit::tracer::setTracingState(nullptr); }

// Writes the names of the arguments of `forward` in the module saved at `path` to `names`,
// separated by spaces.
int bireme_arguments(const char* path, char* names, size_t names_capacity, char* error,
                     size_t capacity) {
  return guarded(error, capacity, [&] {
    auto module = torch::jit::load(path);
    std::string joined;
    for (const auto& argument : module.get_method("forward").function().getSchema().arguments()) {
      if (argument.name() != "self") joined += (joined.empty() ? "" : " ") + argument.name();
    }
    TORCH_CHECK(joined.size() < names_capacity, "too many arguments");
    std::snprintf(names, names_capacity, "%s", joined.c_str());
  });
}
}
