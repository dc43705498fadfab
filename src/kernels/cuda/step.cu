// The end of a training step: norm of the gradients, clipping, and AdamW on flat buffers.
//
// Compiled without fused multiply-adds (`--fmad=false`) and with IEEE square roots and divisions,
// so that every operation rounds as on the CPU. No sum depends on the order in which threads run.

constexpr double BETA_1 = 0.9;
constexpr double BETA_2 = 0.999;
constexpr double EPSILON = 1e-8;
constexpr int MAX_THREADS = 1024;
constexpr int KEPT_STEPS = 32;

static __device__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<unsigned long long>(pointer) % sizeof(float4) == 0;
}

// Index of the thread in the grid, and number of threads of the grid.
static __device__ long long first_index() {
  return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}

static __device__ long long grid_size() {
  return static_cast<long long>(gridDim.x) * blockDim.x;
}

// Sums `value` over the threads of the block in a fixed order. Every thread gets the sum. A kernel
// may call it once, because no barrier separates the last read from the next write.
static __device__ double block_sum(double value) {
  __shared__ double sums[MAX_THREADS];
  int thread = threadIdx.x;
  sums[thread] = value;
  __syncthreads();
  for (int n = blockDim.x; n > 1;) {
    int half = (n + 1) / 2;
    if (thread < n - half) sums[thread] += sums[thread + half];
    __syncthreads();
    n = half;
  }
  return sums[0];
}

