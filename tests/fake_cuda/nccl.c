// NCCL of the fake CUDA runtime, between processes of one host.
//
// All-reduce, broadcast, all-gather and reduce-scatter of u8, i8, i32, i64, f32, f64 and bf16 move
// and reduce the real numbers, through memory that the ranks share. A call is executed when its
// stream reaches it, so it waits for the other ranks. It fails on all ranks if they make different
// calls, which real NCCL does not notice. As in real NCCL, two ranks may not use one GPU, unless
// NCCL_HOSTID makes them ranks of different hosts. Not modelled: send and receive, other
// collectives, communicators split from others, and registered memory.
//
// FAKE_NCCL_VERSION     what ncclGetVersion returns (default 22809)
// FAKE_NCCL_FAULT       faults, separated by commas; K counts from 1
//   init-never:RANK         the rank does not arrive in ncclCommInitRank
//   init-slow:RANK:SECONDS  it arrives late
//   call-never:RANK:K       it does not take part in its call number K
//   async-error:RANK:K      ncclCommGetAsyncError returns ncclRemoteError after K calls
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fake.h"

enum { MAX_RANKS = 64, ID_BYTES = 128, HEADER_BYTES = 1 << 16, MAX_GROUP = 256 };
#define ROOM_BYTES (4ul << 20)  // for each rank, and so of the pieces of a call

// ncclResult_t
enum {
  SUCCESS = 0,
  UNHANDLED_CUDA_ERROR = 1,
  SYSTEM_ERROR = 2,
  INTERNAL_ERROR = 3,
  INVALID_ARGUMENT = 4,
  INVALID_USAGE = 5,
  REMOTE_ERROR = 6,
  IN_PROGRESS = 7,
};

typedef enum { ALL_REDUCE, BROADCAST, ALL_GATHER, REDUCE_SCATTER } CallKind;
static const char* const CALL_NAMES[] = {"AllReduce", "Broadcast", "AllGather", "ReduceScatter"};

// ncclDataType_t
typedef enum { I8, U8, I32, U32, I64, U64, F16, F32, F64, BF16 } Type;
static const char* const TYPE_NAMES[] = {"i8",  "u8",  "i32", "u32", "i64",
                                         "u64", "f16", "f32", "f64", "bf16"};
static const size_t TYPE_BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};

// ncclRedOp_t
typedef enum { SUM, PRODUCT, MAXIMUM, MINIMUM } Operation;
static const char* const OPERATION_NAMES[] = {"sum", "product", "max", "min"};

typedef struct {
  char bytes[ID_BYTES];
} UniqueId;

// What a rank calls, for comparison with the other ranks.
typedef struct {
  CallKind kind;
  Type type;
  int operation, root;  // -1 where the call has none
  size_t count;
  int is_input_known;  // see fake_is_known
} Post;

typedef struct {
  int n_ranks;
  char bus_id[32];
  char host[128];
} Member;

// The start of the shared memory; a room for each rank follows.
typedef struct {
  pthread_mutex_t mutex;
  pthread_cond_t all_arrived;
  int n_arrived;
  unsigned generation;
  Member members[MAX_RANKS];
  // Alternately used, so that no rank overwrites what a slower rank compares.
  Post posts[2][MAX_RANKS];
} Shared;

_Static_assert(sizeof(Shared) <= HEADER_BYTES, "the header is larger than its place");

// Never freed, because graphs may refer to it.
typedef struct {
  int rank, n_ranks, device;
  UniqueId id;
  Shared* shared;
  long n_calls;
  atomic_int n_captured;  // calls in graphs
  atomic_int state;       // what ncclCommGetAsyncError returns
  atomic_int is_aborted;
} Communicator;

// --- Errors ---

static char last_error[1024];

static int fail(int code, const char* format, ...) FORMAT(2, 3);
static int fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  fake_log("failed", code, EAGER, "nccl: %s", last_error);
  return code;
}

API const char* ncclGetLastError(const Communicator* communicator) {
  (void)communicator;
  return last_error;
}

API const char* ncclGetErrorString(int code) {
  static const char* const TEXTS[] = {
      "no error",
      "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
      "unhandled system error (run with NCCL_DEBUG=INFO for details)",
      "internal error - please report this issue to the NCCL developers",
      "invalid argument (run with NCCL_DEBUG=WARN for details)",
      "invalid usage (run with NCCL_DEBUG=WARN for details)",
      "remote process exited or there was a network error",
      "NCCL operation in progress",
  };
  return code >= 0 && code <= IN_PROGRESS ? TEXTS[code] : "unknown result code";
}

