// What tch leaves out of libtorch's tracer: several outputs, names of arguments, and modules that may move to another
// device. Functions return 0, or 1 with a message in `error`.

#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/passes/fixup_trace_scope_blocks.h>
#include <torch/csrc/jit/passes/normalize_ops.h>
#include <torch/script.h>

#include <cstdio>

#include "../device/guarded.h"

namespace {

// Tensors made during the trace lie where the first input lies, not where the tracing machine had them.
void follow_input(torch::jit::Graph& graph) {
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

// What is ranked is ranked as far as the last input is wide, or as far as there are scores: a size
// that was read in the trace is a constant.
void rank_as_wide(torch::jit::Graph& graph) {
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

// Ends the trace that `atm_create_for_tracing` began: `module.forward` takes arguments of these names and returns the
// outputs as a tuple. `topk` gives as many as the last argument is wide, or as there are.
int bireme_end_tracing(torch::jit::Module* module, torch::Tensor** outputs, size_t n_outputs, const char** arguments,
                       size_t n_arguments, char* error, size_t capacity) {
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
    follow_input(*graph);
    rank_as_wide(*graph);
    auto* forward = module->_ivalue()->compilation_unit()->create_function("forward", graph);
    module->type()->addMethod(forward);
  });
  torch::jit::tracer::setTracingState(nullptr);
  return failed;
}

// Ends a trace without a result.
void bireme_abandon_tracing() { torch::jit::tracer::setTracingState(nullptr); }

// Writes the names of `forward`'s arguments in the module saved at `path`, separated by spaces, into `names`.
int bireme_arguments(const char* path, char* names, size_t names_capacity, char* error, size_t capacity) {
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
