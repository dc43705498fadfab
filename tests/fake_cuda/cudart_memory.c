// Memory, copies and memsets of the fake CUDA runtime.
//
// What the host reads from the device is made up unless the device memory is known to hold what a
// GPU would have written, which copies, memsets, NCCL calls and emulated kernels achieve (see
// `fake_is_known`). A read of 1 byte, a flag such as `isfinite().all()`, gives 1. A read of five
// numbers of f32 or f64 is the outcome of a training step and gives 1, 1, 0, 0, 1. An integer that
// is read after a kernel of CUB is the number of elements that `nonzero` or `unique` selects, and
// gives 1. Other reads give zeros, except those of memory that a large copy from the host has
// filled, such as the parameters: they give what the memory holds.
//
// FAKE_CUDA_READS=memory    all reads give what the memory holds
// FAKE_CUDA_READS=made-up   the rule applies to known contents, too: emulated kernels compute with
//                           what libtorch's kernels have not written, possibly NaN
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fake.h"

enum { PAGE = 4096, MAX_RANGES = 512 };

// A copy of pageable memory to the device of at most this size returns before the device has it.
#define STAGED_BYTES (64ul << 10)
// A copy from the host of at least this size fills a tensor that lives long.
#define LARGE_COPY_BYTES (1ul << 20)

// --- Known contents of device memory ---

// The oldest range is overwritten first: a forgotten range only makes a read made up.
typedef struct {
  struct {
    uintptr_t start, end;
  } items[MAX_RANGES];
  int n, next;
} Ranges;

static pthread_mutex_t ranges_mutex = PTHREAD_MUTEX_INITIALIZER;
static Ranges known, filled_by_host;

static int contains(const Ranges* ranges, const void* address, size_t n_bytes) {
  uintptr_t start = (uintptr_t)address, end = start + n_bytes;
  int is_contained = 0;
  pthread_mutex_lock(&ranges_mutex);
  for (int i = 0; i < ranges->n && !is_contained; i++)
    is_contained = ranges->items[i].start <= start && end <= ranges->items[i].end;
  pthread_mutex_unlock(&ranges_mutex);
  return is_contained;
}

static void insert(Ranges* ranges, const void* address, size_t n_bytes) {
  pthread_mutex_lock(&ranges_mutex);
  ranges->items[ranges->next].start = (uintptr_t)address;
  ranges->items[ranges->next].end = (uintptr_t)address + n_bytes;
  ranges->next = (ranges->next + 1) % MAX_RANGES;
  if (ranges->n < MAX_RANGES) ranges->n++;
  pthread_mutex_unlock(&ranges_mutex);
}

// Empties the ranges that overlap.
static void erase(Ranges* ranges, const void* address, size_t n_bytes) {
  uintptr_t start = (uintptr_t)address, end = start + n_bytes;
  pthread_mutex_lock(&ranges_mutex);
  for (int i = 0; i < ranges->n; i++)
    if (ranges->items[i].start < end && start < ranges->items[i].end)
      ranges->items[i].end = ranges->items[i].start;
  pthread_mutex_unlock(&ranges_mutex);
}

static void forget(const void* address, size_t n_bytes) {
  erase(&known, address, n_bytes);
  erase(&filled_by_host, address, n_bytes);
}

int fake_is_known(const void* address, size_t n_bytes) {
  return n_bytes == 0 || contains(&known, address, n_bytes);
}

void fake_set_known(const void* address, size_t n_bytes, int is_known) {
  if (n_bytes == 0) return;
  if (is_known)
    insert(&known, address, n_bytes);
  else
    erase(&known, address, n_bytes);
}

void fake_forget_all_contents(void) {
  pthread_mutex_lock(&ranges_mutex);
  known.n = known.next = 0;
  pthread_mutex_unlock(&ranges_mutex);
}

// --- Allocations, in the order of their addresses ---

typedef enum { PAGEABLE, DEVICE, PINNED, REGISTERED } MemoryKind;