API int ncclGetVersion(int* version) {
  *version = fake_environment("FAKE_NCCL_VERSION", 22809);
  return SUCCESS;
}

// --- Faults ---

// Whether FAKE_NCCL_FAULT has the fault for the rank; its last number comes in `value`.
static int has_fault(const char* name, int rank, int* value) {
  char copy[256], *rest = copy;
  const char* faults = getenv("FAKE_NCCL_FAULT");
  snprintf(copy, sizeof copy, "%s", faults ? faults : "");
  for (char* fault; (fault = strsep(&rest, ","));) {
    size_t length = strlen(name);
    int fault_rank = -1;
    if (strncmp(fault, name, length) == 0 && fault[length] == ':' &&
        sscanf(fault + length, ":%d:%d", &fault_rank, value) >= 1 && fault_rank == rank)
      return 1;
  }
  return 0;
}

static void sleep_forever(const char* fault) {
  fake_log("failed", 0, EAGER, "nccl: injected fault %s", fault);
  for (;;) pause();
}

// --- Meeting of all ranks ---

// Waits until all ranks arrive.
static int meet(Communicator* communicator) {
  Shared* shared = communicator->shared;
  pthread_mutex_lock(&shared->mutex);
  unsigned generation = shared->generation;
  if (++shared->n_arrived == communicator->n_ranks) {
    shared->n_arrived = 0;
    shared->generation++;
    pthread_cond_broadcast(&shared->all_arrived);
  }
  while (shared->generation == generation && !communicator->is_aborted)
    pthread_cond_wait(&shared->all_arrived, &shared->mutex);
  int has_met = shared->generation != generation;
  if (!has_met) shared->n_arrived--;
  pthread_mutex_unlock(&shared->mutex);
  return has_met ? SUCCESS : INTERNAL_ERROR;
}

static char* room(const Communicator* communicator, int rank) {
  return (char*)communicator->shared + HEADER_BYTES + (size_t)rank * ROOM_BYTES;
}

// --- Communicators ---

static void* map_shared(int file) {
  size_t n_bytes = HEADER_BYTES + MAX_RANKS * ROOM_BYTES;
  void* start = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  return start == MAP_FAILED ? NULL : start;
}

// The id is the path of an anonymous file of this process, which has no name that could be left
// over. It is as large as for the most ranks, but only pages that are written take memory.
API int ncclGetUniqueId(UniqueId* id) {
  memset(id, 0, sizeof *id);
  int file = memfd_create("fake-nccl", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, HEADER_BYTES + MAX_RANKS * (off_t)ROOM_BYTES) != 0)
    return fail(SYSTEM_ERROR, "cannot create shared memory: %m");
  Shared* shared = map_shared(file);
  if (!shared) return fail(SYSTEM_ERROR, "cannot map shared memory: %m");
  pthread_mutexattr_t mutex_attributes;
  pthread_mutexattr_init(&mutex_attributes);
  pthread_mutexattr_setpshared(&mutex_attributes, PTHREAD_PROCESS_SHARED);
  pthread_mutex_init(&shared->mutex, &mutex_attributes);
  pthread_condattr_t condition_attributes;
  pthread_condattr_init(&condition_attributes);
  pthread_condattr_setpshared(&condition_attributes, PTHREAD_PROCESS_SHARED);
  pthread_cond_init(&shared->all_arrived, &condition_attributes);
  munmap(shared, HEADER_BYTES + MAX_RANKS * ROOM_BYTES);
  // The file stays open, because other ranks open it by this path.
  snprintf(id->bytes, sizeof id->bytes, "/proc/%d/fd/%d", (int)getpid(), file);
  return SUCCESS;
}

static int check_members(const Communicator* communicator) {
  const Member* members = communicator->shared->members;
  for (int a = 0; a < communicator->n_ranks; a++) {
    if (members[a].n_ranks != communicator->n_ranks)
      return fail(INVALID_ARGUMENT, "rank %d expects %d ranks, and rank %d expects %d", a,
                  members[a].n_ranks, communicator->rank, communicator->n_ranks);
    for (int b = 0; b < a; b++)
      if (strcmp(members[a].bus_id, members[b].bus_id) == 0 &&
          strcmp(members[a].host, members[b].host) == 0)
        return fail(INVALID_USAGE,
                    "Duplicate GPU detected : rank %d and rank %d both on CUDA "
                    "device %s",
                    a, b, members[a].bus_id);
  }
  return SUCCESS;
}

