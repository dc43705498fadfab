// What libtorch throws, as an answer that another language understands.

#pragma once

#include <cstdio>
#include <exception>

// Returns 0, or 1 with a message in `error` where `work` throws.
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
