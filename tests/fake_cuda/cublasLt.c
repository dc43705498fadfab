// cuBLASLt of the fake CUDA runtime: descriptors that keep what the log needs, one algorithm for
// every product, and products, which are counted.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

enum { SUCCESS = 0, TRANSPOSE_A = 3, BATCH_COUNT = 5, NO_TRANSPOSE = 0 };

typedef struct {
  int transpose_a;
} Operation;

typedef struct {
  uint64_t n_rows, n_columns;
  int n_batches;
} Layout;

// cublasLtMatmulHeuristicResult_t
typedef struct {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
} Heuristic;

API size_t cublasLtGetVersion(void) { return 130100; }

API int cublasLtCreate(void** handle) {
  *handle = calloc(1, 64);
  return SUCCESS;
}

API int cublasLtMatmulDescCreate(Operation** operation, int compute_type, int scale_type) {
  (void)compute_type, (void)scale_type;
  *operation = calloc(1, sizeof **operation);
  return SUCCESS;
}

API int cublasLtMatmulDescSetAttribute(Operation* operation, int attribute, const void* value,
                                       size_t n_bytes) {
  if (attribute == TRANSPOSE_A && n_bytes == sizeof(int))
    memcpy(&operation->transpose_a, value, n_bytes);
  return SUCCESS;
}

API int cublasLtMatmulDescDestroy(Operation* operation) {
  free(operation);
  return SUCCESS;
}

API int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t n_rows, uint64_t n_columns,
                                   int64_t stride) {
  (void)type, (void)stride;
  *layout = calloc(1, sizeof **layout);
  **layout = (Layout){n_rows, n_columns, 1};
  return SUCCESS;
}

API int cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value,
                                         size_t n_bytes) {
  if (attribute == BATCH_COUNT && n_bytes == sizeof(int))
    memcpy(&layout->n_batches, value, n_bytes);
  return SUCCESS;
}

API int cublasLtMatrixLayoutDestroy(Layout* layout) {
  free(layout);
  return SUCCESS;
}

API int cublasLtMatmulPreferenceCreate(void** preference) {
  *preference = calloc(1, 64);
  return SUCCESS;
}

API int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value,
                                             size_t n_bytes) {
  (void)preference, (void)attribute, (void)value, (void)n_bytes;
  return SUCCESS;
}

API int cublasLtMatmulPreferenceDestroy(void* preference) {
  free(preference);
  return SUCCESS;
}

API int cublasLtMatmulAlgoGetHeuristic(void* handle, const Operation* operation, const Layout* a,
                                       const Layout* b, const Layout* c, const Layout* d,
                                       const void* preference, int n_requested, Heuristic* results,
                                       int* n_returned) {
  (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
  *n_returned = n_requested > 0;
  if (*n_returned) memset(results, 0, sizeof *results);
  return SUCCESS;
}

API int cublasLtMatmul(void* handle, const Operation* operation, const void* alpha, const void* a,
                       const Layout* a_layout, const void* b, const Layout* b_layout,
                       const void* beta, const void* c, const Layout* c_layout, void* d,
                       const Layout* d_layout, const void* algorithm, void* workspace,
                       size_t workspace_bytes, cudaStream_t stream) {
  (void)handle, (void)alpha, (void)a, (void)b, (void)b_layout, (void)beta, (void)c, (void)c_layout;
  (void)d, (void)algorithm, (void)workspace, (void)workspace_bytes;
  uint64_t k = operation->transpose_a == NO_TRANSPOSE ? a_layout->n_columns : a_layout->n_rows;
  char detail[120];
  snprintf(detail, sizeof detail, "cublasLtMatmul m %lu n %lu k %lu batch %d",
           (unsigned long)d_layout->n_rows, (unsigned long)d_layout->n_columns, (unsigned long)k,
           d_layout->n_batches);
  int64_t n_operations = 2 * (int64_t)(d_layout->n_rows * d_layout->n_columns * k);
  int is_failed = fake_count(stream, "product", n_operations * d_layout->n_batches, detail) != 0;
  return is_failed ? 13 : SUCCESS;
}
