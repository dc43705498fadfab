// Gradients of table rows: unique rows in a buffer of fixed capacity, and Adagrad on them.
//
// A lookup of n rows has n ids and n gradients. `sort_rows` orders the ids, `sum_rows` sums the
// gradients of equal ids, and an optimizer kernel updates each row once. All sizes are fixed, so
// that a CUDA graph can contain the step, and all sums have a fixed order.

// Bits of a sort key that hold the position of the id.
constexpr int POSITION_BITS = 14;
constexpr unsigned long long UNUSED = ~0ull;

// Sorts `ids: [n]`, n <= 16384, by value and then by position: writes the sorted ids and their
// positions in `ids` to `sorted_ids: [n]` and `order: [n]`. Negative ids are unused: they come
// last, as -1. Ids are below 2^50.
//
// A bitonic sort (Batcher 1968) of the smallest power of two `capacity >= n` keys of 8 bytes in
// dynamic shared memory, in one block.
extern "C" __global__ void __launch_bounds__(1024)
    sort_rows(const long long* __restrict__ ids, int n, int capacity,
              long long* __restrict__ sorted_ids, int* __restrict__ order) {
  extern __shared__ unsigned long long keys[];
  if (blockIdx.x != 0) return;
  int thread = threadIdx.x, n_threads = blockDim.x;
  for (int i = thread; i < capacity; i += n_threads) {
    bool is_used = i < n && ids[i] >= 0;
    keys[i] = is_used ? static_cast<unsigned long long>(ids[i]) << POSITION_BITS | i : UNUSED;
  }
  __syncthreads();
  for (int width = 2; width <= capacity; width *= 2) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
      for (int pair = thread; pair < capacity / 2; pair += n_threads) {
        int low = pair & (distance - 1), a = 2 * (pair - low) + low, b = a + distance;
        bool ascending = (a & width) == 0;
        unsigned long long key_a = keys[a], key_b = keys[b];
        if ((key_a > key_b) == ascending) {
          keys[a] = key_b;
          keys[b] = key_a;
        }
      }
      __syncthreads();
    }
  }
  for (int i = thread; i < n; i += n_threads) {
    bool is_used = keys[i] != UNUSED;
    sorted_ids[i] = is_used ? static_cast<long long>(keys[i] >> POSITION_BITS) : -1;
    order[i] = is_used ? static_cast<int>(keys[i] & ((1 << POSITION_BITS) - 1)) : -1;
  }
}

// Sums `gradients: [n, n_columns]` over equal ids in the order of their positions. Of each id the
// first place in `sorted_ids: [n]` gets the id in `row_ids: [n]` and the sum in
// `sums: [n, n_columns]`; all other places get -1 and zeros. Along x are columns, along y places.
extern "C" __global__ void __launch_bounds__(256)
    sum_rows(const long long* __restrict__ sorted_ids, const int* __restrict__ order, int n,
             const float* __restrict__ gradients, int n_columns, long long* __restrict__ row_ids,
             float* __restrict__ sums) {
  int first_column = blockIdx.x * blockDim.x + threadIdx.x;
  int place_step = gridDim.y * blockDim.y;
  for (int place = blockIdx.y * blockDim.y + threadIdx.y; place < n; place += place_step) {
    long long id = sorted_ids[place];
    bool is_first = id >= 0 && (place == 0 || sorted_ids[place - 1] != id);
    int end = place;
    if (is_first) {
      do end++;
      while (end < n && sorted_ids[end] == id);
    }
    if (first_column == 0) row_ids[place] = is_first ? id : -1;
    for (int column = first_column; column < n_columns; column += gridDim.x * blockDim.x) {
      float sum = 0.0f;
      for (int i = place; i < end; i++) {
        sum += gradients[static_cast<long long>(order[i]) * n_columns + column];
      }
      sums[static_cast<long long>(place) * n_columns + column] = sum;
    }
  }
}

// Adds the sums of `sum_rows` to the rows of a table `[n_rows, n_columns]`, each of which is listed
// once.
extern "C" __global__ void __launch_bounds__(256)
    add_rows(float* __restrict__ table, long long n_rows, const long long* __restrict__ row_ids,
             const float* __restrict__ sums, int n, int n_columns) {
  int place_step = gridDim.y * blockDim.y;
  for (int place = blockIdx.y * blockDim.y + threadIdx.y; place < n; place += place_step) {
    long long id = row_ids[place];
    if (id < 0) continue;
    if (id >= n_rows) __trap();
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    for (; column < n_columns; column += gridDim.x * blockDim.x) {
      table[id * n_columns + column] += sums[static_cast<long long>(place) * n_columns + column];
    }
  }
}

// One step of Adagrad on the rows `row_ids: [n]` of a table `[n_rows, n_columns]` with
// `gradients: [n, n_columns]` times `scale: [1]`, with the operations of `Adagrad::step` in
// optim/mod.rs in the same order. Negative ids are unused; one that is not in the table stops the
// kernel. The learning rate is `rates[1]`. `last_step` is null without momentum. If `scale` is NaN,
// nothing changes. Along x are columns, along y rows.
extern "C" __global__ void __launch_bounds__(256)
    adagrad_rows(float* __restrict__ values, float* __restrict__ squares,
                 float* __restrict__ last_step, long long n_rows,
                 const long long* __restrict__ row_ids, const float* __restrict__ gradients, int n,
                 int n_columns, const float* __restrict__ scale, const double* __restrict__ rates,
                 float momentum) {
  float factor = *scale, rate = static_cast<float>(rates[1]);
  if (isnan(factor)) return;
  int place_step = gridDim.y * blockDim.y;
  for (int place = blockIdx.y * blockDim.y + threadIdx.y; place < n; place += place_step) {
    long long id = row_ids[place];
    if (id < 0) continue;
    if (id >= n_rows) __trap();
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    for (; column < n_columns; column += gridDim.x * blockDim.x) {
      long long i = id * n_columns + column;
      float g = gradients[static_cast<long long>(place) * n_columns + column] * factor;
      float sum = squares[i] + g * g;
      float change = g * -rate / (sqrtf(sum) + 1e-10f);
      if (last_step != nullptr) {
        change += last_step[i] * momentum;
        last_step[i] = change;
      }
      squares[i] = sum;
      values[i] += change;
    }
  }
}
