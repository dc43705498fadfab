// Streams, events, captures and graphs of the fake CUDA runtime.
//
// Work is over when the call that submits it returns, so streams and events never wait. A capture
// follows CUDA's rules: which calls a capture forbids in which mode and thread, forks and joins by
// events, and the errors of an invalid capture. A graph keeps the nodes in the order of their
// calls, and a launch executes them in this order; dependencies between nodes are not kept.
// Not modelled: conditional nodes, updates of an instantiated graph, memory nodes.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

enum { MAX_CAPTURE_STREAMS = 64 };

// How many nodes of each stream of a capture precede a point in the capture.
typedef struct {
  uint32_t n_nodes[MAX_CAPTURE_STREAMS];
} Clock;

typedef struct Node {
  struct Node* next;
  FakeWork work;  // owns `detail` and `state`
} Node;

typedef struct {
  int n_references;
  size_t n_nodes;
  Node *first, **last;
} Graph;

typedef struct Stream {
  int number;
  unsigned flags;
  int priority;
  struct Capture* capture;
  int slot;  // its index in the capture
} Stream;

typedef struct Capture {
  struct Capture* next;
  unsigned long long id;
  enum cudaStreamCaptureMode mode;
  pthread_t owner;
  int is_invalid;
  Graph* graph;
  int n_streams;
  Stream* streams[MAX_CAPTURE_STREAMS];  // the first is the one that began the capture
  Clock clocks[MAX_CAPTURE_STREAMS];
} Capture;

typedef struct {
  int is_recorded;
  unsigned long long capture_id;  // 0: recorded outside of captures
  Clock clock;
} Event;

// Guards all of the above.
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Capture* captures;
static unsigned long long n_captures;
static int n_streams = 1;

static Stream legacy_stream;
static __thread Stream per_thread_stream;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static Stream* stream_of(cudaStream_t handle) {
  if (handle == NULL || handle == cudaStreamLegacy) return &legacy_stream;
  if (handle == cudaStreamPerThread) return &per_thread_stream;
  return (Stream*)handle;
}

int fake_stream_number(cudaStream_t handle) { return stream_of(handle)->number; }

int fake_is_capturing(cudaStream_t handle) {
  pthread_mutex_lock(&mutex);
  int is_capturing = stream_of(handle)->capture != NULL;
  pthread_mutex_unlock(&mutex);
  return is_capturing;
}

// --- Graphs ---

static void release_graph(Graph* graph) {
  pthread_mutex_lock(&mutex);
  int is_last = --graph->n_references == 0;
  pthread_mutex_unlock(&mutex);
  if (!is_last) return;
  for (Node *node = graph->first, *next; node; node = next) {
    next = node->next;
    if (node->work.release) node->work.release(node->work.state);
    free(node->work.state);
    free((char*)node->work.detail);
    free(node);
  }
  free(graph);
}

static Graph* retain_graph(Graph* graph) {
  pthread_mutex_lock(&mutex);
  graph->n_references++;
  pthread_mutex_unlock(&mutex);
  return graph;
}

static Graph* new_graph(void) {
  Graph* graph = calloc(1, sizeof *graph);
  graph->n_references = 1;
  graph->last = &graph->first;
  return graph;
}

static void append(Graph* graph, Node* node) {
  *graph->last = node;
  graph->last = &node->next;
  graph->n_nodes++;
}

// A node with copies of all that `work` refers to. Call it without `mutex`.
static Node* new_node(const FakeWork* work) {
  Node* node = calloc(1, sizeof *node);
  node->work = *work;
  node->work.detail = strdup(work->detail);
  node->work.state = NULL;
  if (work->state_bytes) {
    node->work.state = malloc(work->state_bytes);
    memcpy(node->work.state, work->state, work->state_bytes);
  }
  if (work->retain) work->retain(node->work.state);
  return node;
}

static cudaError_t execute(const FakeWork* work) {
  if (work->run) return work->run(work->state);
  fake_forget_all_contents();
  return cudaSuccess;
}

static cudaError_t replay(void* state) {
  for (const Node* node = (*(Graph**)state)->first; node; node = node->next) {
    if (node->work.run)
      fake_log(node->work.kind, node->work.number, REPLAYED, "%s", node->work.detail);
    cudaError_t error = execute(&node->work);
    if (error) return fake_fail(error);
  }
  return cudaSuccess;
}

static void retain_child(void* state) { retain_graph(*(Graph**)state); }
static void release_child(void* state) { release_graph(*(Graph**)state); }

