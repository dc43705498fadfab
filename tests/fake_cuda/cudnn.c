// cuDNN of the fake CUDA runtime: what libtorch calls for recurrent networks of one direction.
// Descriptors keep their values, weights have places in the weight space, and calls are counted
// with the algorithm and layout that libtorch has chosen. build.py generates stubs for the rest.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

enum { SUCCESS = 0, FAILED = 5000, VERSION = 91900, MAX_DIMENSIONS = 8 };
enum { PACKED_LAYOUT = 1 };
#define WORKSPACE_BYTES (1ul << 20)

typedef struct {
  cudaStream_t stream;
} Handle;

typedef struct {
  int type, n_dimensions, sizes[MAX_DIMENSIONS], strides[MAX_DIMENSIONS];
} TensorDescriptor;

typedef struct {
  int algorithm, cell, type, math_type, input_size, hidden_size, n_layers;
} RnnDescriptor;

typedef struct {
  int layout, n_steps, batch_size;
} RnnDataDescriptor;

// --- Library ---

API size_t cudnnGetVersion(void) { return VERSION; }
API size_t cudnnGetCudartVersion(void) { return 13000; }

API int cudnnGetProperty(int property, int* value) {
  *value = property == 0 ? VERSION / 10000 : property == 1 ? VERSION / 100 % 100 : VERSION % 100;
  return SUCCESS;
}

API const char* cudnnGetErrorString(int status) {
  return status == SUCCESS ? "CUDNN_STATUS_SUCCESS" : "CUDNN_STATUS_EXECUTION_FAILED";
}

API void cudnnGetLastErrorString(char* text, size_t capacity) {
  if (capacity) *text = '\0';
}

API int cudnnCreate(Handle** handle) {
  // The library allocates memory of the device.
  if (fake_check_unsafe("cudnnCreate")) return FAILED;
  *handle = calloc(1, sizeof **handle);
  return SUCCESS;
}

API int cudnnDestroy(Handle* handle) {
  free(handle);
  return SUCCESS;
}

API int cudnnSetStream(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return SUCCESS;
}

API int cudnnGetStream(const Handle* handle, cudaStream_t* stream) {
  *stream = handle->stream;
  return SUCCESS;
}

// The generated functions call this, too.
int fake_cudnn_count(const Handle* handle, int64_t number, const char* detail) {
  return fake_count(handle->stream, "cudnn", number, detail) ? FAILED : SUCCESS;
}

// --- Descriptors ---

#define DESCRIPTOR(name, type)                           \
  API int cudnnCreate##name##Descriptor(void** handle) { \
    *handle = calloc(1, sizeof(type));                   \
    return SUCCESS;                                      \
  }                                                      \
  API int cudnnDestroy##name##Descriptor(void* handle) { \
    free(handle);                                        \
    return SUCCESS;                                      \
  }

DESCRIPTOR(Tensor, TensorDescriptor)
DESCRIPTOR(RNN, RnnDescriptor)
DESCRIPTOR(RNNData, RnnDataDescriptor)
DESCRIPTOR(Dropout, int)

API int cudnnSetDropoutDescriptor(void* descriptor, Handle* handle, float probability, void* states,
                                  size_t n_bytes, unsigned long long seed) {
  (void)descriptor, (void)probability, (void)states, (void)n_bytes, (void)seed;
  // Initialises the generators of the states, unless there are none.
  return states ? fake_cudnn_count(handle, 0, "SetDropoutDescriptor") : SUCCESS;
}

API int cudnnDropoutGetStatesSize(const Handle* handle, size_t* n_bytes) {
  (void)handle;
  *n_bytes = WORKSPACE_BYTES;
  return SUCCESS;
}

API int cudnnSetTensorNdDescriptor(TensorDescriptor* descriptor, int type, int n_dimensions,
                                   const int* sizes, const int* strides) {
  if (n_dimensions > MAX_DIMENSIONS) return FAILED;
  descriptor->type = type;
  descriptor->n_dimensions = n_dimensions;
  memcpy(descriptor->sizes, sizes, (size_t)n_dimensions * sizeof *sizes);
  memcpy(descriptor->strides, strides, (size_t)n_dimensions * sizeof *strides);
  return SUCCESS;
}

API int cudnnGetTensorNdDescriptor(const TensorDescriptor* descriptor, int n_requested, int* type,
                                   int* n_dimensions, int* sizes, int* strides) {
  *type = descriptor->type;
  *n_dimensions = descriptor->n_dimensions;
  for (int i = 0; i < n_requested && i < descriptor->n_dimensions; i++) {
    sizes[i] = descriptor->sizes[i];
    strides[i] = descriptor->strides[i];
  }
  return SUCCESS;
}

API int cudnnSetRNNDescriptor_v8(RnnDescriptor* descriptor, int algorithm, int cell, int bias,
                                 int direction, int input_mode, int type, int math_precision,
                                 int math_type, int input_size, int hidden_size,
                                 int projection_size, int n_layers, void* dropout, unsigned flags) {
  (void)bias, (void)direction, (void)input_mode, (void)math_precision, (void)projection_size;
  (void)dropout, (void)flags;
  *descriptor = (RnnDescriptor){.algorithm = algorithm,
                                .cell = cell,
                                .type = type,
                                .math_type = math_type,
                                .input_size = input_size,
                                .hidden_size = hidden_size,
                                .n_layers = n_layers};
  return SUCCESS;
}

API int cudnnSetRNNDataDescriptor(RnnDataDescriptor* descriptor, int type, int layout, int n_steps,
                                  int batch_size, int width, const int* lengths, void* padding) {
  (void)type, (void)width, (void)lengths, (void)padding;
  *descriptor = (RnnDataDescriptor){layout, n_steps, batch_size};
  return SUCCESS;
}

