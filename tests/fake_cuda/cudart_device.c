// The GPUs of the fake CUDA runtime: their number, properties and identities.
//
// The host has FAKE_CUDA_GPUS GPUs (default 1), each an H200 as far as libtorch asks.
// CUDA_VISIBLE_DEVICES selects and orders those that the process sees, by index or UUID; bus ids
// and UUIDs belong to the GPU of the host, not to its visible index. FAKE_CUDA_DRIVER_VERSION is
// the version of the driver (default 13000); an older driver than the runtime has no usable GPU.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

enum { RUNTIME_VERSION = 13000, MAX_GPUS = 64, UUID_BYTES = 16 };
#define TOTAL_MEMORY (140ul << 30)
#define FREE_MEMORY (100ul << 30)

static int visible[MAX_GPUS];  // the host's index of each visible GPU
static int n_visible;

static void uuid_of_host_gpu(char uuid[UUID_BYTES], int gpu) {
  char text[UUID_BYTES + 1];
  snprintf(text, sizeof text, "FAKE-CUDA-GPU-%02d", gpu);
  memcpy(uuid, text, UUID_BYTES);
}

// The text of a UUID as in CUDA_VISIBLE_DEVICES and nvidia-smi.
static void format_uuid(char* text, size_t capacity, int gpu) {
  unsigned char b[UUID_BYTES];
  uuid_of_host_gpu((char*)b, gpu);
  snprintf(text, capacity,
           "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1],
           b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14],
           b[15]);
}

// The host's index for an entry of CUDA_VISIBLE_DEVICES; -1 if there is no such GPU.
static int parse_gpu(const char* entry, int n_gpus) {
  char* end;
  long index = strtol(entry, &end, 10);
  if (end != entry && *end == '\0') return index >= 0 && index < n_gpus ? (int)index : -1;
  for (int gpu = 0; gpu < n_gpus; gpu++) {
    char text[64];
    format_uuid(text, sizeof text, gpu);
    if (strlen(entry) > 4 && strncmp(entry, text, strlen(entry)) == 0) return gpu;
  }
  return -1;
}

static void find_visible(void) {
  int n_gpus = fake_environment("FAKE_CUDA_GPUS", 1);
  if (n_gpus > MAX_GPUS) n_gpus = MAX_GPUS;
  const char* list = getenv("CUDA_VISIBLE_DEVICES");
  if (!list) {
    for (int gpu = 0; gpu < n_gpus; gpu++) visible[n_visible++] = gpu;
    return;
  }
  char copy[4096], *rest = copy;
  snprintf(copy, sizeof copy, "%s", list);
  // As in CUDA, the first entry without a GPU ends the list.
  for (char* entry; (entry = strsep(&rest, ",")) && n_visible < MAX_GPUS;) {
    int gpu = parse_gpu(entry, n_gpus);
    if (gpu < 0) break;
    visible[n_visible++] = gpu;
  }
}

static int n_devices(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, find_visible);
  return n_visible;
}

static int is_device(int device) { return device >= 0 && device < n_devices(); }

static __thread int current_device;

API cudaError_t cudaGetDeviceCount(int* count) {
  int driver;
  cudaDriverGetVersion(&driver);
  *count = 0;
  if (driver < RUNTIME_VERSION) return fake_fail(cudaErrorInsufficientDriver);
  *count = n_devices();
  return *count ? cudaSuccess : fake_fail(cudaErrorNoDevice);
}

API cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

API cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return fake_fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake_environment("FAKE_CUDA_DRIVER_VERSION", RUNTIME_VERSION);
  return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = RUNTIME_VERSION;
  return cudaSuccess;
}

cudaError_t fake_device_uuid(char* uuid, int device) {
  if (!is_device(device)) return fake_fail(cudaErrorInvalidDevice);
  uuid_of_host_gpu(uuid, visible[device]);
  return cudaSuccess;
}

static int bus_number(int device) { return 4 + visible[device]; }