API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* n_nodes) {
  size_t n = ((Graph*)graph)->n_nodes;
  const Node* node = ((Graph*)graph)->first;
  for (size_t i = 0; nodes && i < *n_nodes; i++) {
    nodes[i] = (cudaGraphNode_t)node;
    if (node) node = node->next;
  }
  if (!nodes || *n_nodes > n) *n_nodes = n;
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                              unsigned long long flags) {
  (void)flags;
  // The nodes of a captured graph do not change, so both share them.
  *executable = (cudaGraphExec_t)retain_graph((Graph*)graph);
  return cudaSuccess;
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  Graph* graph = (Graph*)executable;
  return fake_submit(stream, &(FakeWork){.kind = "graph_launch",
                                         .number = (int64_t)graph->n_nodes,
                                         .detail = "",
                                         .run = replay,
                                         .retain = retain_child,
                                         .release = release_child,
                                         .state = &graph,
                                         .state_bytes = sizeof graph});
}

API cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream) {
  (void)executable, (void)stream;
  return cudaSuccess;
}

API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  release_graph((Graph*)graph);
  return cudaSuccess;
}

API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  release_graph((Graph*)executable);
  return cudaSuccess;
}

// --- What captures forbid ---

static cudaError_t forbid(Capture* capture, cudaError_t error, const char* what) {
  if (capture) capture->is_invalid = 1;
  fake_log("forbidden", error, CAPTURED, "%s", what);
  return fake_fail(error);
}

cudaError_t fake_check_unsafe(const char* call) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  pthread_mutex_lock(&mutex);
  for (Capture* capture = captures; capture; capture = capture->next) {
    int is_forbidden = pthread_equal(capture->owner, pthread_self())
                           ? capture->mode != cudaStreamCaptureModeRelaxed
                           : capture->mode == cudaStreamCaptureModeGlobal &&
                                 thread_mode == cudaStreamCaptureModeGlobal;
    if (is_forbidden) error = forbid(capture, cudaErrorStreamCaptureUnsupported, call);
  }
  pthread_mutex_unlock(&mutex);
  return error;
}

// Checks work on a stream that does not capture while other streams do.
static cudaError_t check_beside_captures(const Stream* stream, const FakeWork* work) {
  for (Capture* capture = captures; capture; capture = capture->next) {
    int is_legacy = stream == &legacy_stream;
    for (int i = 0; is_legacy && i < capture->n_streams; i++)
      if (!(capture->streams[i]->flags & cudaStreamNonBlocking))
        return forbid(capture, cudaErrorStreamCaptureImplicit,
                      "work on the legacy default stream while a blocking stream captures");
    if (is_legacy || pthread_equal(capture->owner, pthread_self()))
      fake_log("hazard", 0, EAGER, "not captured, on stream %d: %s%s%s", stream->number, work->kind,
               *work->detail ? " " : "", work->detail);
  }
  return cudaSuccess;
}

cudaError_t fake_submit(cudaStream_t handle, const FakeWork* work) {
  Stream* stream = stream_of(handle);
  Node* node = fake_is_capturing(handle) ? new_node(work) : NULL;
  cudaError_t error = cudaSuccess;
  pthread_mutex_lock(&mutex);
  Capture* capture = stream->capture;
  int is_captured = capture != NULL && node != NULL;
  if (is_captured) {
    // The nodes of an invalid capture are freed with its graph.
    append(capture->graph, node);
    capture->clocks[stream->slot].n_nodes[stream->slot]++;
    if (capture->is_invalid) error = fake_fail(cudaErrorStreamCaptureInvalidated);
  } else {
    error = check_beside_captures(stream, work);
  }
  pthread_mutex_unlock(&mutex);
  if (error) return error;
  fake_log(work->kind, work->number, is_captured ? CAPTURED : EAGER, "%s", work->detail);
  return is_captured ? cudaSuccess : fake_fail(execute(work));
}

cudaError_t fake_count(cudaStream_t stream, const char* kind, int64_t number, const char* detail) {
  return fake_submit(stream, &(FakeWork){.kind = kind, .number = number, .detail = detail});
}

// --- Captures ---

static Capture* find_capture(unsigned long long id) {
  Capture* capture = captures;
  while (capture && capture->id != id) capture = capture->next;
  return capture;
}

static cudaError_t add_stream(Capture* capture, Stream* stream) {
  if (capture->n_streams == MAX_CAPTURE_STREAMS)
    return forbid(capture, cudaErrorStreamCaptureUnsupported, "more streams than the fake permits");
  stream->capture = capture;
  stream->slot = capture->n_streams;
  memset(&capture->clocks[stream->slot], 0, sizeof(Clock));
  capture->streams[capture->n_streams++] = stream;
  return cudaSuccess;
}

static void merge(Clock* clock, const Clock* other) {
  for (int i = 0; i < MAX_CAPTURE_STREAMS; i++)
    if (clock->n_nodes[i] < other->n_nodes[i]) clock->n_nodes[i] = other->n_nodes[i];
}