// Fills the place of this rank in the shared memory, and meets the other ranks.
static int join(Communicator* communicator) {
  int rank = communicator->rank, seconds = 0;
  if (has_fault("init-never", rank, &seconds)) sleep_forever("init-never");
  if (has_fault("init-slow", rank, &seconds)) sleep((unsigned)seconds);
  int file = open(communicator->id.bytes, O_RDWR | O_CLOEXEC);
  if (file < 0) return fail(SYSTEM_ERROR, "cannot open the shared memory: %m");
  communicator->shared = map_shared(file);
  close(file);
  if (!communicator->shared) return fail(SYSTEM_ERROR, "cannot map the shared memory: %m");

  Member* member = &communicator->shared->members[rank];
  const char* host = getenv("NCCL_HOSTID");
  member->n_ranks = communicator->n_ranks;
  cudaDeviceGetPCIBusId(member->bus_id, sizeof member->bus_id, communicator->device);
  if (host)
    snprintf(member->host, sizeof member->host, "%s", host);
  else
    gethostname(member->host, sizeof member->host - 1);
  if (meet(communicator)) return fail(INTERNAL_ERROR, "the communicator was aborted");
  int code = check_members(communicator);
  if (!code) fake_log("nccl", communicator->n_ranks, EAGER, "CommInitRank rank %d", rank);
  return code;
}

static int new_communicator(Communicator** result, int n_ranks, const UniqueId* id, int rank) {
  *result = NULL;
  if (n_ranks < 1 || n_ranks > MAX_RANKS || rank < 0 || rank >= n_ranks)
    return fail(INVALID_ARGUMENT, "rank %d of %d", rank, n_ranks);
  // The library allocates memory of the device.
  if (fake_check_unsafe("ncclCommInitRank")) return UNHANDLED_CUDA_ERROR;
  Communicator* communicator = calloc(1, sizeof *communicator);
  communicator->n_ranks = n_ranks;
  communicator->rank = rank;
  communicator->id = *id;
  cudaGetDevice(&communicator->device);
  *result = communicator;
  return SUCCESS;
}

API int ncclCommInitRank(Communicator** result, int n_ranks, UniqueId id, int rank) {
  int code = new_communicator(result, n_ranks, &id, rank);
  if (!code) code = join(*result);
  if (code) *result = NULL;
  return code;
}

static void* join_in_background(void* argument) {
  Communicator* communicator = argument;
  communicator->state = join(communicator);
  return NULL;
}

// ncclConfig_t, as far as it is read.
typedef struct {
  size_t n_bytes;
  unsigned magic, version;
  int is_blocking;
} Config;

API int ncclCommInitRankConfig(Communicator** result, int n_ranks, UniqueId id, int rank,
                               const Config* config) {
  if (!config || config->is_blocking != 0) return ncclCommInitRank(result, n_ranks, id, rank);
  int code = new_communicator(result, n_ranks, &id, rank);
  if (code) return code;
  (*result)->state = IN_PROGRESS;
  pthread_t thread;
  if (pthread_create(&thread, NULL, join_in_background, *result) != 0)
    return fail(SYSTEM_ERROR, "cannot start a thread");
  pthread_detach(thread);
  return IN_PROGRESS;
}

API int ncclCommFinalize(Communicator* communicator) {
  (void)communicator;
  return SUCCESS;
}

API int ncclCommDestroy(Communicator* communicator) {
  // Real NCCL polls until these graphs are destroyed, possibly forever.
  if (communicator->n_captured)
    fake_log("hazard", 0, EAGER, "ncclCommDestroy before graphs with %d of its calls are destroyed",
             communicator->n_captured);
  return communicator->shared && !communicator->state ? meet(communicator) : SUCCESS;
}

API int ncclCommAbort(Communicator* communicator) {
  fake_log("nccl", 0, EAGER, "CommAbort");
  communicator->is_aborted = 1;
  // Wakes the threads of this process; those of other ranks find that nothing has changed.
  if (communicator->shared) {
    pthread_mutex_lock(&communicator->shared->mutex);
    pthread_cond_broadcast(&communicator->shared->all_arrived);
    pthread_mutex_unlock(&communicator->shared->mutex);
  }
  return SUCCESS;
}

