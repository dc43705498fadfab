// Runs CUDA kernels on a CPU: as much of CUDA C++ as the sources in src/kernels/cuda use.
//
// The blocks of a grid run one after the other. Within a block a worker runs CUDA threads one by
// one, each as a plain call. A thread that waits at a barrier keeps its worker, which is a
// coroutine with its own stack, and another worker continues with the threads that have not
// started. A kernel without barriers therefore runs as a loop without any switch.
//
// What the emulator checks: shared memory starts as NaN bytes in every block; a barrier that not
// all threads reach ends the process with a message; with FAKE_CUDA_SHUFFLE=seed the threads of a
// block run in a random order between barriers, so that a missing barrier changes results. With
// -fsanitize=address reads and writes outside of an allocation are found, dynamic shared memory
// included.
//
// Include it in one translation unit only. emulate.py generates that unit.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;
static constexpr int warpSize = 32;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Static shared memory of all kernels is one section, which each block finds filled with NaN.
#define __shared__ static __attribute__((section("fake_shared")))

extern "C" {
extern char __start_fake_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_fake_shared[] __attribute__((weak, visibility("hidden")));
}

namespace fake_cuda {

constexpr size_t STACK_BYTES = 1 << 17;
constexpr unsigned MAX_THREADS = 1024;
// Largest dynamic shared memory of a block on sm_90.
constexpr size_t MAX_SHARED_BYTES = 227 << 10;

#if defined(__x86_64__)
// Saves the registers that a call preserves and the stack pointer in `*save`, and continues with
// those of `*load`.
extern "C" void fake_cuda_switch(void** save, void* const* load);
asm(R"(
.text
.local fake_cuda_switch
.type fake_cuda_switch, @function
fake_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fake_cuda_switch, . - fake_cuda_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, size_t size, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack + size) / 16 * 16;
    auto* words = reinterpret_cast<void**>(top);
    // Above the return address there is one word, so that the stack is aligned as after a call.
    *--words = nullptr;
    *--words = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--words = nullptr;
    stack_pointer = words;
  }

  void switch_to(Context& other) { fake_cuda_switch(&stack_pointer, &other.stack_pointer); }
};
#else
// `swapcontext` makes two system calls a switch, which is about twenty times slower.
struct Context {
  ucontext_t context;

  void prepare(char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }

  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

// A coroutine that runs CUDA threads.
struct Worker {
  Context context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  unsigned thread = 0;
};

struct Warp {
  std::vector<Worker*> waiting;
  unsigned mask = 0;
  unsigned finished = 0;
  uint64_t slots[warpSize];
};

// The block that runs.
struct Block {
  const char* kernel = "";
  std::function<void()> body;
  unsigned n_threads = 0, n_finished = 0, n_started = 0;
  std::vector<unsigned> order;
  std::vector<Warp> warps;
  std::vector<Worker*> waiting, ready, idle;
  std::vector<std::unique_ptr<Worker>> workers;
  Worker* current = nullptr;
  Context scheduler;
  std::vector<char> dynamic_shared;
  bool shuffles = false;
  std::mt19937 random;
};

static Block block;

[[noreturn]] static void fail(const char* problem) {
  fprintf(stderr, "the kernel `%s`, block (%u, %u, %u), thread (%u, %u, %u): %s\n", block.kernel,
          blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, problem);
  abort();
}

static void set_thread(unsigned thread) {
  block.current->thread = thread;
  threadIdx.x = thread % blockDim.x;
  threadIdx.y = thread / blockDim.x % blockDim.y;
  threadIdx.z = thread / (blockDim.x * blockDim.y);
}

static void release(std::vector<Worker*>& waiting) {
  block.ready.insert(block.ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// Suspends the current thread. It is in a list of waiting threads.
static void suspend() {
  Worker* worker = block.current;
  worker->context.switch_to(block.scheduler);
  set_thread(worker->thread);
}

static void finish_thread() {
  unsigned thread = block.current->thread;
  block.n_finished++;
  block.warps[thread / warpSize].finished |= 1u << thread % warpSize;
  // Threads that have returned count as arrived.
  if (block.waiting.size() + block.n_finished == block.n_threads) release(block.waiting);
}

static void work() {
  for (;;) {
    while (block.n_started < block.n_threads) {
      set_thread(block.order[block.n_started++]);
      block.body();
      finish_thread();
    }
    block.idle.push_back(block.current);
    block.current->context.switch_to(block.scheduler);
  }
}

static Worker* idle_worker() {
  if (block.idle.empty()) {
    block.workers.push_back(std::make_unique<Worker>());
    Worker* worker = block.workers.back().get();
    worker->context.prepare(worker->stack.get(), STACK_BYTES, work);
    return worker;
  }
  Worker* worker = block.idle.back();
  block.idle.pop_back();
  return worker;
}

// The worker that continues, or null if every thread has finished.
static Worker* next_worker() {
  bool can_start = block.n_started < block.n_threads;
  if (block.shuffles && !block.ready.empty()) {
    size_t n_choices = block.ready.size() + can_start;
    size_t choice = block.random() % n_choices;
    if (choice == block.ready.size()) return idle_worker();
    std::swap(block.ready[choice], block.ready.back());
  } else if (can_start) {
    return idle_worker();
  }
  if (block.ready.empty()) return nullptr;
  Worker* worker = block.ready.back();
  block.ready.pop_back();
  return worker;
}

static void run_block() {
  block.n_finished = block.n_started = 0;
  for (Warp& warp : block.warps) warp.finished = 0;
  if (__start_fake_shared != nullptr) {
    memset(__start_fake_shared, 0xFF, __stop_fake_shared - __start_fake_shared);
  }
  std::fill(block.dynamic_shared.begin(), block.dynamic_shared.end(), static_cast<char>(0xFF));
  if (block.shuffles) std::shuffle(block.order.begin(), block.order.end(), block.random);
  while (Worker* worker = next_worker()) {
    block.current = worker;
    block.scheduler.switch_to(worker->context);
  }
  if (block.n_finished < block.n_threads) {
    fail("deadlock: some threads wait at a barrier that the others do not reach");
  }
}

static std::mutex& launch_lock() {
  static std::mutex lock;
  return lock;
}

// Runs a grid. Returns 0, or 1 if the sizes are not valid.
static int launch(const char* kernel, dim3 grid, dim3 threads, unsigned max_threads,
                  size_t shared_bytes, std::function<void()> body) {
  auto is_empty = [](dim3 size) { return size.x == 0 || size.y == 0 || size.z == 0; };
  uint64_t n_threads = static_cast<uint64_t>(threads.x) * threads.y * threads.z;
  if (is_empty(grid) || is_empty(threads) || n_threads > std::min(max_threads, MAX_THREADS) ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > MAX_SHARED_BYTES) {
    return 1;
  }
  std::lock_guard<std::mutex> guard(launch_lock());
  block.kernel = kernel;
  block.body = std::move(body);
  block.n_threads = static_cast<unsigned>(n_threads);
  block.order.resize(n_threads);
  for (unsigned i = 0; i < n_threads; i++) block.order[i] = i;
  block.warps.assign((n_threads + warpSize - 1) / warpSize, Warp());
  // A new allocation of the exact size, so that the address sanitizer knows its end.
  block.dynamic_shared = std::vector<char>(shared_bytes);
  const char* seed = getenv("FAKE_CUDA_SHUFFLE");
  block.shuffles = seed != nullptr;
  if (block.shuffles) block.random.seed(strtoul(seed, nullptr, 10));
  gridDim = grid;
  blockDim = threads;
  for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) run_block();
    }
  }
  return 0;
}

