// The CUDA driver of the fake runtime: what libtorch and the crate cudarc call.
//
// Streams, events, graphs and memory are those of the fake runtime (fake.h); this file adds
// contexts, and modules with their kernels. A module is the text that nvrtc.c returns as a cubin; a
// kernel is found if its name occurs in the text. A launch is checked against the limits of the
// GPU. It runs the emulation of the kernel if the library FAKE_CUDA_KERNELS (default:
// libfake_kernels.so beside this library; empty: none) has one, and is only counted otherwise.
// Not modelled: several contexts on a GPU, variables of modules, clusters of blocks.
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

enum { MAX_GPUS = 64, MAX_PARAMETERS = 128, STATIC_SHARED_BYTES = 48 << 10 };
enum { MAX_SHARED_BYTES = 227 << 10 };

// Errors of the runtime that the fake returns have the numbers of the driver's.
static CUresult result(cudaError_t error) { return (CUresult)error; }

API CUresult cuInit(unsigned flags) {
  (void)flags;
  int n_devices;
  cudaError_t error = cudaGetDeviceCount(&n_devices);
  // Only the runtime refuses an old driver.
  return error == cudaErrorInsufficientDriver ? CUDA_SUCCESS : result(error);
}

API CUresult cuDriverGetVersion(int* version) { return result(cudaDriverGetVersion(version)); }

API CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString((cudaError_t)error);
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = cudaGetErrorName((cudaError_t)error);
  return CUDA_SUCCESS;
}

API CUresult cuGetProcAddress_v2(const char* name, void** function, int version, cuuint64_t flags,
                                 CUdriverProcAddressQueryResult* status) {
  (void)version, (void)flags;
  *function = dlsym(RTLD_DEFAULT, name);
  if (status)
    *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// --- Devices ---

API CUresult cuDeviceGetCount(int* n_devices) {
  cudaGetDeviceCount(n_devices);
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  int n_devices;
  cudaGetDeviceCount(&n_devices);
  *device = ordinal;
  return ordinal >= 0 && ordinal < n_devices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return result(cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device));
}

API CUresult cuDeviceGetName(char* name, int capacity, CUdevice device) {
  struct cudaDeviceProp properties;
  cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (!error) snprintf(name, (size_t)capacity, "%s", properties.name);
  return result(error);
}

API CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  return result(fake_device_uuid(uuid->bytes, device));
}

// The header defines this name as a macro for the newer version.
#undef cuDeviceGetUuid
API CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  return cuDeviceGetUuid_v2(uuid, device);
}

API CUresult cuDeviceGetPCIBusId(char* text, int capacity, CUdevice device) {
  return result(cudaDeviceGetPCIBusId(text, capacity, device));
}

API CUresult cuDeviceTotalMem_v2(size_t* n_bytes, CUdevice device) {
  (void)device;
  size_t free_bytes;
  return result(cudaMemGetInfo(&free_bytes, n_bytes));
}

API CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice device) {
  return result(cudaDeviceGetDefaultMemPool((cudaMemPool_t*)pool, device));
}

// --- Contexts: each GPU has its primary context only ---

static char contexts[MAX_GPUS];

static CUcontext context_of(int device) { return (CUcontext)&contexts[device]; }

API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  (void)device;
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* is_active) {
  (void)device;
  *flags = 0;
  *is_active = 1;
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice* device) { return result(cudaGetDevice(device)); }

API CUresult cuCtxGetCurrent(CUcontext* context) {
  int device;
  cudaGetDevice(&device);
  *context = context_of(device);
  return CUDA_SUCCESS;
}

API CUresult cuCtxSetCurrent(CUcontext context) {
  if (!context) return CUDA_SUCCESS;
  return result(cudaSetDevice((int)((char*)context - contexts)));
}

API CUresult cuCtxPushCurrent_v2(CUcontext context) { return cuCtxSetCurrent(context); }

API CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  return context ? cuCtxGetCurrent(context) : CUDA_SUCCESS;
}

API CUresult cuCtxSynchronize(void) { return result(cudaDeviceSynchronize()); }

API CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return result(cudaDeviceGetStreamPriorityRange(least, greatest));
}

// --- Memory ---

API CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  return result(cudaMemGetInfo(free_bytes, total_bytes));
}

API CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t n_bytes) {
  return result(cudaMalloc((void**)address, n_bytes));
}

API CUresult cuMemFree_v2(CUdeviceptr address) { return result(cudaFree((void*)address)); }

API CUresult cuMemAllocAsync(CUdeviceptr* address, size_t n_bytes, CUstream stream) {
  return result(cudaMallocAsync((void**)address, n_bytes, stream));
}

API CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
  return result(cudaFreeAsync((void*)address, stream));
}

API CUresult cuMemHostAlloc(void** address, size_t n_bytes, unsigned flags) {
  return result(cudaHostAlloc(address, n_bytes, flags));
}

API CUresult cuMemFreeHost(void* address) { return result(cudaFreeHost(address)); }

API CUresult cuMemHostRegister_v2(void* address, size_t n_bytes, unsigned flags) {
  return result(cudaHostRegister(address, n_bytes, flags));
}

API CUresult cuMemHostUnregister(void* address) { return result(cudaHostUnregister(address)); }

API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t n_bytes) {
  return result(cudaMemcpy((void*)to, from, n_bytes, cudaMemcpyHostToDevice));
}

API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t n_bytes) {
  return result(cudaMemcpy(to, (void*)from, n_bytes, cudaMemcpyDeviceToHost));
}

API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t n_bytes) {
  return result(cudaMemcpy((void*)to, (void*)from, n_bytes, cudaMemcpyDeviceToDevice));
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t n_bytes,
                                  CUstream stream) {
  return result(cudaMemcpyAsync((void*)to, from, n_bytes, cudaMemcpyHostToDevice, stream));
}

API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t n_bytes, CUstream stream) {
  return result(cudaMemcpyAsync(to, (void*)from, n_bytes, cudaMemcpyDeviceToHost, stream));
}

API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t n_bytes,
                                  CUstream stream) {
  return result(cudaMemcpyAsync((void*)to, (void*)from, n_bytes, cudaMemcpyDeviceToDevice, stream));
}

API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t n_bytes) {
  return result(cudaMemset((void*)to, value, n_bytes));
}

API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t n_bytes, CUstream stream) {
  return result(cudaMemsetAsync((void*)to, value, n_bytes, stream));
}

// --- Streams, events and graphs ---

API CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  return result(cudaStreamCreateWithPriority(stream, flags, 0));
}

API CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
  return result(cudaStreamCreateWithPriority(stream, flags, priority));
}

API CUresult cuStreamDestroy_v2(CUstream stream) { return result(cudaStreamDestroy(stream)); }
API CUresult cuStreamQuery(CUstream stream) { return result(cudaStreamQuery(stream)); }
API CUresult cuStreamSynchronize(CUstream stream) { return result(cudaStreamSynchronize(stream)); }

API CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  return result(cudaStreamWaitEvent(stream, event, flags));
}

API CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
  return result(cudaStreamBeginCapture(stream, (enum cudaStreamCaptureMode)mode));
}

API CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  return result(cudaStreamEndCapture(stream, graph));
}

API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return result(cudaStreamIsCapturing(stream, (enum cudaStreamCaptureStatus*)status));
}

API CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  return result(cudaThreadExchangeStreamCaptureMode((enum cudaStreamCaptureMode*)mode));
}

API CUresult cuEventCreate(CUevent* event, unsigned flags) {
  return result(cudaEventCreateWithFlags(event, flags));
}

API CUresult cuEventDestroy_v2(CUevent event) { return result(cudaEventDestroy(event)); }

API CUresult cuEventRecord(CUevent event, CUstream stream) {
  return result(cudaEventRecord(event, stream));
}

API CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags) {
  return result(cudaEventRecordWithFlags(event, stream, flags));
}

API CUresult cuEventQuery(CUevent event) { return result(cudaEventQuery(event)); }
API CUresult cuEventSynchronize(CUevent event) { return result(cudaEventSynchronize(event)); }

API CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
  return result(cudaEventElapsedTime(milliseconds, start, end));
}

API CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph,
                                         unsigned long long flags) {
  return result(cudaGraphInstantiateWithFlags(executable, graph, flags));
}

API CUresult cuGraphUpload(CUgraphExec executable, CUstream stream) {
  return result(cudaGraphUpload(executable, stream));
}

API CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  return result(cudaGraphLaunch(executable, stream));
}

API CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* nodes, size_t* n_nodes) {
  return result(cudaGraphGetNodes(graph, nodes, n_nodes));
}

API CUresult cuGraphDestroy(CUgraph graph) { return result(cudaGraphDestroy(graph)); }

API CUresult cuGraphExecDestroy(CUgraphExec executable) {
  return result(cudaGraphExecDestroy(executable));
}

API CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
  return result(cudaLaunchHostFunc(stream, function, data));
}

// --- The library of emulated kernels ---

typedef int ParametersFunction(const char* name, size_t* sizes, int capacity);
typedef int RunFunction(const char* name, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, size_t shared_bytes,
                        void** parameters);

static ParametersFunction* emulated_parameters;
static RunFunction* emulated_run;

static void load_emulation(void) {
  char beside[4096];
  const char* path = getenv("FAKE_CUDA_KERNELS");
  Dl_info info;
  if (!path && dladdr((void*)cuInit, &info)) {
    const char* name = strrchr(info.dli_fname, '/');
    int length = name ? (int)(name - info.dli_fname) : 0;
    snprintf(beside, sizeof beside, "%.*s/libfake_kernels.so", length, info.dli_fname);
    path = beside;
  }
  void* library = path && *path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
  if (!library) {
    // The default library is optional.
    if (path && *path && path != beside)
      fake_log("failed", 0, EAGER, "emulated kernels: %s", dlerror());
    return;
  }
  emulated_parameters = (ParametersFunction*)dlsym(library, "fake_kernel_params");
  emulated_run = (RunFunction*)dlsym(library, "fake_kernel_run");
  if (!emulated_parameters || !emulated_run) {
    fake_log("failed", 0, EAGER, "emulated kernels: `%s` lacks a function", path);
    emulated_parameters = NULL;
  }
}

// The number of parameters of a kernel and their sizes; -1 if it is not emulated.
static int parameters_of(const char* name, size_t* sizes) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, load_emulation);
  return emulated_parameters ? emulated_parameters(name, sizes, MAX_PARAMETERS) : -1;
}

// --- Modules ---

typedef struct Function {
  struct Function* next;
  char* name;
  int max_dynamic_shared_bytes;
  int n_parameters;  // -1: not emulated
  size_t sizes[MAX_PARAMETERS];
} Function;

typedef struct {
  char* text;  // NULL: not compiled by nvrtc.c, any name is found
  Function* functions;
} Module;

static pthread_mutex_t modules_mutex = PTHREAD_MUTEX_INITIALIZER;

// The first line of what nvrtc.c returns as a cubin.
static const char TAG[] = "fake cubin\n";

API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  cudaError_t error = fake_check_unsafe("cuModuleLoadData");
  if (error) return result(error);
  Module* loaded = calloc(1, sizeof *loaded);
  if (strncmp(image, TAG, sizeof TAG - 1) == 0) loaded->text = strdup(image);
  *module = (CUmodule)loaded;
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned n_options,
                                CUjit_option* options, void** values) {
  (void)n_options, (void)options, (void)values;
  return cuModuleLoadData(module, image);
}