API int ncclCommGetAsyncError(Communicator* communicator, int* error) {
  int k = 0;
  *error = communicator->state;
  if (has_fault("async-error", communicator->rank, &k) && communicator->n_calls >= k) {
    snprintf(last_error, sizeof last_error, "injected fault async-error");
    *error = REMOTE_ERROR;
  }
  return SUCCESS;
}

API int ncclCommCount(const Communicator* communicator, int* n_ranks) {
  *n_ranks = communicator->n_ranks;
  return SUCCESS;
}

API int ncclCommUserRank(const Communicator* communicator, int* rank) {
  *rank = communicator->rank;
  return SUCCESS;
}

API int ncclCommCuDevice(const Communicator* communicator, int* device) {
  *device = communicator->device;
  return SUCCESS;
}

// --- Reductions ---

static float from_bf16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

// Rounds to the nearest, ties to even.
static uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#define COMBINED(operation, a, b)                     \
  ((operation) == SUM       ? (a) + (b)               \
   : (operation) == PRODUCT ? (a) * (b)               \
   : (operation) == MAXIMUM ? ((a) > (b) ? (a) : (b)) \
                            : ((a) < (b) ? (a) : (b)))

#define REDUCTION(name, type)                                                              \
  static void reduce_##name(void* into, const void* from, size_t n, Operation operation) { \
    type* a = into;                                                                        \
    const type* b = from;                                                                  \
    for (size_t i = 0; i < n; i++) a[i] = (type)COMBINED(operation, a[i], b[i]);           \
  }

REDUCTION(i8, int8_t)
REDUCTION(u8, uint8_t)
REDUCTION(i32, int32_t)
REDUCTION(u32, uint32_t)
REDUCTION(i64, int64_t)
REDUCTION(u64, uint64_t)
REDUCTION(f32, float)
REDUCTION(f64, double)

static void reduce_bf16(void* into, const void* from, size_t n, Operation operation) {
  uint16_t* a = into;
  const uint16_t* b = from;
  for (size_t i = 0; i < n; i++) {
    float x = from_bf16(a[i]), y = from_bf16(b[i]);
    a[i] = to_bf16(COMBINED(operation, x, y));
  }
}

typedef void Reduction(void* into, const void* from, size_t n, Operation operation);
static Reduction* const REDUCTIONS[] = {reduce_i8,  reduce_u8, reduce_i32, reduce_u32, reduce_i64,
                                        reduce_u64, NULL,      reduce_f32, reduce_f64, reduce_bf16};

// --- Calls ---

typedef struct {
  Communicator* communicator;
  Post post;
  const char* from;
  char* to;
  int code;  // the result, if the call is executed at once
} Call;

static int all_reduce(const Call* call) {
  Communicator* communicator = call->communicator;
  size_t width = TYPE_BYTES[call->post.type], n_at_once = ROOM_BYTES / width;
  int rank = communicator->rank, n_ranks = communicator->n_ranks, code = SUCCESS;
  for (size_t at = 0; at < call->post.count && !code; at += n_at_once) {
    size_t n = call->post.count - at < n_at_once ? call->post.count - at : n_at_once;
    memcpy(room(communicator, rank), call->from + at * width, n * width);
    if ((code = meet(communicator))) break;
    // Each rank reduces a part, into the first room.
    size_t start = n * (size_t)rank / (size_t)n_ranks,
           end = n * (size_t)(rank + 1) / (size_t)n_ranks;
    for (int other = 1; other < n_ranks; other++)
      REDUCTIONS[call->post.type](room(communicator, 0) + start * width,
                                  room(communicator, other) + start * width, end - start,
                                  call->post.operation);
    if ((code = meet(communicator))) break;
    memcpy(call->to + at * width, room(communicator, 0), n * width);
    code = meet(communicator);
  }
  return code;
}

static int broadcast(const Call* call) {
  Communicator* communicator = call->communicator;
  size_t n_bytes = call->post.count * TYPE_BYTES[call->post.type];
  int code = SUCCESS;
  for (size_t at = 0; at < n_bytes && !code; at += ROOM_BYTES) {
    size_t n = n_bytes - at < ROOM_BYTES ? n_bytes - at : ROOM_BYTES;
    if (communicator->rank == call->post.root) memcpy(room(communicator, 0), call->from + at, n);
    if ((code = meet(communicator))) break;
    memcpy(call->to + at, room(communicator, 0), n);
    code = meet(communicator);
  }
  return code;
}

