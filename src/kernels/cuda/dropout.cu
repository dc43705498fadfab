// Dropout with masks that are computed where they are needed. The numbers of rows and columns are
// those of counter.rs, so that a CPU and a GPU compute the same mask.

// The integer hash lowbias32 (C. Wellons 2018, "Prospecting for Hash Functions").
static __device__ unsigned mix(unsigned x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
  return x;
}

static __device__ unsigned row_number(int key, unsigned site) {
  return mix(static_cast<unsigned>(key) + site * 0x9E3779B9u) | 1u;
}

static __device__ unsigned column_number(unsigned column) {
  return mix(column + 0x6A09E667u) | 1u;
}

// The number of element `column` of a row of the shape `[.., inner1, inner2]`, which is the leading
// part of a row of the shape `[.., drawn1, drawn2]`.
static __device__ unsigned number_of(long long column, int inner1, int inner2, int drawn1,
                                     int drawn2) {
  long long index2 = column % inner2, rest = column / inner2;
  long long index1 = rest % inner1, outer = rest / inner1;
  return column_number(static_cast<unsigned>((outer * drawn1 + index1) * drawn2 + index2));
}

static __device__ float dropped(float x, unsigned row, unsigned column, int threshold,
                                float kept) {
  return x * (static_cast<int>(row * column) < threshold ? 0.0f : kept);
}

// Multiplies `x: [n_rows, n_columns]` by the mask, which is 0 where the product of a row number and
// a column number is below `threshold`, else `kept`, and writes the result to `y`, which may be
// `x`. The key of row r is `row_keys[r]`.
//
// A thread computes the numbers of its columns once and then walks over rows: along x are columns,
// along y are rows.
extern "C" __global__ void __launch_bounds__(256)
    dropout(const float* x, float* y, long long n_rows, long long n_columns,
            const int* __restrict__ row_keys, unsigned site, int threshold, float kept, int inner1,
            int inner2, int drawn1, int drawn2) {
  long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  long long n_threads = static_cast<long long>(gridDim.x) * blockDim.x;
  long long first_row = static_cast<long long>(blockIdx.y) * blockDim.y + threadIdx.y;
  long long row_step = static_cast<long long>(gridDim.y) * blockDim.y;
  unsigned long long addresses =
      reinterpret_cast<unsigned long long>(x) | reinterpret_cast<unsigned long long>(y);
  auto number = [&](long long column) {
    return number_of(column, inner1, inner2, drawn1, drawn2);
  };
  if (n_columns % 4 == 0 && addresses % sizeof(float4) == 0) {
    for (long long four = thread; four < n_columns / 4; four += n_threads) {
      unsigned numbers[4];
      for (int i = 0; i < 4; i++) numbers[i] = number(4 * four + i);
      for (long long row = first_row; row < n_rows; row += row_step) {
        unsigned of_row = row_number(row_keys[row], site);
        long long i = row * (n_columns / 4) + four;
        float4 values = reinterpret_cast<const float4*>(x)[i];
        values.x = dropped(values.x, of_row, numbers[0], threshold, kept);
        values.y = dropped(values.y, of_row, numbers[1], threshold, kept);
        values.z = dropped(values.z, of_row, numbers[2], threshold, kept);
        values.w = dropped(values.w, of_row, numbers[3], threshold, kept);
        reinterpret_cast<float4*>(y)[i] = values;
      }
    }
    return;
  }
  for (long long column = thread; column < n_columns; column += n_threads) {
    unsigned of_column = number(column);
    for (long long row = first_row; row < n_rows; row += row_step) {
      unsigned of_row = row_number(row_keys[row], site);
      long long i = row * n_columns + column;
      y[i] = dropped(x[i], of_row, of_column, threshold, kept);
    }
  }
}
