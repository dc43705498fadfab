// The interface between the libraries of the fake CUDA runtime. The library cudart implements it.
//
// A library describes a piece of work for the device and submits it to a stream. In a capture the
// work becomes a node of the graph; otherwise it is executed before the call returns.
#ifndef FAKE_CUDA_FAKE_H
#define FAKE_CUDA_FAKE_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))
#define FORMAT(string, first) __attribute__((format(printf, string, first)))

// The last column of a line of the log.
#define EAGER "eager"
#define CAPTURED "captured"
#define REPLAYED "replayed"

typedef struct {
  // The columns of the log.
  const char* kind;
  int64_t number;
  const char* detail;
  // Executes the work. NULL: the work is only counted, because the fake does not compute it.
  cudaError_t (*run)(void* state);
  // Called when a graph copies `state`, and when the graph is destroyed. Both may be NULL.
  void (*retain)(void* state);
  void (*release)(void* state);
  void* state;
  size_t state_bytes;
} FakeWork;

// Executes the work, or adds it to the capture of the stream.
API cudaError_t fake_submit(cudaStream_t stream, const FakeWork* work);

// Submits work that the fake does not compute.
API cudaError_t fake_count(cudaStream_t stream, const char* kind, int64_t number,
                           const char* detail);

// Called by calls that may synchronise or allocate: an error if a capture forbids them now.
API cudaError_t fake_check_unsafe(const char* call);

API int fake_is_capturing(cudaStream_t stream);

// 0 for the legacy default stream.
API int fake_stream_number(cudaStream_t stream);

API void fake_log(const char* kind, int64_t number, const char* phase, const char* format, ...)
    FORMAT(4, 5);

// Called by functions without a model.
API void fake_log_stub(const char* function);

// Makes `error` the last error of this thread, and returns it.
API cudaError_t fake_fail(cudaError_t error);

// The value of an integer environment variable.
API int fake_environment(const char* name, int default_value);

// Whether device memory holds what a GPU would have written there. That is so until the next work
// that the fake does not compute, because that work might write anywhere.
API int fake_is_known(const void* address, size_t n_bytes);
API void fake_set_known(const void* address, size_t n_bytes, int is_known);
API void fake_forget_all_contents(void);

// The number of bytes from `address` to the end of its device allocation; 0 if it is in none.
API size_t fake_device_bytes_from(const void* address);

// The name of the kernel of libtorch that this thread launched last; an empty text at first.
API const char* fake_last_kernel(void);

// The UUID of a visible GPU: 16 bytes.
API cudaError_t fake_device_uuid(char* uuid, int device);

#endif
