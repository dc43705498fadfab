// Converts C++ exceptions to return codes, because they must not unwind into Rust.

#pragma once

#include <cstdio>
#include <exception>

// Returns 0, or 1 with a message in `error` if `work` throws.
template <typename Work>
int guarded(char* error, size_t capacity, Work work) {
  try {
    work();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, capacity, "%s", e.what());
    return 1;
  }
}
