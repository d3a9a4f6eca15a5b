// Compares scans that are cut into chunks of steps with plain loops. The chunks need more CPUs than
// a small machine has, so the kernels are made to believe in 8.
#include <sched.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "cpu/runtime/thread_budget.h"
#include "cpu/scan.h"

extern "C" int sched_getaffinity(pid_t, std::size_t size, cpu_set_t* mask) noexcept {
  std::memset(mask, 0, size);
  for (int cpu = 0; cpu < 8; ++cpu) CPU_SET_S(cpu, size, mask);
  return 0;
}

namespace {

using namespace fastrnn;
using Values = std::vector<double>;

void parallel_for(std::int64_t n, void (*body)(std::int64_t, std::int64_t, void*), void* context) {
  std::vector<std::thread> others;
  for (std::int64_t i = 1; i < n; ++i) others.emplace_back([=] { body(i, i + 1, context); });
  body(0, 1, context);
  for (std::thread& other : others) other.join();
}

void expect_near(const char* what, const Values& got, const Values& expected) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::abs(got[i] - expected[i]) <= 1e-9 || got[i] == expected[i]) continue;  // infinities
    std::printf("%s: value %zu is %g, not %g\n", what, i, got[i], expected[i]);
    std::exit(1);
  }
}

Values values_of(std::int64_t count, double scale, double shift) {
  Values values(count);
  for (double& value : values) value = scale * (double(std::rand()) / RAND_MAX) + shift;
  return values;
}

// factor: the largest value of a; with 2 the products of a overflow.
void check(std::int64_t steps, std::int64_t columns, bool reverse, double factor) {
  const ScanShape shape = {steps, columns, reverse};
  const std::int64_t count = steps * columns;
  const bool overflows = factor > 1;
  const Values a = values_of(count, overflows ? 0 : factor, overflows ? factor : 0);
  const Values b = values_of(count, overflows ? 0 : 1, 0), d_h = b;
  const Values h0 = values_of(columns, overflows ? 0 : 1, 0);
  Values h(count), d_a(count), d_b(count), d_h0(columns);
  Values h_loop(count), d_a_loop(count), d_b_loop(count), carry(columns, 0.0);
  for (std::int64_t s = 0; s < steps; ++s)
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::int64_t at = shape.row(s) * columns + c;
      h_loop[at] = a[at] * (s > 0 ? h_loop[shape.row(s - 1) * columns + c] : h0[c]) + b[at];
    }
  for (std::int64_t s = steps - 1; s >= 0; --s)
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::int64_t at = shape.row(s) * columns + c;
      d_b_loop[at] = d_h[at] + carry[c];
      d_a_loop[at] = d_b_loop[at] * (s > 0 ? h_loop[shape.row(s - 1) * columns + c] : h0[c]);
      carry[c] = a[at] * d_b_loop[at];
    }
  cpu::scan(linear_scan(shape, a.data(), b.data(), h0.data(), h.data()), 8, parallel_for);
  expect_near("h", h, h_loop);
  cpu::scan_gradients(linear_scan_gradients(shape, d_h.data(), a.data(), h.data(), h0.data(),
                                            d_a.data(), d_b.data(), d_h0.data()),
                      8, parallel_for);
  expect_near("d_a", d_a, d_a_loop);
  expect_near("d_b", d_b, d_b_loop);
  expect_near("d_h0", d_h0, carry);
}

// An infinite first state. The product of each chunk underflows to 0, but no factor is 0.
void check_infinite_state(std::int64_t columns, bool reverse) {
  const std::int64_t steps = 600'000 / columns, count = steps * columns;
  const double infinity = std::numeric_limits<double>::infinity();
  const Values a(count, 0.5), b(count, 1.0), h0(columns, infinity), h_loop(count, infinity);
  Values h(count);
  const ScanShape shape = {steps, columns, reverse};
  cpu::scan(linear_scan(shape, a.data(), b.data(), h0.data(), h.data()), 8, parallel_for);
  expect_near("h after an infinite state", h, h_loop);
}

// Results of a layer's cell with lengths and resets: chunks of steps and one thread agree.
void check_marked_cell(ScanCell cell, bool reverse) {
  const std::int64_t steps = 30'000, batch = 2, units = 5, columns = batch * units;
  const std::int64_t inputs = kScanCells[int(cell)].inputs, count = steps * columns;
  const Values pre = values_of(count * inputs, 4, -2), d_y = values_of(count, 1, 0);
  const Values h0 = values_of(columns, 1, 0);
  const std::int64_t lengths[batch] = {steps, steps / 2};
  std::vector<std::uint8_t> resets(steps * batch);
  resets[100] = resets[20'001] = 1;

  const auto run = [&](int threads) {
    Values h(count), y(count), h_n(columns), d_pre(count * inputs), d_h0(columns);
    Scan<double> forward{};
    ScanGradients<double> backward{};
    const auto fill = [&](auto& problem) {
      problem.shape = {steps, columns, reverse, batch};
      problem.cell = cell;
      for (std::int64_t i = 0; i < inputs; ++i)
        problem.in[i] = {pre.data() + i * units, inputs * units, nullptr};
      problem.h0 = h0.data();
      problem.h = h.data();
      problem.marks.lengths = lengths;
      problem.marks.resets = resets.data();
    };
    fill(forward);
    forward.y = y.data();
    forward.h_n = h_n.data();
    cpu::scan(forward, threads, parallel_for);
    fill(backward);
    backward.d_y = d_y.data();
    for (std::int64_t i = 0; i < inputs; ++i)
      backward.d_in[i] = {d_pre.data() + i * units, inputs * units};
    backward.d_h0 = d_h0.data();
    cpu::scan_gradients(backward, threads, parallel_for);
    Values all;
    for (const Values* part : {&h, &y, &h_n, &d_pre, &d_h0})
      all.insert(all.end(), part->begin(), part->end());
    return all;
  };
  const cpu::ScanPlan plan = cpu::make_scan_plan({steps, columns, reverse, batch}, cell, 8, 8);
  if (plan.chunks < 3) {
    std::printf("%d chunks for a cell\n", plan.chunks);
    std::exit(1);
  }
  expect_near("results of a cell", run(8), run(1));
}

}  // namespace

int main() {
  if (cpu::usable_cpus() < 8) return 77;  // a quota
  for (const std::int64_t columns : {1, 5, 20, 40, 70}) {
    const std::int64_t steps = 600'000 / columns;
    const cpu::ScanPlan plan =
        cpu::make_scan_plan({steps, columns, false}, ScanCell::kLinear, 8, 8);
    if (plan.chunks < 3 || plan.groups * plan.chunks > 8) {
      std::printf("%d groups and %d chunks for %d columns\n", plan.groups, plan.chunks,
                  int(columns));
      return 1;
    }
    for (const bool reverse : {false, true})
      for (const double factor : {0.9, 2.0}) check(steps, columns, reverse, factor);
    for (const bool reverse : {false, true}) check_infinite_state(columns, reverse);
  }
  for (const ScanCell cell : {ScanCell::kMinGru, ScanCell::kMinLstm, ScanCell::kSru})
    for (const bool reverse : {false, true}) check_marked_cell(cell, reverse);
  return 0;
}