API CUresult cuModuleUnload(CUmodule module) {
  Module* loaded = (Module*)module;
  for (Function *function = loaded->functions, *next; function; function = next) {
    next = function->next;
    free(function->name);
    free(function);
  }
  free(loaded->text);
  free(loaded);
  return CUDA_SUCCESS;
}

static Function* new_function(const char* name) {
  Function* function = calloc(1, sizeof *function);
  function->name = strdup(name);
  function->max_dynamic_shared_bytes = STATIC_SHARED_BYTES;
  function->n_parameters = parameters_of(name, function->sizes);
  if (function->n_parameters > MAX_PARAMETERS) function->n_parameters = -1;
  return function;
}

API CUresult cuModuleGetFunction(CUfunction* result_function, CUmodule module, const char* name) {
  Module* loaded = (Module*)module;
  if (loaded->text && !strstr(loaded->text, name)) {
    fake_log("failed", CUDA_ERROR_NOT_FOUND, EAGER, "the module has no kernel `%s`", name);
    return CUDA_ERROR_NOT_FOUND;
  }
  pthread_mutex_lock(&modules_mutex);
  Function* function = loaded->functions;
  while (function && strcmp(function->name, name) != 0) function = function->next;
  if (!function) {
    function = new_function(name);
    function->next = loaded->functions;
    loaded->functions = function;
  }
  pthread_mutex_unlock(&modules_mutex);
  *result_function = (CUfunction)function;
  return CUDA_SUCCESS;
}

API CUresult cuModuleGetGlobal_v2(CUdeviceptr* address, size_t* n_bytes, CUmodule module,
                                  const char* name) {
  (void)address, (void)n_bytes, (void)module;
  fake_log("failed", CUDA_ERROR_NOT_FOUND, EAGER, "the fake has no variables: `%s`", name);
  return CUDA_ERROR_NOT_FOUND;
}

API CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode* mode) {
  *mode = CU_MODULE_EAGER_LOADING;
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  Function* function = (Function*)handle;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value < 0 || value > MAX_SHARED_BYTES) return CUDA_ERROR_INVALID_VALUE;
  function->max_dynamic_shared_bytes = value;
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
  const Function* function = (const Function*)handle;
  *value = 0;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = 1024;
  if (attribute == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = 32;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    *value = function->max_dynamic_shared_bytes;
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  (void)function, (void)config;
  return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n_blocks, CUfunction function,
                                                         int block_size, size_t shared_bytes) {
  return result(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(n_blocks, function, block_size, shared_bytes));
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* n_blocks, CUfunction function, int block_size, size_t shared_bytes, unsigned flags) {
  (void)flags;
  return cuOccupancyMaxActiveBlocksPerMultiprocessor(n_blocks, function, block_size, shared_bytes);
}

// --- Launches ---

// A launch of an emulated kernel, followed by the bytes of its parameters.
typedef struct {
  const Function* function;
  unsigned grid[3], block[3];
  size_t shared_bytes;
  _Alignas(16) char parameters[];
} Launch;

// A kernel gets parameters at addresses with the alignment of their types.
static size_t align(size_t offset) { return (offset + 15) & ~(size_t)15; }

static size_t parameter_bytes(const Function* function) {
  size_t n_bytes = 0;
  for (int i = 0; i < function->n_parameters; i++) n_bytes = align(n_bytes) + function->sizes[i];
  return n_bytes;
}

// Any pointer among the parameters, or in a structure that is a parameter, may be that of an
// output.
static void mark_outputs(const Function* function, void** parameters) {
  for (int i = 0; i < function->n_parameters; i++) {
    for (size_t at = 0; at + sizeof(void*) <= function->sizes[i]; at += sizeof(void*)) {
      const void* address;
      memcpy(&address, (const char*)parameters[i] + at, sizeof address);
      size_t n_bytes = fake_device_bytes_from(address);
      if (n_bytes) fake_set_known(address, n_bytes, 1);
    }
  }
}

