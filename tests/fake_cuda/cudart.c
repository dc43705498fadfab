// A CUDA runtime for machines without a GPU, so that the real libtorch_cuda.so runs there.
//
// Device memory is host memory. Copies, memsets, NCCL calls, host functions and the project's own
// kernels (if an emulation of them is installed) are executed, in the order of the calls and before
// the call returns. Kernels of libtorch and calls of cuBLAS and cuDNN compute nothing; they are
// counted. Not modelled: the time that work takes, overlap between streams, and races.
//
// FAKE_CUDA_LOG=FILE appends a line per event to FILE. Four columns, separated by tabs:
//
//   kind          number            detail
//   kernel        blocks            mangled name, or the name of a kernel from a module
//   product       2 m n k batch     function of cuBLAS or cuBLASLt, with its sizes if known
//   cudnn         steps             call, cell, algorithm, layout, batch, precision
//   copy          bytes             direction, pinned or pageable, `blocks` if the host waits
//   memset        bytes
//   host_function 0
//   nccl          elements          call, type, operation or root, number of the stream
//   graph_launch  nodes
//   capture_begin id of the capture mode
//   capture_end   nodes
//   wait          0                 stream, event, device: the host waits for the device
//   event_record  number of stream
//   event_wait    number of stream  the stream waits for an event, the host does not
//   allocate      bytes             device, pinned, registered
//   free          bytes             device, pinned, registered
//   compile       bytes             name of the program that NVRTC was given
//   forbidden     CUDA error        what a capture forbids; the capture is invalid from then on
//   hazard        0                 what CUDA permits, but is probably a mistake in a capture
//   mismatch      number of call    ranks that make different NCCL calls
//   failed        error             a call with wrong arguments, a kernel that failed
//   stub          0                 a function without a model, which did nothing
//
// and in the last column `eager`, `captured` (the work became a node) or `replayed` (a graph launch
// executed the node; the nodes that are only counted have no line).
//
// This file: log, errors, and kernels that the compiler registers. See also cudart_device.c,
// cudart_memory.c and cudart_stream.c.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

int fake_environment(const char* name, int default_value) {
  const char* value = getenv(name);
  return value && *value ? atoi(value) : default_value;
}

// --- Log ---

static FILE* log_file;

static void open_log(void) {
  const char* path = getenv("FAKE_CUDA_LOG");
  if (!path || !*path) return;
  log_file = fopen(path, "ae");
  if (!log_file) {
    fprintf(stderr, "fake CUDA: cannot open `%s`: %m\n", path);
    abort();
  }
  // Complete lines survive `_exit` and signals.
  setvbuf(log_file, NULL, _IOLBF, 1 << 16);
}

void fake_log(const char* kind, int64_t number, const char* phase, const char* format, ...) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, open_log);
  if (!log_file) return;
  va_list arguments;
  va_start(arguments, format);
  flockfile(log_file);
  fprintf(log_file, "%s\t%lld\t", kind, (long long)number);
  vfprintf(log_file, format, arguments);
  fprintf(log_file, "\t%s\n", phase);
  funlockfile(log_file);
  va_end(arguments);
}

void fake_log_stub(const char* function) { fake_log("stub", 0, EAGER, "%s", function); }

// --- Errors ---

static __thread cudaError_t last_error;

