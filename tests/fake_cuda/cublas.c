// cuBLAS of the fake CUDA runtime: handles with their streams, and the products that libtorch uses
// most, which are counted with their sizes. build.py generates all other functions; those that are
// work for the GPU are counted by name.
#include <stdio.h>
#include <stdlib.h>

#include "fake.h"

enum { SUCCESS = 0, VERSION = 130100 };

typedef struct {
  cudaStream_t stream;
  int math_mode, pointer_mode;
} Handle;

API int cublasCreate_v2(Handle** handle) {
  // The library allocates its workspace.
  if (fake_check_unsafe("cublasCreate")) return 1;
  *handle = calloc(1, sizeof **handle);
  return SUCCESS;
}

API int cublasDestroy_v2(Handle* handle) {
  free(handle);
  return SUCCESS;
}

API int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return SUCCESS;
}

API int cublasGetStream_v2(const Handle* handle, cudaStream_t* stream) {
  *stream = handle->stream;
  return SUCCESS;
}

API int cublasSetWorkspace_v2(Handle* handle, void* workspace, size_t n_bytes) {
  (void)handle, (void)workspace, (void)n_bytes;
  return SUCCESS;
}

API int cublasSetMathMode(Handle* handle, int mode) {
  handle->math_mode = mode;
  return SUCCESS;
}

API int cublasGetMathMode(const Handle* handle, int* mode) {
  *mode = handle->math_mode;
  return SUCCESS;
}

API int cublasSetPointerMode_v2(Handle* handle, int mode) {
  handle->pointer_mode = mode;
  return SUCCESS;
}

API int cublasGetPointerMode_v2(const Handle* handle, int* mode) {
  *mode = handle->pointer_mode;
  return SUCCESS;
}

API int cublasGetVersion_v2(const Handle* handle, int* version) {
  (void)handle;
  *version = VERSION;
  return SUCCESS;
}

API int cublasGetProperty(int property, int* value) {
  *value = property == 0 ? VERSION / 10000 : property == 1 ? VERSION / 100 % 100 : VERSION % 100;
  return SUCCESS;
}

API const char* cublasGetStatusName(int status) {
  return status == SUCCESS ? "CUBLAS_STATUS_SUCCESS" : "CUBLAS_STATUS_NOT_INITIALIZED";
}

API const char* cublasGetStatusString(int status) { return cublasGetStatusName(status); }

// The generated functions call this, too.
int fake_cublas_count(const Handle* handle, int64_t n_operations, const char* detail) {
  return fake_count(handle->stream, "product", n_operations, detail) ? 13 : SUCCESS;
}

static int count_gemm(const Handle* handle, const char* function, int m, int n, int k,
                      int n_batches) {
  char detail[120];
  snprintf(detail, sizeof detail, "%s m %d n %d k %d batch %d", function, m, n, k, n_batches);
  return fake_cublas_count(handle, 2ll * m * n * k * n_batches, detail);
}

#define UNUSED_MATRICES \
  (void)transpose_a, (void)transpose_b, (void)alpha, (void)a, (void)b, (void)beta, (void)c

#define GEMM(name, scalar)                                                                    \
  API int name(const Handle* handle, int transpose_a, int transpose_b, int m, int n, int k,   \
               const scalar* alpha, const void* a, int stride_a, const void* b, int stride_b, \
               const scalar* beta, void* c, int stride_c) {                                   \
    UNUSED_MATRICES, (void)stride_a, (void)stride_b, (void)stride_c;                          \
    return count_gemm(handle, #name, m, n, k, 1);                                             \
  }

GEMM(cublasSgemm_v2, float)
GEMM(cublasDgemm_v2, double)

API int cublasSgemmStridedBatched(const Handle* handle, int transpose_a, int transpose_b, int m,
                                  int n, int k, const float* alpha, const void* a, int lda,
                                  long long stride_a, const void* b, int ldb, long long stride_b,
                                  const float* beta, void* c, int ldc, long long stride_c,
                                  int n_batches) {
  UNUSED_MATRICES, (void)lda, (void)ldb, (void)ldc, (void)stride_a, (void)stride_b, (void)stride_c;
  return count_gemm(handle, "cublasSgemmStridedBatched", m, n, k, n_batches);
}

API int cublasGemmEx(const Handle* handle, int transpose_a, int transpose_b, int m, int n, int k,
                     const void* alpha, const void* a, int type_a, int lda, const void* b,
                     int type_b, int ldb, const void* beta, void* c, int type_c, int ldc,
                     int compute_type, int algorithm) {
  UNUSED_MATRICES, (void)type_a, (void)lda, (void)type_b, (void)ldb, (void)type_c, (void)ldc;
  (void)compute_type, (void)algorithm;
  return count_gemm(handle, "cublasGemmEx", m, n, k, 1);
}

API int cublasGemmStridedBatchedEx(const Handle* handle, int transpose_a, int transpose_b, int m,
                                   int n, int k, const void* alpha, const void* a, int type_a,
                                   int lda, long long stride_a, const void* b, int type_b, int ldb,
                                   long long stride_b, const void* beta, void* c, int type_c,
                                   int ldc, long long stride_c, int n_batches, int compute_type,
                                   int algorithm) {
  UNUSED_MATRICES, (void)type_a, (void)lda, (void)type_b, (void)ldb, (void)type_c, (void)ldc;
  (void)stride_a, (void)stride_b, (void)stride_c, (void)compute_type, (void)algorithm;
  return count_gemm(handle, "cublasGemmStridedBatchedEx", m, n, k, n_batches);
}