// Writes the sum of squares of the elements of `x: [n]` that belong to block b to `partial[b]`.
// `partial: [gridDim.x]` depends on the sizes of grid and block, and not on the alignment of `x`.
extern "C" __global__ void __launch_bounds__(1024)
    sum_of_squares(const float* __restrict__ x, long long n, double* __restrict__ partial) {
  bool aligned = is_aligned(x);
  double sum = 0.0;
  auto add = [&](float value) { sum += static_cast<double>(value) * value; };
  for (long long i = first_index(); i < n / 4; i += grid_size()) {
    float4 four = aligned ? reinterpret_cast<const float4*>(x)[i]
                          : make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    add(four.x);
    add(four.y);
    add(four.z);
    add(four.w);
  }
  for (long long i = n / 4 * 4 + first_index(); i < n; i += grid_size()) add(x[i]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// `base` to the power of `n >= 0`, with the multiplications of Rust's `f64::powi`.
static __device__ double power(double base, long long n) {
  double result = 1.0;
  for (;;) {
    if (n & 1) result *= base;
    n /= 2;
    if (n == 0) return result;
    base *= base;
  }
}

// Computes the scalars of the optimizer step from sums over all ranks, in one block.
//
//   partial:        [n_partial], sums of squares of the gradients
//   extra_squares:  [1] or null, sum of squares of further gradients
//   scalars:        [4], summed loss, number of targets, requests to stop, requests to save; set
//                   to zero for the next step
//   own_loss:       [1], summed loss of this rank; set to zero for the next step
//   rates:          [2], learning rates of AdamW and of the tables in this step
//   n_steps:        [1], number of steps of AdamW
//   scale:          [1], factor that turns summed gradients into the clipped mean
//   adamw_rates:    [2], learning rate with bias corrections, factor of the weight decay
//   outcome:        [6], the four scalars, norm of the mean gradient before clipping, own loss
//   history:        [2 + 4 * KEPT_STEPS], numbers of steps and of steps without effect since the
//                   start, and [step, mean loss, norm, own loss] of the last of the latter
//
// If the loss or the norm is not finite, or if there is no target, the step must not change the
// parameters: `scale` is NaN, and `n_steps` and `adamw_rates` keep their values.
extern "C" __global__ void __launch_bounds__(1024)
    finish_step(const double* __restrict__ partial, int n_partial,
                const float* __restrict__ extra_squares, float* __restrict__ scalars,
                float* __restrict__ own_loss, const double* __restrict__ rates,
                double max_norm, double weight_decay, double* __restrict__ n_steps,
                float* __restrict__ scale, float* __restrict__ adamw_rates,
                double* __restrict__ outcome, double* __restrict__ history) {
  double squares = 0.0;
  for (int i = threadIdx.x; i < n_partial; i += blockDim.x) squares += partial[i];
  squares = block_sum(squares);
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  if (extra_squares != nullptr) squares += *extra_squares;
  double loss = scalars[0], n_targets = scalars[1];
  double norm = sqrt(squares) / n_targets;
  history[0] += 1.0;
  if (isfinite(norm) && isfinite(loss)) {
    double t = *n_steps + 1.0, rate = rates[0];
    double clip = fmin(1.0, max_norm / (norm + 1e-6));
    *n_steps = t;
    *scale = static_cast<float>(clip / n_targets);
    double second_moment_correction = sqrt(1.0 - power(BETA_2, static_cast<long long>(t)));
    double corrected_rate =
        rate * second_moment_correction / (1.0 - power(BETA_1, static_cast<long long>(t)));
    adamw_rates[0] = static_cast<float>(corrected_rate);
    adamw_rates[1] = static_cast<float>(1.0 - rate * weight_decay);
  } else {
    *scale = nanf("");
    long long n_skipped = static_cast<long long>(history[1]);
    double* kept = history + 2 + n_skipped % KEPT_STEPS * 4;
    kept[0] = history[0];
    kept[1] = loss / n_targets;
    kept[2] = norm;
    kept[3] = *own_loss;
    history[1] += 1.0;
  }
  for (int i = 0; i < 4; i++) {
    outcome[i] = scalars[i];
    scalars[i] = 0.0f;
  }
  outcome[4] = norm;
  outcome[5] = *own_loss;
  *own_loss = 0.0f;
}

// One element of AdamW, with the operations of `Part::update` in adamw.rs in the same order.
static __device__ void adamw_element(float& value, float& gradient, float& m, float& v,
                                     float scale, float rate, float decay_factor) {
  constexpr float one_minus_beta_1 = static_cast<float>(1.0 - BETA_1);
  constexpr float beta_2 = static_cast<float>(BETA_2);
  constexpr float one_minus_beta_2 = static_cast<float>(1.0 - BETA_2);
  float g = gradient * scale;
  m += one_minus_beta_1 * (g - m);
  v = beta_2 * v + one_minus_beta_2 * g * g;
  value = (value - rate * m / (sqrtf(v) + static_cast<float>(EPSILON))) * decay_factor;
  gradient = 0.0f;
}

// One step of AdamW on flat buffers `[n]` with the scalars of `finish_step`; sets the gradients to
// zero. If `scale` is NaN, it changes nothing else.
extern "C" __global__ void __launch_bounds__(256)
    adamw(float* __restrict__ values, float* __restrict__ gradients, float* __restrict__ m,
          float* __restrict__ v, long long n, const float* __restrict__ scale,
          const float* __restrict__ adamw_rates) {
  float factor = *scale, rate = adamw_rates[0], decay_factor = adamw_rates[1];
  bool aligned =
      is_aligned(values) && is_aligned(gradients) && is_aligned(m) && is_aligned(v);
  long long n_fours = aligned ? n / 4 : 0;
  for (long long i = first_index(); i < n_fours; i += grid_size()) {
    float4* four_gradients = reinterpret_cast<float4*>(gradients) + i;
    if (isnan(factor)) {
      *four_gradients = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      continue;
    }
    float4 value = reinterpret_cast<float4*>(values)[i], gradient = *four_gradients;
    float4 first = reinterpret_cast<float4*>(m)[i], second = reinterpret_cast<float4*>(v)[i];
    adamw_element(value.x, gradient.x, first.x, second.x, factor, rate, decay_factor);
    adamw_element(value.y, gradient.y, first.y, second.y, factor, rate, decay_factor);
    adamw_element(value.z, gradient.z, first.z, second.z, factor, rate, decay_factor);
    adamw_element(value.w, gradient.w, first.w, second.w, factor, rate, decay_factor);
    reinterpret_cast<float4*>(values)[i] = value;
    *four_gradients = gradient;
    reinterpret_cast<float4*>(m)[i] = first;
    reinterpret_cast<float4*>(v)[i] = second;
  }
  for (long long i = 4 * n_fours + first_index(); i < n; i += grid_size()) {
    if (isnan(factor)) {
      gradients[i] = 0.0f;
    } else {
      adamw_element(values[i], gradients[i], m[i], v[i], factor, rate, decay_factor);
    }
  }
}

// One step of AdamW on the rows `row_ids: [n]` of a table `[n_rows, n_columns]` with
// `gradients: [n, n_columns]`, as written by `sum_rows`. Negative ids are unused; one that is not
// in the table stops the kernel. Rows that are not listed keep their values and moments. If `scale`
// is NaN, nothing changes. Along x are columns, along y rows.
extern "C" __global__ void __launch_bounds__(256)
    lazy_adamw_rows(float* __restrict__ values, float* __restrict__ m, float* __restrict__ v,
                    long long n_rows, const long long* __restrict__ row_ids,
                    const float* __restrict__ gradients, int n, int n_columns,
                    const float* __restrict__ scale, const float* __restrict__ adamw_rates) {
  float factor = *scale, rate = adamw_rates[0], decay_factor = adamw_rates[1];
  if (isnan(factor)) return;
  int place_step = gridDim.y * blockDim.y;
  for (int place = blockIdx.y * blockDim.y + threadIdx.y; place < n; place += place_step) {
    long long id = row_ids[place];
    if (id < 0) continue;
    if (id >= n_rows) __trap();
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    for (; column < n_columns; column += gridDim.x * blockDim.x) {
      long long i = id * n_columns + column;
      float gradient = gradients[static_cast<long long>(place) * n_columns + column];
      adamw_element(values[i], gradient, m[i], v[i], factor, rate, decay_factor);
    }
  }
}