static const char* const KIND_NAMES[] = {"pageable", "device", "pinned", "registered"};

typedef struct {
  char* start;
  size_t n_bytes;
  MemoryKind kind;
  int device;
} Block;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Block* blocks;
static size_t n_blocks, capacity;

// The number of blocks that start at or before `address`.
static size_t rank_of(const void* address) {
  size_t low = 0, high = n_blocks;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if ((uintptr_t)blocks[middle].start <= (uintptr_t)address)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

static void add_block(void* start, size_t n_bytes, MemoryKind kind) {
  int device;
  cudaGetDevice(&device);
  pthread_mutex_lock(&mutex);
  if (n_blocks == capacity) {
    capacity = capacity ? 2 * capacity : 1024;
    blocks = realloc(blocks, capacity * sizeof *blocks);
    if (!blocks) abort();
  }
  size_t at = rank_of(start);
  memmove(blocks + at + 1, blocks + at, (n_blocks - at) * sizeof *blocks);
  blocks[at] = (Block){start, n_bytes, kind, device};
  n_blocks++;
  pthread_mutex_unlock(&mutex);
  fake_log("allocate", (int64_t)n_bytes, EAGER, "%s", KIND_NAMES[kind]);
}

// Finds the block that contains `address`. A pageable block stands for all other memory.
static Block block_at(const void* address) {
  Block found = {NULL, 0, PAGEABLE, -1};
  pthread_mutex_lock(&mutex);
  size_t at = rank_of(address);
  if (at > 0) {
    Block* block = &blocks[at - 1];
    if ((const char*)address < block->start + block->n_bytes) found = *block;
  }
  pthread_mutex_unlock(&mutex);
  return found;
}

static cudaError_t remove_block(void* start, MemoryKind kind) {
  pthread_mutex_lock(&mutex);
  size_t at = rank_of(start);
  int is_found = at > 0 && blocks[at - 1].start == start && blocks[at - 1].kind == kind;
  Block block = {0};
  if (is_found) {
    block = blocks[at - 1];
    memmove(blocks + at - 1, blocks + at, (n_blocks - at) * sizeof *blocks);
    n_blocks--;
  }
  pthread_mutex_unlock(&mutex);
  if (!is_found) {
    fake_log("failed", cudaErrorInvalidValue, EAGER, "free of unknown %s memory", KIND_NAMES[kind]);
    return fake_fail(cudaErrorInvalidValue);
  }
  if (kind == DEVICE) forget(start, block.n_bytes);
  if (kind != REGISTERED) munmap(start, block.n_bytes);
  fake_log("free", (int64_t)block.n_bytes, EAGER, "%s", KIND_NAMES[kind]);
  return cudaSuccess;
}

static cudaError_t allocate(void** address, size_t n_bytes, MemoryKind kind) {
  size_t n = n_bytes ? (n_bytes + PAGE - 1) / PAGE * PAGE : PAGE;
  void* start =
      mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *address = NULL;
  if (start == MAP_FAILED) return fake_fail(cudaErrorMemoryAllocation);
  *address = start;
  add_block(start, n, kind);
  return cudaSuccess;
}

API cudaError_t cudaMalloc(void** address, size_t n_bytes) {
  cudaError_t error = fake_check_unsafe("cudaMalloc");
  return error ? error : allocate(address, n_bytes, DEVICE);
}

API cudaError_t cudaFree(void* address) {
  cudaError_t error = fake_check_unsafe("cudaFree");
  return error || !address ? error : remove_block(address, DEVICE);
}

API cudaError_t cudaMallocAsync(void** address, size_t n_bytes, cudaStream_t stream) {
  (void)stream;
  return allocate(address, n_bytes, DEVICE);
}

API cudaError_t cudaFreeAsync(void* address, cudaStream_t stream) {
  (void)stream;
  return remove_block(address, DEVICE);
}

API cudaError_t cudaHostAlloc(void** address, size_t n_bytes, unsigned flags) {
  (void)flags;
  cudaError_t error = fake_check_unsafe("cudaHostAlloc");
  return error ? error : allocate(address, n_bytes, PINNED);
}

API cudaError_t cudaFreeHost(void* address) {
  cudaError_t error = fake_check_unsafe("cudaFreeHost");
  return error || !address ? error : remove_block(address, PINNED);
}

API cudaError_t cudaHostRegister(void* address, size_t n_bytes, unsigned flags) {
  (void)flags;
  cudaError_t error = fake_check_unsafe("cudaHostRegister");
  if (!error) add_block(address, n_bytes, REGISTERED);
  return error;
}

API cudaError_t cudaHostUnregister(void* address) {
  cudaError_t error = fake_check_unsafe("cudaHostUnregister");
  return error ? error : remove_block(address, REGISTERED);
}

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes,
                                         const void* address) {
  Block block = block_at(address);
  *attributes =
      (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered, .device = block.device};
  if (block.kind == PAGEABLE) return cudaSuccess;
  attributes->type = block.kind == DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  attributes->devicePointer = (void*)address;
  attributes->hostPointer = block.kind == DEVICE ? NULL : (void*)address;
  return cudaSuccess;
}