// Whether all nodes precede the end of the stream that began the capture.
static int is_joined(const Capture* capture) {
  for (int i = 0; i < capture->n_streams; i++)
    if (capture->clocks[0].n_nodes[i] < capture->clocks[i].n_nodes[i]) return 0;
  return 1;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
  Stream* stream = stream_of(handle);
  cudaError_t error = cudaSuccess;
  pthread_mutex_lock(&mutex);
  if (stream == &legacy_stream) {
    error = forbid(NULL, cudaErrorStreamCaptureUnsupported, "capture of the legacy default stream");
  } else if (stream->capture) {
    error = forbid(stream->capture, cudaErrorIllegalState, "capture of a stream that captures");
  } else {
    Capture* capture = calloc(1, sizeof *capture);
    capture->next = captures;
    capture->id = ++n_captures;
    capture->mode = mode;
    capture->owner = pthread_self();
    capture->graph = new_graph();
    captures = capture;
    add_stream(capture, stream);
    static const char* const MODES[] = {"global", "thread-local", "relaxed"};
    fake_log("capture_begin", (int64_t)capture->id, CAPTURED, "%s", MODES[mode]);
  }
  pthread_mutex_unlock(&mutex);
  return error;
}

static void remove_capture(Capture* capture) {
  Capture** link = &captures;
  while (*link != capture) link = &(*link)->next;
  *link = capture->next;
  for (int i = 0; i < capture->n_streams; i++) capture->streams[i]->capture = NULL;
}

API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* result) {
  Stream* stream = stream_of(handle);
  *result = NULL;
  pthread_mutex_lock(&mutex);
  Capture* capture = stream->capture;
  cudaError_t error = cudaSuccess;
  if (!capture)
    error = forbid(NULL, cudaErrorIllegalState, "end of a capture that has not begun");
  else if (stream != capture->streams[0])
    error = forbid(capture, cudaErrorStreamCaptureUnmatched, "end of a capture on another stream");
  else if (capture->mode != cudaStreamCaptureModeRelaxed &&
           !pthread_equal(capture->owner, pthread_self()))
    error =
        forbid(capture, cudaErrorStreamCaptureWrongThread, "end of a capture on another thread");
  if (error) {
    pthread_mutex_unlock(&mutex);
    return error;
  }
  if (capture->is_invalid)
    error = fake_fail(cudaErrorStreamCaptureInvalidated);
  else if (!is_joined(capture))
    error = forbid(capture, cudaErrorStreamCaptureUnjoined, "end of a capture with unjoined work");
  remove_capture(capture);
  pthread_mutex_unlock(&mutex);

  Graph* graph = capture->graph;
  free(capture);
  fake_log("capture_end", (int64_t)graph->n_nodes, CAPTURED, "%s", error ? "invalid" : "");
  if (error)
    release_graph(graph);
  else
    *result = (cudaGraph_t)graph;
  return error;
}

static enum cudaStreamCaptureStatus capture_status(const Stream* stream) {
  if (!stream->capture) return cudaStreamCaptureStatusNone;
  return stream->capture->is_invalid ? cudaStreamCaptureStatusInvalidated
                                     : cudaStreamCaptureStatusActive;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t** dependencies,
                                         const cudaGraphEdgeData** edges, size_t* n_dependencies) {
  pthread_mutex_lock(&mutex);
  const Stream* stream = stream_of(handle);
  *status = capture_status(stream);
  if (id) *id = stream->capture ? stream->capture->id : 0;
  if (graph) *graph = stream->capture ? (cudaGraph_t)stream->capture->graph : NULL;
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (n_dependencies) *n_dependencies = 0;
  pthread_mutex_unlock(&mutex);
  return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(handle, status, NULL, NULL, NULL, NULL, NULL);
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  enum cudaStreamCaptureMode previous = thread_mode;
  thread_mode = *mode;
  *mode = previous;
  return cudaSuccess;
}

// --- Streams ---

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
  Stream* stream = calloc(1, sizeof *stream);
  pthread_mutex_lock(&mutex);
  stream->number = n_streams++;
  pthread_mutex_unlock(&mutex);
  stream->flags = flags;
  stream->priority = priority;
  *handle = (cudaStream_t)stream;
  return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  return cudaStreamCreateWithPriority(handle, flags, 0);
}

API cudaError_t cudaStreamCreate(cudaStream_t* handle) {
  return cudaStreamCreateWithPriority(handle, cudaStreamDefault, 0);
}

API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  if (fake_is_capturing(handle))
    return forbid(NULL, cudaErrorStreamCaptureUnsupported, "cudaStreamDestroy");
  free(handle);
  return cudaSuccess;
}

API cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  *priority = stream_of(handle)->priority;
  return cudaSuccess;
}