// --- The weight space: the matrices of all layers, then their biases ---

static const char* const CELLS[] = {"RELU", "TANH", "LSTM", "GRU"};

// Matrices that are multiplied with the input; as many are with the hidden state.
static size_t n_gates(const RnnDescriptor* rnn) {
  static const size_t n[] = {1, 1, 4, 3};
  return n[rnn->cell & 3];
}

static size_t element_bytes(const RnnDescriptor* rnn) {
  enum { DOUBLE = 1, HALF = 2, BFLOAT16 = 9 };
  return rnn->type == DOUBLE ? 8 : rnn->type == HALF || rnn->type == BFLOAT16 ? 2 : 4;
}

static size_t input_size(const RnnDescriptor* rnn, int layer) {
  return (size_t)(layer ? rnn->hidden_size : rnn->input_size);
}

// Elements of the matrices of the layers before `layer`.
static size_t matrices_before(const RnnDescriptor* rnn, int layer) {
  size_t n = 0, hidden = (size_t)rnn->hidden_size;
  for (int i = 0; i < layer; i++) n += n_gates(rnn) * hidden * (input_size(rnn, i) + hidden);
  return n;
}

static size_t biases_before(const RnnDescriptor* rnn, int layer) {
  return (size_t)layer * 2 * n_gates(rnn) * (size_t)rnn->hidden_size;
}

API int cudnnGetRNNWeightSpaceSize(const Handle* handle, const RnnDescriptor* rnn,
                                   size_t* n_bytes) {
  (void)handle;
  size_t n = matrices_before(rnn, rnn->n_layers) + biases_before(rnn, rnn->n_layers);
  *n_bytes = n * element_bytes(rnn);
  return SUCCESS;
}

API int cudnnGetRNNWeightParams(const Handle* handle, const RnnDescriptor* rnn, int layer,
                                size_t space_bytes, char* space, int matrix_id,
                                TensorDescriptor* matrix, void** matrix_address,
                                TensorDescriptor* bias, void** bias_address) {
  (void)handle, (void)space_bytes;
  size_t gates = n_gates(rnn), id = (size_t)matrix_id, hidden = (size_t)rnn->hidden_size;
  size_t input = input_size(rnn, layer), width = id < gates ? input : hidden;
  size_t matrix_at =
      matrices_before(rnn, layer) +
      (id < gates ? id * hidden * input : gates * hidden * input + (id - gates) * hidden * hidden);
  size_t bias_at = matrices_before(rnn, rnn->n_layers) + biases_before(rnn, layer) + id * hidden;
  int rows = (int)hidden, columns = (int)width;
  if (matrix)
    *matrix = (TensorDescriptor){rnn->type, 3, {1, rows, columns}, {rows * columns, columns, 1}};
  if (bias) *bias = (TensorDescriptor){rnn->type, 3, {1, rows, 1}, {rows, 1, 1}};
  if (matrix_address) *matrix_address = space ? space + matrix_at * element_bytes(rnn) : NULL;
  if (bias_address) *bias_address = space ? space + bias_at * element_bytes(rnn) : NULL;
  return SUCCESS;
}

API int cudnnGetRNNTempSpaceSizes(const Handle* handle, const RnnDescriptor* rnn, int mode,
                                  const RnnDataDescriptor* data, size_t* workspace_bytes,
                                  size_t* reserve_bytes) {
  (void)handle, (void)rnn, (void)mode, (void)data;
  if (workspace_bytes) *workspace_bytes = WORKSPACE_BYTES;
  if (reserve_bytes) *reserve_bytes = WORKSPACE_BYTES;
  return SUCCESS;
}

// --- Calls ---

static int count_rnn(const Handle* handle, const char* call, const RnnDescriptor* rnn,
                     const RnnDataDescriptor* data) {
  static const char* const ALGORITHMS[] = {"STANDARD", "PERSIST_STATIC", "PERSIST_DYNAMIC",
                                           "PERSIST_STATIC_SMALL_H"};
  static const char* const MATH[] = {"DEFAULT", "TENSOR_OP", "TENSOR_OP_ALLOW_CONVERSION", "FMA"};
  char detail[200];
  snprintf(detail, sizeof detail, "%s %s algorithm %s layout %s steps %d batch %d math %s", call,
           CELLS[rnn->cell & 3], ALGORITHMS[rnn->algorithm & 3],
           data->layout == PACKED_LAYOUT ? "PACKED" : "UNPACKED", data->n_steps, data->batch_size,
           MATH[rnn->math_type & 3]);
  return fake_cudnn_count(handle, data->n_steps, detail);
}

// The further parameters of these three are not read.
API int cudnnRNNForward(const Handle* handle, const RnnDescriptor* rnn, int mode,
                        const int* lengths, const RnnDataDescriptor* data) {
  (void)mode, (void)lengths;
  return count_rnn(handle, "RNNForward", rnn, data);
}

API int cudnnRNNBackwardData_v8(const Handle* handle, const RnnDescriptor* rnn, const int* lengths,
                                const RnnDataDescriptor* data) {
  (void)lengths;
  return count_rnn(handle, "RNNBackwardData", rnn, data);
}

API int cudnnRNNBackwardWeights_v8(const Handle* handle, const RnnDescriptor* rnn, int adds,
                                   const int* lengths, const RnnDataDescriptor* data) {
  (void)adds, (void)lengths;
  return count_rnn(handle, "RNNBackwardWeights", rnn, data);
}