size_t fake_device_bytes_from(const void* address) {
  Block block = block_at(address);
  return block.kind == DEVICE ? (size_t)(block.start + block.n_bytes - (const char*)address) : 0;
}

// --- Copies ---

// `n_rows` rows of `n_bytes`.
typedef struct {
  char* to;
  const char* from;
  size_t n_bytes, n_rows, to_pitch, from_pitch;
  int is_to_device, is_from_device;
} Copy;

// Whether the host reads what the device memory holds.
static int is_read_real(const Copy* copy) {
  const char* reads = getenv("FAKE_CUDA_READS");
  int is_made_up = reads && strcmp(reads, "made-up") == 0;
  if (copy->n_rows > 1 || (reads && strcmp(reads, "memory") == 0)) return 1;
  return contains(&filled_by_host, copy->from, copy->n_bytes) ||
         (!is_made_up && fake_is_known(copy->from, copy->n_bytes));
}

static void make_up(void* to, size_t n_bytes) {
  static const float outcome_f32[] = {1, 1, 0, 0, 1};
  static const double outcome_f64[] = {1, 1, 0, 0, 1};
  memset(to, 0, n_bytes);
  int is_number = n_bytes == 4 || n_bytes == 8;
  // The namespace in which libtorch compiles CUB.
  int is_selected = is_number && strstr(fake_last_kernel(), "at_cuda_detail3cub") != NULL;
  if (n_bytes == 1 || is_selected) *(char*)to = 1;
  if (n_bytes == sizeof outcome_f32) memcpy(to, outcome_f32, n_bytes);
  if (n_bytes == sizeof outcome_f64) memcpy(to, outcome_f64, n_bytes);
}

static cudaError_t run_copy(void* state) {
  const Copy* copy = state;
  if (copy->is_from_device && !copy->is_to_device && !is_read_real(copy)) {
    make_up(copy->to, copy->n_bytes);
    return cudaSuccess;
  }
  for (size_t row = 0; row < copy->n_rows; row++)
    memmove(copy->to + row * copy->to_pitch, copy->from + row * copy->from_pitch, copy->n_bytes);
  if (copy->is_to_device && copy->n_rows == 1) {
    int is_from_host = !copy->is_from_device;
    fake_set_known(copy->to, copy->n_bytes,
                   is_from_host || fake_is_known(copy->from, copy->n_bytes));
    if (is_from_host && copy->n_bytes >= LARGE_COPY_BYTES)
      insert(&filled_by_host, copy->to, copy->n_bytes);
  }
  return cudaSuccess;
}

