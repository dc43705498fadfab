// Tests of the CUDA kernels on the CPU, against references in f64. `emulate.py --test` builds and
// runs it. Prints one line for each check; exits with 1 if a check fails.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

extern "C" int fake_kernel_params(const char* name, size_t* sizes, int capacity);
extern "C" int fake_kernel_run(const char* name, unsigned gx, unsigned gy, unsigned gz,
                               unsigned bx, unsigned by, unsigned bz, size_t shared_bytes,
                               void** params);

namespace {

const int64_t SIZES[] = {0, 1, 3, 255, 257, 100003};

int n_failed = 0;

void check(const std::string& what, bool passed, double error = 0.0) {
  printf("%s  %s", passed ? "ok    " : "FAILED", what.c_str());
  printf(error == 0.0 ? "\n" : ", largest error %.1e\n", error);
  n_failed += !passed;
}

void check_error(const std::string& what, double error, double bound) {
  // A comparison with NaN is false.
  check(what, error <= bound, error);
}

struct Launch {
  unsigned grid_x = 1, grid_y = 1, block_x = 1, block_y = 1;
  size_t shared_bytes = 0;
};

// Runs a kernel. The types of the arguments must be those of the parameters.
template <typename... Args>
void run(const char* name, Launch launch, Args... args) {
  size_t sizes[32];
  int n = fake_kernel_params(name, sizes, 32);
  const size_t given[] = {sizeof(Args)...};
  if (n != static_cast<int>(sizeof...(Args)) || !std::equal(given, given + n, sizes)) {
    check(std::string("the arguments of ") + name + " match its parameters", false);
    return;
  }
  void* params[] = {&args...};
  int code = fake_kernel_run(name, launch.grid_x, launch.grid_y, 1, launch.block_x, launch.block_y,
                             1, launch.shared_bytes, params);
  if (code != 0) check(std::string(name) + " was launched", false);
}

std::mt19937 generator(1);

// Numbers that start `offset` floats behind a boundary of 16 bytes.
struct Floats {
  std::vector<float> memory;
  size_t offset;

  Floats(int64_t n, size_t offset, double spread) : memory(n + offset, NAN), offset(offset) {
    std::normal_distribution<double> normal(0.0, spread);
    for (int64_t i = 0; i < n; i++) memory[offset + i] = static_cast<float>(normal(generator));
  }

  float* data() { return memory.data() + offset; }
  size_t size() const { return memory.size() - offset; }
  float& operator[](size_t i) { return memory[offset + i]; }
};

bool same_bits(Floats& a, Floats& b) {
  size_t n = a.size();
  return n == b.size() && (n == 0 || memcmp(a.data(), b.data(), n * sizeof(float)) == 0);
}

void test_sum_of_squares() {
  double worst = 0.0;
  bool same = true;
  for (int64_t n : SIZES) {
    Floats x(n, 0, 1.0), unaligned(n, 1, 1.0);
    std::copy_n(x.data(), n, unaligned.data());
    long double expected = 0.0;
    for (int64_t i = 0; i < n; i++) expected += static_cast<long double>(x[i]) * x[i];
    std::vector<std::vector<double>> results;
    for (float* data : {x.data(), x.data(), unaligned.data()}) {
      results.emplace_back(7, NAN);
      run("sum_of_squares", {7, 1, 96, 1}, (const float*)data, (long long)n,
          results.back().data());
    }
    same = same && results[0] == results[1] && results[0] == results[2];
    long double sum = 0.0;
    for (double part : results[0]) sum += part;
    worst = std::max(worst, static_cast<double>(fabsl(sum - expected) / (expected + 1e-30L)));
  }
  check_error("sum_of_squares adds the squares of all elements", worst, 1e-14);
  check("sum_of_squares depends neither on the run nor on the alignment", same);
}

struct FinishStep {
  std::vector<double> partial{1.0, 4.0, 11.0};
  float extra_squares = 9.0f;
  bool has_extra = true;
  std::vector<float> scalars{12.0f, 2.0f, 1.0f, 0.0f};
  float own_loss = 6.0f;
  double rates[2] = {0.01, 0.05};
  double max_norm = 1.0, weight_decay = 0.1, n_steps = 4.0;
  float scale = -1.0f;
  float adamw_rates[2] = {-1.0f, -1.0f};
  double outcome[6];
  std::vector<double> history = std::vector<double>(2 + 4 * 32);