// Checks a call that asks whether a stream has finished.
static cudaError_t check_status_call(cudaStream_t handle, const char* call) {
  pthread_mutex_lock(&mutex);
  Capture* capture = stream_of(handle)->capture;
  cudaError_t error =
      capture ? forbid(capture, cudaErrorStreamCaptureUnsupported, call) : cudaSuccess;
  pthread_mutex_unlock(&mutex);
  return error ? error : fake_check_unsafe(call);
}

API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return check_status_call(handle, "cudaStreamQuery");
}

API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  cudaError_t error = check_status_call(handle, "cudaStreamSynchronize");
  if (!error) fake_log("wait", 0, EAGER, "stream");
  return error;
}

API cudaError_t cudaDeviceSynchronize(void) {
  cudaError_t error = fake_check_unsafe("cudaDeviceSynchronize");
  if (!error) fake_log("wait", 0, EAGER, "device");
  return error;
}

// --- Host functions ---

typedef struct {
  cudaHostFn_t function;
  void* data;
} HostFunction;

static cudaError_t run_host_function(void* state) {
  const HostFunction* host = state;
  host->function(host->data);
  return cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  HostFunction host = {function, data};
  return fake_submit(stream, &(FakeWork){.kind = "host_function",
                                         .detail = "",
                                         .run = run_host_function,
                                         .state = &host,
                                         .state_bytes = sizeof host});
}

API cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t callback,
                                      void* data, unsigned flags) {
  (void)flags;
  cudaError_t error = check_status_call(handle, "cudaStreamAddCallback");
  if (!error) callback(handle, cudaSuccess, data);
  return error;
}

// --- Events ---

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  (void)flags;
  *handle = calloc(1, sizeof(Event));
  return cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }

API cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  free(handle);
  return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle,
                                         unsigned flags) {
  if (flags & cudaEventRecordExternal)
    return fake_count(stream_handle, "event_record", 0, "external");
  Event* event = (Event*)handle;
  pthread_mutex_lock(&mutex);
  const Stream* stream = stream_of(stream_handle);
  const Capture* capture = stream->capture;
  event->is_recorded = 1;
  event->capture_id = capture ? capture->id : 0;
  if (capture) event->clock = capture->clocks[stream->slot];
  pthread_mutex_unlock(&mutex);
  fake_log("event_record", stream->number, capture ? CAPTURED : EAGER, "%s", "");
  return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  return cudaEventRecordWithFlags(handle, stream, 0);
}

// Makes `stream` depend on an event of a capture. A stream outside of captures joins the capture.
static cudaError_t wait_for_captured_event(Stream* stream, const Event* event) {
  Capture* capture = find_capture(event->capture_id);
  if (!capture)
    return forbid(stream->capture, cudaErrorInvalidValue, "wait for an event of an ended capture");
  if (stream == &legacy_stream)
    return forbid(capture, cudaErrorStreamCaptureImplicit,
                  "the legacy default stream in a capture");
  if (stream->capture && stream->capture != capture) {
    stream->capture->is_invalid = 1;
    return forbid(capture, cudaErrorStreamCaptureMerge, "wait for an event of another capture");
  }
  cudaError_t error = stream->capture ? cudaSuccess : add_stream(capture, stream);
  if (!error) merge(&capture->clocks[stream->slot], &event->clock);
  return error;
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned flags) {
  if (flags & cudaEventWaitExternal) return fake_count(handle, "event_wait", 0, "external");
  Stream* stream = stream_of(handle);
  const Event* event = (const Event*)event_handle;
  cudaError_t error = cudaSuccess;
  pthread_mutex_lock(&mutex);
  if (event->capture_id)
    error = wait_for_captured_event(stream, event);
  else if (stream->capture && event->is_recorded)
    error = forbid(stream->capture, cudaErrorStreamCaptureIsolation,
                   "wait for an event that was recorded outside of the capture");
  int is_captured = stream->capture != NULL;
  pthread_mutex_unlock(&mutex);
  fake_log("event_wait", stream->number, is_captured ? CAPTURED : EAGER, "%s", "");
  return error;
}

// Checks a call that asks whether an event has happened.
static cudaError_t check_event_call(cudaEvent_t handle, const char* call) {
  const Event* event = (const Event*)handle;
  if (!event->capture_id) return fake_check_unsafe(call);
  pthread_mutex_lock(&mutex);
  cudaError_t error = forbid(find_capture(event->capture_id), cudaErrorCapturedEvent, call);
  pthread_mutex_unlock(&mutex);
  return error;
}

API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  return check_event_call(handle, "cudaEventQuery");
}

API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  cudaError_t error = check_event_call(handle, "cudaEventSynchronize");
  if (!error) fake_log("wait", 0, EAGER, "event");
  return error;
}

API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  cudaError_t error = check_event_call(start, "cudaEventElapsedTime");
  if (!error) error = check_event_call(end, "cudaEventElapsedTime");
  *milliseconds = 1;
  return error;
}
