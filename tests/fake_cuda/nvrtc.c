// NVRTC of the fake CUDA runtime: a compiler that compiles nothing.
//
// A compilation succeeds, and the cubin and PTX are a tag and the source text, in which cuda.c
// finds the names of kernels. Names of templates are kept as they are written. The kernels
// themselves are compiled for the CPU by emulate.py.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

enum { SUCCESS = 0, NO_SUCH_NAME = 10 };

// The first line of a cubin; cuda.c knows it.
#define TAG "fake cubin\n"

typedef struct {
  char* name;
  char* cubin;
} Program;

API const char* nvrtcGetErrorString(int error) {
  return error == SUCCESS ? "NVRTC_SUCCESS" : "NVRTC_ERROR_INVALID_INPUT";
}

API int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return SUCCESS;
}

API int nvrtcGetNumSupportedArchs(int* n) {
  *n = 3;
  return SUCCESS;
}

API int nvrtcGetSupportedArchs(int* architectures) {
  memcpy(architectures, (int[]){80, 90, 100}, 3 * sizeof(int));
  return SUCCESS;
}

API int nvrtcCreateProgram(Program** program, const char* source, const char* name, int n_headers,
                           const char* const* headers, const char* const* include_names) {
  (void)include_names;
  size_t n_bytes = sizeof TAG + strlen(source);
  for (int i = 0; i < n_headers; i++) n_bytes += strlen(headers[i]);
  Program* created = calloc(1, sizeof *created);
  created->name = strdup(name ? name : "default_program");
  created->cubin = malloc(n_bytes);
  strcpy(created->cubin, TAG);
  strcat(created->cubin, source);
  for (int i = 0; i < n_headers; i++) strcat(created->cubin, headers[i]);
  *program = created;
  return SUCCESS;
}

API int nvrtcDestroyProgram(Program** program) {
  free((*program)->name);
  free((*program)->cubin);
  free(*program);
  *program = NULL;
  return SUCCESS;
}

API int nvrtcCompileProgram(Program* program, int n_options, const char* const* options) {
  (void)n_options, (void)options;
  fake_log("compile", (int64_t)(strlen(program->cubin) - strlen(TAG)), EAGER, "%s", program->name);
  return SUCCESS;
}

API int nvrtcGetCUBINSize(const Program* program, size_t* n_bytes) {
  *n_bytes = strlen(program->cubin) + 1;
  return SUCCESS;
}

API int nvrtcGetCUBIN(const Program* program, char* cubin) {
  strcpy(cubin, program->cubin);
  return SUCCESS;
}

API int nvrtcGetPTXSize(const Program* program, size_t* n_bytes) {
  return nvrtcGetCUBINSize(program, n_bytes);
}

API int nvrtcGetPTX(const Program* program, char* ptx) { return nvrtcGetCUBIN(program, ptx); }

API int nvrtcGetProgramLogSize(const Program* program, size_t* n_bytes) {
  (void)program;
  *n_bytes = 1;
  return SUCCESS;
}

API int nvrtcGetProgramLog(const Program* program, char* log) {
  (void)program;
  *log = '\0';
  return SUCCESS;
}

API int nvrtcAddNameExpression(Program* program, const char* expression) {
  (void)program, (void)expression;
  return SUCCESS;
}

API int nvrtcGetLoweredName(const Program* program, const char* expression, const char** name) {
  *name = strstr(program->cubin, expression);
  if (!*name) return NO_SUCH_NAME;
  *name = expression;
  return SUCCESS;
}