  void run_with(unsigned n_threads) {
    run("finish_step", {1, 1, n_threads, 1}, (const double*)partial.data(), (int)partial.size(),
        (const float*)(has_extra ? &extra_squares : nullptr), scalars.data(),
        &own_loss, (const double*)rates, max_norm, weight_decay, &n_steps, &scale,
        adamw_rates, outcome, history.data());
  }
};

void test_finish_step() {
  FinishStep step;
  step.run_with(256);
  double rate = 0.01, norm = 2.5, clip = 1.0 / (norm + 1e-6);
  double corrected = rate * sqrt(1.0 - pow(0.999, 5.0)) / (1.0 - pow(0.9, 5.0));
  check_error("finish_step clips to the norm", fabs(step.scale - clip / 2.0), 1e-7);
  check_error("finish_step corrects the rate for both moments",
              fabs(step.adamw_rates[0] / corrected - 1.0), 1e-7);
  check_error("finish_step decays weights", fabs(step.adamw_rates[1] - (1.0 - rate * 0.1)), 1e-7);
  const double expected[] = {12.0, 2.0, 1.0, 0.0, norm, 6.0};
  check("finish_step reports the sums over all ranks, the norm and the own loss",
        std::equal(expected, expected + 6, step.outcome) && step.n_steps == 5.0);
  check("finish_step sets the sums to zero",
        step.scalars == std::vector<float>(4, 0.0f) && step.own_loss == 0.0f);

  FinishStep short_norm;
  short_norm.partial.assign(1500, 1e-4);
  short_norm.has_extra = false;
  short_norm.run_with(96);
  check("finish_step does not clip a short gradient", short_norm.scale == 0.5f);
  check_error("finish_step adds all parts", fabs(short_norm.outcome[4] - sqrt(0.15) / 2.0), 1e-12);

  check("finish_step counts a step", step.history[0] == 1.0 && step.history[1] == 0.0);

  bool all_skipped = true;
  for (int problem = 0; problem < 3; problem++) {
    FinishStep bad;
    if (problem == 0) bad.partial[1] = INFINITY;
    if (problem == 1) bad.scalars[0] = NAN;
    if (problem == 2) bad.partial.assign(1, 0.0), bad.scalars[1] = 0.0f, bad.has_extra = false;
    bad.run_with(32);
    all_skipped = all_skipped && isnan(bad.scale) && bad.n_steps == 4.0 &&
                  bad.adamw_rates[0] == -1.0f && bad.scalars == std::vector<float>(4, 0.0f);
  }
  check("finish_step refuses an infinite norm, a NaN loss and a step without targets",
        all_skipped);

  FinishStep repeated;
  for (int i = 0; i < 40; i++) {
    bool is_bad = i % 8 != 0;
    repeated.own_loss = 5.0f;
    repeated.scalars = {is_bad ? NAN : 12.0f, 2.0f, 0.0f, 0.0f};
    repeated.run_with(64);
  }
  // The 35 steps without effect fill all places, and the first three places again.
  bool kept = repeated.history[0] == 40.0 && repeated.history[1] == 35.0;
  for (int i = 0; i < 35; i++) {
    const double* place = &repeated.history[2 + i % 32 * 4];
    bool is_overwritten = i < 3;
    double n_steps = i / 7 * 8 + i % 7 + 2;
    kept = kept && (is_overwritten || (place[0] == n_steps && isnan(place[1]) &&
                                       place[2] == 2.5 && place[3] == 5.0));
  }
  check("finish_step keeps the last steps without effect", kept && repeated.n_steps == 9.0);
}

struct AdamW {
  Floats values, gradients, m, v;

  AdamW(int64_t n, size_t offset)
      : values(n, offset, 1.0), gradients(n, offset, 1e-2), m(n, offset, 1e-3),
        v(n, offset, 1e-3) {
    for (int64_t i = 0; i < n; i++) v[i] = v[i] * v[i];
  }