// Copies `copy->n_rows` rows. `is_synchronous`: the call without a stream.
static cudaError_t submit_copy(Copy copy, int is_synchronous, cudaStream_t stream) {
  MemoryKind from = block_at(copy.from).kind, to = block_at(copy.to).kind;
  size_t n_bytes = copy.n_bytes * copy.n_rows;
  copy.is_from_device = from == DEVICE;
  copy.is_to_device = to == DEVICE;
  MemoryKind host = copy.is_from_device ? to : from;
  int is_pageable = host == PAGEABLE;
  int blocks_host = is_synchronous;
  if (is_pageable && (to != DEVICE || n_bytes > STAGED_BYTES)) blocks_host = 1;

  char detail[64];
  snprintf(detail, sizeof detail, "%s2%s%s%s%s", copy.is_from_device ? "D" : "H",
           copy.is_to_device ? "D" : "H",
           host == DEVICE ? ""
           : is_pageable  ? " pageable"
                          : " pinned",
           copy.n_rows > 1 ? " 2D" : "", blocks_host ? ", blocks" : "");
  if (is_synchronous) {
    cudaError_t error = fake_check_unsafe("a synchronous copy");
    if (error) return error;
  }
  if (is_pageable && fake_is_capturing(stream))
    fake_log("hazard", 0, CAPTURED, "%s: the graph keeps the address of pageable memory", detail);
  return fake_submit(stream, &(FakeWork){.kind = "copy",
                                         .number = (int64_t)n_bytes,
                                         .detail = detail,
                                         .run = run_copy,
                                         .state = &copy,
                                         .state_bytes = sizeof copy});
}

static Copy row(void* to, const void* from, size_t n_bytes) {
  return (Copy){.to = to, .from = from, .n_bytes = n_bytes, .n_rows = 1};
}

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n_bytes,
                                enum cudaMemcpyKind direction, cudaStream_t stream) {
  (void)direction;
  return submit_copy(row(to, from, n_bytes), 0, stream);
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t n_bytes,
                           enum cudaMemcpyKind direction) {
  (void)direction;
  return submit_copy(row(to, from, n_bytes), 1, NULL);
}

API cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device,
                                    size_t n_bytes, cudaStream_t stream) {
  (void)to_device, (void)from_device;
  return submit_copy(row(to, from, n_bytes), 0, stream);
}

API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                  size_t width, size_t height, enum cudaMemcpyKind direction,
                                  cudaStream_t stream) {
  (void)direction;
  Copy copy = {.to = to,
               .from = from,
               .n_bytes = width,
               .n_rows = height,
               .to_pitch = to_pitch,
               .from_pitch = from_pitch};
  return submit_copy(copy, 0, stream);
}

// --- Memsets ---

typedef struct {
  void* to;
  int value;
  size_t n_bytes;
} Memset;

static cudaError_t run_memset(void* state) {
  const Memset* fill = state;
  memset(fill->to, fill->value, fill->n_bytes);
  fake_set_known(fill->to, fill->n_bytes, 1);
  return cudaSuccess;
}

API cudaError_t cudaMemsetAsync(void* to, int value, size_t n_bytes, cudaStream_t stream) {
  Memset fill = {to, value, n_bytes};
  return fake_submit(stream, &(FakeWork){.kind = "memset",
                                         .number = (int64_t)n_bytes,
                                         .detail = "",
                                         .run = run_memset,
                                         .state = &fill,
                                         .state_bytes = sizeof fill});
}

API cudaError_t cudaMemset(void* to, int value, size_t n_bytes) {
  return cudaMemsetAsync(to, value, n_bytes, NULL);
}

// --- Variables of the device: all are one block of memory, which nothing reads ---

API cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  static char variables[1 << 16];
  (void)symbol;
  *address = variables;
  return cudaSuccess;
}

API cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t n_bytes,
                                   size_t offset, enum cudaMemcpyKind direction) {
  (void)symbol, (void)from, (void)n_bytes, (void)offset, (void)direction;
  return cudaSuccess;
}