// Waits until all lanes of `mask` that the block has are at a barrier of the warp.
static void sync_lanes(unsigned mask) {
  unsigned thread = block.current->thread, lane = thread % warpSize;
  Warp& warp = block.warps[thread / warpSize];
  unsigned n_lanes = std::min<unsigned>(warpSize, block.n_threads - thread / warpSize * warpSize);
  if (n_lanes < static_cast<unsigned>(warpSize)) mask &= (1u << n_lanes) - 1;
  if ((mask >> lane & 1) == 0) fail("the mask of a warp barrier lacks the calling lane");
  if ((mask & warp.finished) != 0) fail("a lane of the mask of a warp barrier has returned");
  if (!warp.waiting.empty() && warp.mask != mask) fail("lanes of a warp barrier differ in masks");
  warp.mask = mask;
  warp.waiting.push_back(block.current);
  if (warp.waiting.size() == static_cast<size_t>(__builtin_popcount(mask))) release(warp.waiting);
  suspend();
}

// Exchanges a value between the lanes of `mask`: returns that of lane `source`, or the own value
// if the warp has no such lane.
template <typename T>
T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  unsigned thread = block.current->thread, lane = thread % warpSize;
  Warp& warp = block.warps[thread / warpSize];
  memcpy(&warp.slots[lane], &value, sizeof(T));
  sync_lanes(mask);
  if (source >= 0 && source < warpSize && (mask >> source & 1) != 0) {
    memcpy(&value, &warp.slots[source], sizeof(T));
  }
  sync_lanes(mask);
  return value;
}

inline int lane() { return static_cast<int>(block.current->thread % warpSize); }

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(block.dynamic_shared.data());
}

}  // namespace fake_cuda

[[noreturn]] static inline void __trap() { fake_cuda::fail("__trap()"); }

static inline void __syncthreads() {
  auto& block = fake_cuda::block;
  block.waiting.push_back(block.current);
  if (block.waiting.size() + block.n_finished == block.n_threads) {
    fake_cuda::release(block.waiting);
  }
  fake_cuda::suspend();
}

static inline void __syncwarp(unsigned mask = ~0u) { fake_cuda::sync_lanes(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return fake_cuda::exchange(mask, value, source % warpSize);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return fake_cuda::exchange(mask, value, fake_cuda::lane() ^ lanes);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  return fake_cuda::exchange(mask, value, fake_cuda::lane() + static_cast<int>(distance));
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  return fake_cuda::exchange(mask, value, fake_cuda::lane() - static_cast<int>(distance));
}