  void run_with(float scale, float rate, float decay_factor) {
    float adamw_rates[] = {rate, decay_factor};
    run("adamw", {5, 1, 64, 1}, values.data(), gradients.data(), m.data(), v.data(),
        (long long)values.size(), (const float*)&scale, (const float*)adamw_rates);
  }
};

void test_adamw() {
  const float scale = 0.125f, rate = 3e-3f, decay_factor = 0.999f;
  double worst = 0.0;
  bool same = true, zero = true, unchanged = true;
  for (int64_t n : SIZES) {
    for (size_t offset : {0, 1}) {
      AdamW given(n, offset), step = given, skipped = given;
      step.run_with(scale, rate, decay_factor);
      skipped.run_with(NAN, rate, decay_factor);
      unchanged = unchanged && same_bits(skipped.values, given.values) &&
                  same_bits(skipped.m, given.m) && same_bits(skipped.v, given.v);
      for (int64_t i = 0; i < n; i++) {
        zero = zero && step.gradients[i] == 0.0f && skipped.gradients[i] == 0.0f;
        double g = static_cast<double>(given.gradients[i]) * scale;
        double m = 0.9 * given.m[i] + 0.1 * g, v = 0.999 * given.v[i] + 0.001 * g * g;
        double value = (given.values[i] - rate * m / (sqrt(v) + 1e-8)) * decay_factor;
        worst = std::max({worst, fabs(step.m[i] - m) / 1e-2, fabs(step.v[i] - v) / 1e-4,
                          fabs(step.values[i] - value)});
        // The operations of adamw.rs in f32.
        float g32 = given.gradients[i] * scale, m32 = given.m[i], v32 = given.v[i];
        m32 += static_cast<float>(1.0 - 0.9) * (g32 - m32);
        v32 = 0.999f * v32 + static_cast<float>(1.0 - 0.999) * g32 * g32;
        float value32 = (given.values[i] - rate * m32 / (sqrtf(v32) + 1e-8f)) * decay_factor;
        same = same && step.m[i] == m32 && step.v[i] == v32 && step.values[i] == value32;
      }
    }
  }
  check_error("adamw follows the formula", worst, 2e-6);
  check("adamw equals the CPU's operations bit for bit", same);
  check("adamw sets gradients to zero", zero);
  check("adamw with a NaN scale changes only the gradients", unchanged);
}

uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

uint32_t row_number(int32_t key, uint32_t site) { return mix(key + site * 0x9E3779B9u) | 1; }

uint32_t column_number(uint32_t column) { return mix(column + 0x6A09E667u) | 1; }

bool keeps(int32_t key, uint32_t site, uint32_t column, int32_t threshold) {
  return static_cast<int32_t>(row_number(key, site) * column_number(column)) >= threshold;
}

struct Shape {
  int outer, inner1, inner2, drawn1, drawn2;
};

void test_dropout() {
  check("numbers of rows and columns are those of counter.rs",
        row_number(-1, 5) == 2082786835u && column_number(3) == 247117289u);
  const int32_t threshold = static_cast<int32_t>((0.3 - 0.5) * 4294967296.0);
  const float kept = static_cast<float>(1.0 / 0.7);
  const Shape shapes[] = {{1, 1, 1, 1, 1},   {1, 1, 3, 1, 3},   {1, 1, 64, 1, 64},
                          {1, 1, 257, 1, 257}, {2, 5, 5, 9, 9}, {4, 6, 6, 7, 7},
                          {1, 2, 6, 2, 20}};
  bool same = true, in_place = true;
  int64_t n_kept = 0, n_all = 0;
  for (Shape shape : shapes) {
    for (int64_t n_rows : {0, 1, 3, 257}) {
      for (size_t offset : {0, 1}) {
        int64_t n_columns = static_cast<int64_t>(shape.outer) * shape.inner1 * shape.inner2;
        Floats x(n_rows * n_columns, offset, 1.0), y(n_rows * n_columns, offset, 1.0);
        std::vector<int32_t> keys(n_rows);
        for (int32_t& key : keys) key = static_cast<int32_t>(generator());
        auto drop = [&](float* from, float* to) {
          run("dropout", {2, 3, 32, 4}, (const float*)from, to, (long long)n_rows,
              (long long)n_columns, (const int*)keys.data(), 5u, (int)threshold, kept,
              shape.inner1, shape.inner2, shape.drawn1, shape.drawn2);
        };
        drop(x.data(), y.data());
        for (int64_t i = 0; i < n_rows * n_columns; i++) {
          int64_t column = i % n_columns, area = shape.inner1 * shape.inner2;
          int64_t outer = column / area, row = column % area / shape.inner2;
          int64_t drawn = (outer * shape.drawn1 + row) * shape.drawn2 + column % shape.inner2;
          bool keep = keeps(keys[i / n_columns], 5, static_cast<uint32_t>(drawn), threshold);
          same = same && y[i] == x[i] * (keep ? kept : 0.0f);
          n_kept += keep;
          n_all++;
        }
        drop(x.data(), x.data());
        in_place = in_place && same_bits(x, y);
      }
    }
  }
  check("dropout computes the mask of (key, site, column), also of parts of a drawn shape", same);
  check("dropout works in place", in_place);
  check_error("dropout keeps 70 %", fabs(static_cast<double>(n_kept) / n_all - 0.7), 0.01);
}

// Unique rows of a lookup.
struct Rows {
  int n, n_columns;
  std::vector<long long> ids, sorted_ids, row_ids;
  std::vector<int> order;
  Floats gradients, sums;