API cudaError_t cudaDeviceGetPCIBusId(char* text, int capacity, int device) {
  if (!is_device(device)) return fake_fail(cudaErrorInvalidDevice);
  snprintf(text, (size_t)capacity, "0000:%02X:00.0", (unsigned)bus_number(device));
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device) {
  if (!is_device(device)) return fake_fail(cudaErrorInvalidDevice);
  *properties = (struct cudaDeviceProp){
      .name = "Fake H200",
      .totalGlobalMem = TOTAL_MEMORY,
      .sharedMemPerBlock = 48 << 10,
      .sharedMemPerBlockOptin = 227 << 10,
      .sharedMemPerMultiprocessor = 228 << 10,
      .reservedSharedMemPerBlock = 1 << 10,
      .regsPerBlock = 1 << 16,
      .regsPerMultiprocessor = 1 << 16,
      .warpSize = 32,
      .memPitch = 0x7fffffff,
      .maxThreadsPerBlock = 1024,
      .maxThreadsPerMultiProcessor = 2048,
      .maxThreadsDim = {1024, 1024, 64},
      .maxGridSize = {0x7fffffff, 65535, 65535},
      .maxBlocksPerMultiProcessor = 32,
      .totalConstMem = 1 << 16,
      .major = 9,
      .minor = 0,
      .textureAlignment = 512,
      .multiProcessorCount = 132,
      .canMapHostMemory = 1,
      .concurrentKernels = 1,
      .ECCEnabled = 1,
      .pciBusID = bus_number(device),
      .asyncEngineCount = 3,
      .unifiedAddressing = 1,
      .managedMemory = 1,
      .memoryBusWidth = 6144,
      .l2CacheSize = 60 << 20,
      .cooperativeLaunch = 1,
      .clusterLaunch = 1,
      .memoryPoolsSupported = 1,
  };
  return fake_device_uuid(properties->uuid.bytes, device);
}

// Attributes that are not a flag which is set.
static const struct {
  enum cudaDeviceAttr attribute;
  int value;
} ATTRIBUTES[] = {
    {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrMaxBlockDimX, 1024},
    {cudaDevAttrMaxBlockDimY, 1024},
    {cudaDevAttrMaxBlockDimZ, 64},
    {cudaDevAttrMaxGridDimX, 0x7fffffff},
    {cudaDevAttrMaxGridDimY, 65535},
    {cudaDevAttrMaxGridDimZ, 65535},
    {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
    {cudaDevAttrReservedSharedMemoryPerBlock, 1 << 10},
    {cudaDevAttrTotalConstantMemory, 1 << 16},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrMaxRegistersPerBlock, 1 << 16},
    {cudaDevAttrMaxRegistersPerMultiprocessor, 1 << 16},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
    {cudaDevAttrMultiProcessorCount, 132},
    {cudaDevAttrComputeCapabilityMajor, 9},
    {cudaDevAttrComputeCapabilityMinor, 0},
    {cudaDevAttrL2CacheSize, 60 << 20},
    {cudaDevAttrComputeMode, cudaComputeModeDefault},
    {cudaDevAttrIntegrated, 0},
    {cudaDevAttrKernelExecTimeout, 0},
    {cudaDevAttrPciDeviceId, 0},
    {cudaDevAttrPciDomainId, 0},
};

API cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  if (!is_device(device)) return fake_fail(cudaErrorInvalidDevice);
  *value = attribute == cudaDevAttrPciBusId ? bus_number(device) : 1;
  for (size_t i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; i++)
    if (ATTRIBUTES[i].attribute == attribute) *value = ATTRIBUTES[i].value;
  return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *free_bytes = FREE_MEMORY;
  *total_bytes = TOTAL_MEMORY;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int* can_access, int device, int peer) {
  *can_access = device != peer;
  return cudaSuccess;
}

API cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  (void)peer, (void)flags;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  static char pools[MAX_GPUS];
  if (!is_device(device)) return fake_fail(cudaErrorInvalidDevice);
  *pool = (cudaMemPool_t)&pools[device];
  return cudaSuccess;
}