static int all_gather(const Call* call) {
  Communicator* communicator = call->communicator;
  size_t n_bytes = call->post.count * TYPE_BYTES[call->post.type];
  int code = SUCCESS;
  for (size_t at = 0; at < n_bytes && !code; at += ROOM_BYTES) {
    size_t n = n_bytes - at < ROOM_BYTES ? n_bytes - at : ROOM_BYTES;
    memcpy(room(communicator, communicator->rank), call->from + at, n);
    if ((code = meet(communicator))) break;
    for (int rank = 0; rank < communicator->n_ranks; rank++)
      memcpy(call->to + (size_t)rank * n_bytes + at, room(communicator, rank), n);
    code = meet(communicator);
  }
  return code;
}

static int reduce_scatter(const Call* call) {
  Communicator* communicator = call->communicator;
  size_t width = TYPE_BYTES[call->post.type], count = call->post.count;
  size_t n_ranks = (size_t)communicator->n_ranks, n_at_once = ROOM_BYTES / width / n_ranks;
  int code = SUCCESS;
  for (size_t at = 0; at < count && !code; at += n_at_once) {
    size_t n = count - at < n_at_once ? count - at : n_at_once;
    for (size_t rank = 0; rank < n_ranks; rank++)
      memcpy(room(communicator, communicator->rank) + rank * n * width,
             call->from + (rank * count + at) * width, n * width);
    if ((code = meet(communicator))) break;
    size_t own = (size_t)communicator->rank * n * width;
    memcpy(call->to + at * width, room(communicator, 0) + own, n * width);
    for (size_t rank = 1; rank < n_ranks; rank++)
      REDUCTIONS[call->post.type](call->to + at * width, room(communicator, (int)rank) + own, n,
                                  call->post.operation);
    code = meet(communicator);
  }
  return code;
}

static int (*const EXECUTIONS[])(const Call*) = {all_reduce, broadcast, all_gather, reduce_scatter};

static void describe(const Post* post, char* text, size_t capacity) {
  int n = snprintf(text, capacity, "%s %s", CALL_NAMES[post->kind], TYPE_NAMES[post->type]);
  if (post->operation >= 0)
    snprintf(text + n, capacity - (size_t)n, " %s", OPERATION_NAMES[post->operation]);
  if (post->root >= 0) snprintf(text + n, capacity - (size_t)n, " root %d", post->root);
}

static size_t input_bytes(const Post* post, int n_ranks) {
  size_t n = post->kind == REDUCE_SCATTER ? (size_t)n_ranks : 1;
  return n * post->count * TYPE_BYTES[post->type];
}

static size_t output_bytes(const Post* post, int n_ranks) {
  size_t n = post->kind == ALL_GATHER ? (size_t)n_ranks : 1;
  return n * post->count * TYPE_BYTES[post->type];
}

// Compares the calls of all ranks; `is_known` says whether all inputs are known.
static int compare_calls(const Call* call, const Post* posts, int* is_known) {
  const Communicator* communicator = call->communicator;
  const Post* own = &call->post;
  *is_known = 1;
  for (int rank = 0; rank < communicator->n_ranks; rank++) {
    const Post* other = &posts[rank];
    if (own->kind != BROADCAST || rank == own->root) *is_known &= other->is_input_known;
    if (own->kind == other->kind && own->type == other->type && own->count == other->count &&
        own->operation == other->operation && own->root == other->root)
      continue;
    char own_text[100], other_text[100];
    describe(own, own_text, sizeof own_text);
    describe(other, other_text, sizeof other_text);
    fake_log("mismatch", communicator->n_calls, EAGER, "rank %d: %s %zu; rank %d: %s %zu",
             communicator->rank, own_text, own->count, rank, other_text, other->count);
    return fail(INVALID_USAGE, "call %ld: rank %d calls %s of %zu elements, and rank %d %s of %zu",
                communicator->n_calls, communicator->rank, own_text, own->count, rank, other_text,
                other->count);
  }
  return SUCCESS;
}

static int execute(Call* call) {
  Communicator* communicator = call->communicator;
  Post* posts = communicator->shared->posts[communicator->n_calls % 2];
  int k = 0, is_known, code;
  if (has_fault("call-never", communicator->rank, &k) && communicator->n_calls + 1 == k)
    sleep_forever("call-never");
  call->post.is_input_known =
      fake_is_known(call->from, input_bytes(&call->post, communicator->n_ranks));
  posts[communicator->rank] = call->post;
  communicator->n_calls++;
  if ((code = meet(communicator))) return fail(code, "the communicator was aborted");
  if ((code = compare_calls(call, posts, &is_known))) return code;
  if ((code = EXECUTIONS[call->post.kind](call))) return fail(code, "the communicator was aborted");
  fake_set_known(call->to, output_bytes(&call->post, communicator->n_ranks), is_known);
  return SUCCESS;
}