cudaError_t fake_fail(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

API cudaError_t cudaPeekAtLastError(void) { return last_error; }

API cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

static const struct {
  cudaError_t error;
  const char *name, *text;
} ERRORS[] = {
#define ERROR(name, text) {name, #name, text}
    ERROR(cudaSuccess, "no error"),
    ERROR(cudaErrorInvalidValue, "invalid argument"),
    ERROR(cudaErrorMemoryAllocation, "out of memory"),
    ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    ERROR(cudaErrorInsufficientDriver,
          "CUDA driver version is insufficient for CUDA runtime version"),
    ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    ERROR(cudaErrorSymbolNotFound, "named symbol not found"),
    ERROR(cudaErrorNotReady, "device not ready"),
    ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    ERROR(cudaErrorStreamCaptureInvalidated,
          "operation failed due to a previous error during capture"),
    ERROR(cudaErrorStreamCaptureMerge,
          "operation would result in a merge of separate capture sequences"),
    ERROR(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    ERROR(cudaErrorStreamCaptureIsolation,
          "dependency created on uncaptured work in another stream"),
    ERROR(cudaErrorStreamCaptureImplicit,
          "operation would make the legacy stream depend on a capturing blocking stream"),
    ERROR(cudaErrorCapturedEvent,
          "operation not permitted on an event last recorded in a capturing stream"),
    ERROR(cudaErrorStreamCaptureWrongThread,
          "attempt to terminate a thread-local capture sequence from another thread"),
#undef ERROR
};
#define N_ERRORS (sizeof ERRORS / sizeof *ERRORS)

API const char* cudaGetErrorString(cudaError_t error) {
  for (size_t i = 0; i < N_ERRORS; i++)
    if (ERRORS[i].error == error) return ERRORS[i].text;
  return "unrecognized error code";
}

API const char* cudaGetErrorName(cudaError_t error) {
  for (size_t i = 0; i < N_ERRORS; i++)
    if (ERRORS[i].error == error) return ERRORS[i].name;
  return "unrecognized error code";
}

// --- Kernels: the compiler registers a host function and a name for each ---

typedef struct {
  const void* host_function;
  const char* name;
} Kernel;

static struct {
  pthread_mutex_t mutex;
  Kernel* kernels;
  size_t n, capacity;
  int is_sorted;
} registry = {.mutex = PTHREAD_MUTEX_INITIALIZER};

API void** __cudaRegisterFatBinary(void* binary) {
  (void)binary;
  static void* handle;
  return &handle;
}
API void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
API void __cudaUnregisterFatBinary(void** handle) { (void)handle; }
API char __cudaInitModule(void** handle) {
  (void)handle;
  return 0;
}
API void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int is_extern,
                           size_t n_bytes, int is_constant, int is_global) {
  (void)handle, (void)host, (void)device, (void)name;
  (void)is_extern, (void)n_bytes, (void)is_constant, (void)is_global;
}

API void __cudaRegisterFunction(void** handle, const char* host_function, char* device_function,
                                const char* name, int limit, void* thread, void* block,
                                void* block_dim, void* grid_dim, int* warp_size) {
  (void)handle, (void)device_function, (void)limit, (void)thread, (void)block;
  (void)block_dim, (void)grid_dim, (void)warp_size;
  pthread_mutex_lock(&registry.mutex);
  if (registry.n == registry.capacity) {
    registry.capacity = registry.capacity ? 2 * registry.capacity : 1 << 16;
    registry.kernels = realloc(registry.kernels, registry.capacity * sizeof(Kernel));
    if (!registry.kernels) abort();
  }
  registry.kernels[registry.n++] = (Kernel){host_function, name};
  registry.is_sorted = 0;
  pthread_mutex_unlock(&registry.mutex);
}

static int compare_kernels(const void* a, const void* b) {
  uintptr_t x = (uintptr_t)((const Kernel*)a)->host_function;
  uintptr_t y = (uintptr_t)((const Kernel*)b)->host_function;
  return (x > y) - (x < y);
}

static const char* kernel_name(const void* host_function) {
  Kernel key = {host_function, NULL};
  pthread_mutex_lock(&registry.mutex);
  if (!registry.is_sorted) {
    qsort(registry.kernels, registry.n, sizeof(Kernel), compare_kernels);
    registry.is_sorted = 1;
  }
  const Kernel* found =
      bsearch(&key, registry.kernels, registry.n, sizeof(Kernel), compare_kernels);
  const char* name = found ? found->name : "unknown";
  pthread_mutex_unlock(&registry.mutex);
  return name;
}

static __thread const char* last_kernel = "";

const char* fake_last_kernel(void) { return last_kernel; }

static cudaError_t launch(const void* host_function, dim3 grid, dim3 block, cudaStream_t stream) {
  int64_t n_blocks = (int64_t)grid.x * grid.y * grid.z;
  int64_t n_threads = (int64_t)block.x * block.y * block.z;
  if (n_blocks == 0 || n_threads == 0 || n_threads > 1024) {
    fake_log("failed", cudaErrorInvalidConfiguration, EAGER, "launch of %s",
             kernel_name(host_function));
    return fake_fail(cudaErrorInvalidConfiguration);
  }
  last_kernel = kernel_name(host_function);
  return fake_count(stream, "kernel", n_blocks, last_kernel);
}

API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                 size_t shared_bytes, cudaStream_t stream) {
  (void)arguments, (void)shared_bytes;
  return launch(function, grid, block, stream);
}

API cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block,
                                            void** arguments, size_t shared_bytes,
                                            cudaStream_t stream) {
  (void)arguments, (void)shared_bytes;
  return launch(function, grid, block, stream);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                    void** arguments) {
  (void)arguments;
  return launch(function, config->gridDim, config->blockDim, config->stream);
}

API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
  *kernel = (cudaKernel_t)host_function;
  return cudaSuccess;
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                   size_t shared_bytes, cudaStream_t stream) {
  (void)arguments, (void)shared_bytes;
  return launch(kernel, grid, block, stream);
}

// The arguments of `<<<grid, block, shared, stream>>>`, between the two calls that it becomes.
static __thread struct {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
} configuration;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                         cudaStream_t stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared_bytes = shared_bytes;
  configuration.stream = stream;
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                           void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *(cudaStream_t*)stream = configuration.stream;
  return cudaSuccess;
}

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* function) {
  (void)function;
  *attributes = (struct cudaFuncAttributes){
      .maxThreadsPerBlock = 1024,
      .numRegs = 32,
      .ptxVersion = 90,
      .binaryVersion = 90,
      .maxDynamicSharedSizeBytes = 48 << 10,
  };
  return cudaSuccess;
}

API cudaError_t cudaFuncSetAttribute(const void* function, enum cudaFuncAttribute attribute,
                                     int value) {
  (void)function, (void)attribute, (void)value;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n_blocks, const void* function,
                                                              int block_size, size_t shared_bytes) {
  (void)function, (void)shared_bytes;
  int n = block_size > 0 ? 2048 / block_size : 1;
  *n_blocks = n > 32 ? 32 : n < 1 ? 1 : n;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* n_blocks, const void* function, int block_size, size_t shared_bytes, unsigned flags) {
  (void)flags;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(n_blocks, function, block_size,
                                                       shared_bytes);
}

// libtorch asks for functions of the driver by name. It gets those of cuda.c; any other name gives
// a function that returns 0.
static int succeed(void) { return 0; }

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function,
                                                 unsigned version, unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult* result) {
  (void)version, (void)flags;
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = (void*)succeed;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