static cudaError_t run_launch(void* state) {
  static pthread_mutex_t emulator_mutex = PTHREAD_MUTEX_INITIALIZER;
  Launch* launch = state;
  const Function* function = launch->function;
  void* parameters[MAX_PARAMETERS + 1] = {NULL};
  size_t offset = 0;
  for (int i = 0; i < function->n_parameters; i++) {
    offset = align(offset);
    parameters[i] = launch->parameters + offset;
    offset += function->sizes[i];
  }
  const unsigned *grid = launch->grid, *block = launch->block;
  pthread_mutex_lock(&emulator_mutex);
  int code = emulated_run(function->name, grid[0], grid[1], grid[2], block[0], block[1], block[2],
                          launch->shared_bytes, parameters);
  pthread_mutex_unlock(&emulator_mutex);
  if (code) {
    fake_log("failed", code, EAGER, "the emulated kernel `%s`", function->name);
    return cudaErrorLaunchFailure;
  }
  mark_outputs(function, parameters);
  return cudaSuccess;
}

static CUresult check_launch(const Function* function, const unsigned* grid, const unsigned* block,
                             unsigned shared_bytes, void** parameters) {
  uint64_t n_threads = (uint64_t)block[0] * block[1] * block[2];
  int is_empty = !grid[0] || !grid[1] || !grid[2] || n_threads == 0;
  int is_too_large = n_threads > 1024 || block[2] > 64 || grid[0] > 0x7fffffff || grid[1] > 65535 ||
                     grid[2] > 65535;
  int has_too_much_shared = shared_bytes > (unsigned)function->max_dynamic_shared_bytes;
  int lacks_parameters = function->n_parameters > 0 && !parameters;
  if (!is_empty && !is_too_large && !has_too_much_shared && !lacks_parameters) return CUDA_SUCCESS;
  fake_log("failed", CUDA_ERROR_INVALID_VALUE, EAGER,
           "launch of %s: grid %u %u %u, block %u %u %u, %u bytes of shared memory%s",
           function->name, grid[0], grid[1], grid[2], block[0], block[1], block[2], shared_bytes,
           lacks_parameters ? ", no parameters" : "");
  return CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                            unsigned block_x, unsigned block_y, unsigned block_z,
                            unsigned shared_bytes, CUstream stream, void** parameters,
                            void** extra) {
  (void)extra;
  const Function* function = (const Function*)handle;
  unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
  CUresult error = check_launch(function, grid, block, shared_bytes, parameters);
  if (error) return error;
  int64_t n_blocks = (int64_t)grid_x * grid_y * grid_z;
  if (function->n_parameters < 0)
    return result(fake_count(stream, "kernel", n_blocks, function->name));

  size_t n_bytes = sizeof(Launch) + parameter_bytes(function);
  Launch* launch = aligned_alloc(16, align(n_bytes));
  *launch = (Launch){.function = function, .shared_bytes = shared_bytes};
  memcpy(launch->grid, grid, sizeof grid);
  memcpy(launch->block, block, sizeof block);
  size_t offset = 0;
  for (int i = 0; i < function->n_parameters; i++) {
    offset = align(offset);
    memcpy(launch->parameters + offset, parameters[i], function->sizes[i]);
    offset += function->sizes[i];
  }
  cudaError_t failed = fake_submit(stream, &(FakeWork){.kind = "kernel",
                                                       .number = n_blocks,
                                                       .detail = function->name,
                                                       .run = run_launch,
                                                       .state = launch,
                                                       .state_bytes = n_bytes});
  free(launch);
  return result(failed);
}

API CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                       unsigned grid_z, unsigned block_x, unsigned block_y,
                                       unsigned block_z, unsigned shared_bytes, CUstream stream,
                                       void** parameters) {
  return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes,
                        stream, parameters, NULL);
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                              void** extra) {
  return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ,
                        config->blockDimX, config->blockDimY, config->blockDimZ,
                        config->sharedMemBytes, config->hStream, parameters, extra);
}
