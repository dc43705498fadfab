// CUDA graphs and streams of libtorch, which tch does not offer.
//
// Built as a shared object of its own, which is loaded behind libtorch's CUDA library: hosts
// without GPUs do not have that library, and the program starts on them too.

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAStream.h>

#include "../guarded.h"

using at::cuda::CUDAGraph;

// Makes a stream of libtorch's pool the calling thread's current stream on the GPU `device`. The
// default stream cannot be captured. Returns 0, or 1 with a message in `error`, as do all functions
// below.
extern "C" int bireme_enter_stream(int device, char* error, size_t capacity) {
  return guarded(error, capacity, [&] {
    auto index = static_cast<c10::DeviceIndex>(device);
    c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, index));
  });
}

// Begins to record the work that is queued on the current stream, instead of running it. The caller
// owns `*graph`, also if recording fails.
extern "C" int bireme_graph_begin(CUDAGraph** graph, char* error, size_t capacity) {
  return guarded(error, capacity, [&] {
    *graph = new CUDAGraph();
    // Other threads may use the GPU in the meantime: the loader pins memory.
    (*graph)->capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
  });
}

extern "C" int bireme_graph_end(CUDAGraph* graph, char* error, size_t capacity) {
  return guarded(error, capacity, [&] { graph->capture_end(); });
}

extern "C" int bireme_graph_replay(CUDAGraph* graph, char* error, size_t capacity) {
  return guarded(error, capacity, [&] { graph->replay(); });
}

extern "C" void bireme_graph_free(CUDAGraph* graph) { delete graph; }