  Rows(int n, int n_columns, int n_ids)
      : n(n), n_columns(n_columns), ids(n), sorted_ids(n), row_ids(n), order(n),
        gradients(static_cast<int64_t>(n) * n_columns, 0, 1.0),
        sums(static_cast<int64_t>(n) * n_columns, 0, 1.0) {
    // Some ids are unused.
    for (long long& id : ids) id = static_cast<long long>(generator() % (n_ids + 1)) - 1;
    int capacity = 1;
    while (capacity < n) capacity *= 2;
    run("sort_rows", {1, 1, 256, 1, capacity * sizeof(long long)}, (const long long*)ids.data(),
        n, capacity, sorted_ids.data(), order.data());
    run("sum_rows", {2, 3, 8, 4}, (const long long*)sorted_ids.data(), (const int*)order.data(),
        n, (const float*)gradients.data(), n_columns, row_ids.data(), sums.data());
  }
};

void test_rows() {
  bool sorted = true, unique = true, same_sums = true, same_adamw = true, untouched = true;
  bool added_elsewhere = false;
  double worst_sum = 0.0, worst_step = 0.0, worst_add = 0.0;
  const int n_ids = 90;
  for (int n : {0, 1, 3, 255, 257, 6000, 16384}) {
    for (int n_columns : {1, 19}) {
      Rows rows(n, n_columns, n_ids);
      std::vector<int> expected;
      for (int i = 0; i < n; i++) expected.push_back(i);
      auto key = [&](int i) { return static_cast<uint64_t>(rows.ids[i]); };
      std::stable_sort(expected.begin(), expected.end(),
                       [&](int a, int b) { return key(a) < key(b); });
      for (int i = 0; i < n; i++) {
        long long id = rows.ids[expected[i]];
        sorted = sorted && rows.sorted_ids[i] == id && rows.order[i] == (id < 0 ? -1 : expected[i]);
      }
      std::vector<double> sums(n_ids * n_columns);
      std::vector<bool> is_listed(n_ids);
      for (int i = 0; i < n * n_columns; i++) {
        long long id = rows.ids[i / n_columns];
        if (id >= 0) sums[id * n_columns + i % n_columns] += rows.gradients[i];
        if (id >= 0) is_listed[id] = true;
      }
      int n_listed = 0;
      for (int place = 0; place < n; place++) {
        long long id = rows.row_ids[place];
        bool is_first = rows.sorted_ids[place] >= 0 &&
                        (place == 0 || rows.sorted_ids[place - 1] != rows.sorted_ids[place]);
        unique = unique && id == (is_first ? rows.sorted_ids[place] : -1);
        n_listed += id >= 0;
        for (int column = 0; column < n_columns; column++) {
          double expected_sum = id < 0 ? 0.0 : sums[id * n_columns + column];
          worst_sum = std::max(worst_sum,
                               fabs(rows.sums[place * n_columns + column] - expected_sum));
        }
      }
      unique = unique && n_listed == std::count(is_listed.begin(), is_listed.end(), true);

      Floats table_before(n_ids * n_columns, 0, 1.0), table_after = table_before;
      run("add_rows", {1, 5, 16, 8}, table_after.data(), (long long)n_ids,
          (const long long*)rows.row_ids.data(), (const float*)rows.sums.data(), n, n_columns);
      for (int i = 0; i < n_ids * n_columns; i++) {
        worst_add = std::max(worst_add, fabs(table_after[i] - (table_before[i] + sums[i])));
        added_elsewhere = added_elsewhere ||
                          (!is_listed[i / n_columns] && table_after[i] != table_before[i]);
      }

      const float scale = 0.25f, momentum = 0.3f, skip = NAN;
      const double rates[] = {7.0, 0.05};
      const float adamw_rates[] = {3e-3f, 0.999f};
      for (bool has_momentum : {false, true}) {
        int64_t n_values = n_ids * n_columns;
        Floats values(n_values, 0, 1.0), squares(n_values, 0, 1.0), last(n_values, 0, 1.0);
        for (float& square : squares.memory) square = fabsf(square);
        Floats new_values = values, new_squares = squares, new_last = last;
        for (const float* factor : {&skip, &scale}) {
          run("adagrad_rows", {1, 5, 16, 8}, new_values.data(), new_squares.data(),
              has_momentum ? new_last.data() : (float*)nullptr, (long long)n_ids,
              (const long long*)rows.row_ids.data(), (const float*)rows.sums.data(), n, n_columns,
              factor, (const double*)rates, momentum);
          if (factor == &skip) {
            untouched = untouched && same_bits(new_values, values) &&
                        same_bits(new_squares, squares) && same_bits(new_last, last);
          }
        }
        for (int i = 0; i < n_values; i++) {
          if (!is_listed[i / n_columns]) {
            untouched = untouched && new_values[i] == values[i] && new_squares[i] == squares[i] &&
                        new_last[i] == last[i];
            continue;
          }
          double g = sums[i] * scale, square = squares[i] + g * g;
          double change = -rates[1] * g / (sqrt(square) + 1e-10);
          if (has_momentum) change += static_cast<double>(momentum) * last[i];
          worst_step = std::max({worst_step, fabs(new_values[i] - (values[i] + change)),
                                 fabs(new_squares[i] - square) / (1.0 + square),
                                 has_momentum ? fabs(new_last[i] - change) : 0.0});
        }
      }
      // `adamw` on the whole table, with zero gradients elsewhere.
      AdamW table(static_cast<int64_t>(n_ids) * n_columns, 0);
      AdamW dense = table, before = table;
      std::fill(dense.gradients.memory.begin(), dense.gradients.memory.end(), 0.0f);
      for (int i = 0; i < n * n_columns; i++) {
        long long id = rows.row_ids[i / n_columns];
        if (id >= 0) dense.gradients[id * n_columns + i % n_columns] = rows.sums[i];
      }
      dense.run_with(scale, adamw_rates[0], adamw_rates[1]);
      run("lazy_adamw_rows", {1, 5, 16, 8}, table.values.data(), table.m.data(), table.v.data(),
          (long long)n_ids, (const long long*)rows.row_ids.data(),
          (const float*)rows.sums.data(), n, n_columns, &scale, (const float*)adamw_rates);
      for (int i = 0; i < n_ids * n_columns; i++) {
        AdamW& like = is_listed[i / n_columns] ? dense : before;
        same_adamw = same_adamw && table.values[i] == like.values[i] && table.m[i] == like.m[i] &&
                     table.v[i] == like.v[i];
      }
      Rows again = rows;
      run("sum_rows", {1, 1, 32, 1}, (const long long*)rows.sorted_ids.data(),
          (const int*)rows.order.data(), n, (const float*)rows.gradients.data(), n_columns,
          again.row_ids.data(), again.sums.data());
      same_sums = same_sums && same_bits(again.sums, rows.sums);
    }
  }
  check("sort_rows orders ids and keeps the order of equal ones; unused ids are last", sorted);
  check("sum_rows lists each id once", unique);
  check_error("sum_rows sums the gradients of equal ids", worst_sum, 1e-3);
  check("sum_rows does not depend on the grid", same_sums);
  check_error("add_rows adds the sums to their rows", worst_add, 1e-3);
  check("add_rows leaves other rows as they are", !added_elsewhere);
  check_error("adagrad_rows follows the formula, with and without momentum", worst_step, 2e-5);
  check("rows that are not listed do not change, and none does if the scale is NaN", untouched);
  check("lazy_adamw_rows equals adamw on the listed rows", same_adamw);
}

}  // namespace

int main() {
  test_sum_of_squares();
  test_finish_step();
  test_adamw();
  test_dropout();
  test_rows();
  printf("%s\n", n_failed == 0 ? "all checks passed" : "some checks failed");
  return n_failed == 0 ? 0 : 1;
}