static cudaError_t run_call(void* state) {
  Call* call = state;
  call->code = execute(call);
  return call->code ? cudaErrorLaunchFailure : cudaSuccess;
}

static void retain_call(void* state) { ((Call*)state)->communicator->n_captured++; }
static void release_call(void* state) { ((Call*)state)->communicator->n_captured--; }

static int submit(Call* call, cudaStream_t stream) {
  char detail[120], text[100];
  describe(&call->post, text, sizeof text);
  snprintf(detail, sizeof detail, "%s stream %d", text, fake_stream_number(stream));
  cudaError_t error = fake_submit(stream, &(FakeWork){.kind = "nccl",
                                                      .number = (int64_t)call->post.count,
                                                      .detail = detail,
                                                      .run = run_call,
                                                      .retain = retain_call,
                                                      .release = release_call,
                                                      .state = call,
                                                      .state_bytes = sizeof *call});
  if (call->code) return call->code;
  return error ? fail(UNHANDLED_CUDA_ERROR, "%s", cudaGetErrorString(error)) : SUCCESS;
}

// Calls between ncclGroupStart and ncclGroupEnd are submitted by the latter.
static __thread struct {
  int depth, n_calls;
  Call calls[MAX_GROUP];
  cudaStream_t streams[MAX_GROUP];
} group;

API int ncclGroupStart(void) {
  group.depth++;
  return SUCCESS;
}

API int ncclGroupEnd(void) {
  if (group.depth == 0) return fail(INVALID_USAGE, "ncclGroupEnd without ncclGroupStart");
  if (--group.depth > 0) return SUCCESS;
  int code = SUCCESS;
  for (int i = 0; i < group.n_calls && !code; i++) code = submit(&group.calls[i], group.streams[i]);
  group.n_calls = 0;
  return code;
}

static int check_call(const Communicator* communicator, const Post* post) {
  if (!communicator || !communicator->shared || communicator->is_aborted || communicator->state)
    return fail(INVALID_USAGE, "the communicator is not usable");
  if ((unsigned)post->type > BF16 || post->type == F16)
    return fail(INVALID_ARGUMENT, "data type %d", (int)post->type);
  if (post->operation > MINIMUM) return fail(INVALID_ARGUMENT, "operation %d", post->operation);
  if (post->root >= communicator->n_ranks) return fail(INVALID_ARGUMENT, "root %d", post->root);
  return SUCCESS;
}

static int start(const void* from, void* to, Post post, Communicator* communicator,
                 cudaStream_t stream) {
  int code = check_call(communicator, &post);
  if (code) return code;
  Call call = {.communicator = communicator, .post = post, .from = from, .to = to};
  if (group.depth == 0) return submit(&call, stream);
  if (group.n_calls == MAX_GROUP) return fail(INVALID_USAGE, "too many calls in a group");
  group.streams[group.n_calls] = stream;
  group.calls[group.n_calls++] = call;
  return SUCCESS;
}

API int ncclAllReduce(const void* from, void* to, size_t count, int type, int operation,
                      Communicator* communicator, cudaStream_t stream) {
  Post post = {ALL_REDUCE, (Type)type, operation, -1, count, 0};
  return start(from, to, post, communicator, stream);
}

API int ncclBroadcast(const void* from, void* to, size_t count, int type, int root,
                      Communicator* communicator, cudaStream_t stream) {
  Post post = {BROADCAST, (Type)type, -1, root, count, 0};
  return start(from, to, post, communicator, stream);
}

API int ncclAllGather(const void* from, void* to, size_t count, int type,
                      Communicator* communicator, cudaStream_t stream) {
  Post post = {ALL_GATHER, (Type)type, -1, -1, count, 0};
  return start(from, to, post, communicator, stream);
}

API int ncclReduceScatter(const void* from, void* to, size_t count, int type, int operation,
                          Communicator* communicator, cudaStream_t stream) {
  Post post = {REDUCE_SCATTER, (Type)type, operation, -1, count, 0};
  return start(from, to, post, communicator, stream);
}
