// Runs the CPU kernels on every instruction set of this machine and compares them with plain loops
// (reference.h). `.ci/run sanitize` compiles this program and the kernels with a sanitizer; no
// torch and no Python are involved.
//
//   driver [--skip ISA]     all checks, also on ISA without the option; prints what ran, exits with
//                           1 at the first difference
//   driver --plant NAME     makes one mistake on purpose, which the sanitizer must report:
//     overflow              y is one value too short
//     misaligned            the numbers of rows start in the middle of a value
//     race                  two calls write the same y at the same time
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>

#include "cpu/api.h"
#include "cpu/bfloat16.h"
#include "cpu/recompute.h"
#include "cpu/runtime/buffer_cache.h"
#include "cpu/runtime/cache.h"
#include "cpu/runtime/thread_budget.h"
#include "cpu/scan.h"
#include "cpu/serial_stack.h"
#include "cpu/session.h"
#include "reference.h"

// Makes the kernels believe in 8 CPUs, so that teams of 4 run on a smaller machine too.
extern "C" int sched_getaffinity(pid_t, std::size_t size, cpu_set_t* mask) noexcept {
  std::memset(mask, 0, size);
  for (int cpu = 0; cpu < 8; ++cpu) CPU_SET_S(cpu, size, mask);
  return 0;
}

namespace sanitize {
namespace {

namespace cpu = fastrnn::cpu;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "driver: %s\n", message.c_str());
  std::exit(1);
}

using fastrnn::Bfloat16;

// Conversions of values in memory. bfloat16 is cut off, which is exact enough for these checks.
template <class T>
T from_double(double value) {
  return T(value);
}
template <>
Bfloat16 from_double(double value) {
  const float single = float(value);
  std::uint32_t bits;
  std::memcpy(&bits, &single, sizeof(bits));
  return {std::uint16_t(bits >> 16)};
}
double to_double(double value) { return value; }
double to_double(Bfloat16 value) { return double(float(value)); }

// A matrix as a caller of the kernels has it: exactly as long as it must be, so that
// AddressSanitizer sees the first value beyond it. Padding between rows is NaN and must stay so.
template <class T>
class Matrix {
 public:
  // Unwritten: NaN.
  Matrix(std::int64_t rows, std::int64_t columns, std::int64_t stride)
      : rows_(rows),
        columns_(columns),
        stride_(stride),
        values_(std::size_t(rows == 0 ? 0 : (rows - 1) * stride + columns),
                from_double<T>(std::numeric_limits<double>::quiet_NaN())) {
    values_.reserve(1);  // not null
  }
  Matrix(const Values& from, std::int64_t rows, std::int64_t columns, std::int64_t padding = 0)
      : Matrix(rows, columns, columns + padding) {
    for (std::int64_t i = 0; i < rows * columns; ++i)
      data()[i / columns * stride_ + i % columns] = from_double<T>(from[std::size_t(i)]);
  }

  T* data() { return values_.data(); }
  const T* data() const { return values_.data(); }
  std::int64_t stride() const { return stride_; }
  void drop_last() {
    values_.pop_back();
    values_.shrink_to_fit();
  }

  // Columns [first, first + count) must be `expected`, to within an error.
  void check(const Values& expected, double tolerance, const std::string& name,
             std::int64_t first = 0, std::int64_t count = -1) const {
    if (count < 0) count = columns_;
    for (std::int64_t i = 0; i < rows_ * count; ++i) {
      const double want = expected[std::size_t(i)];
      const double got = to_double(values_[std::size_t(i / count * stride_ + first + i % count)]);
      if (!(std::abs(got - want) <= tolerance * (1.0 + std::abs(want))))
        fail(name + " is " + std::to_string(got) + " at row " + std::to_string(i / count) +
             ", column " + std::to_string(i % count) + ", expected " + std::to_string(want));
    }
    for (std::int64_t row = 0; row + 1 < rows_; ++row)
      for (std::int64_t i = columns_; i < stride_; ++i)
        if (!std::isnan(to_double(values_[std::size_t(row * stride_ + i)])))
          fail(name + " was written between its rows");
  }

 private:
  std::int64_t rows_, columns_, stride_;
  std::vector<T> values_;
};

// The caller's thread pool.
std::atomic<int> parallel_calls{0};
void on_threads(std::int64_t n, void (*body)(std::int64_t, std::int64_t, void*), void* context) {
  ++parallel_calls;
  std::vector<std::thread> others;
  for (std::int64_t piece = 1; piece < n; ++piece)
    others.emplace_back([=] { body(piece, piece + 1, context); });
  body(0, 1, context);
  for (std::thread& other : others) other.join();
}
// A pool that grants fewer threads than it was asked for.
void on_half_the_threads(std::int64_t n, void (*body)(std::int64_t, std::int64_t, void*),
                         void* context) {
  ++parallel_calls;
  std::vector<std::thread> others;
  for (std::int64_t piece = 2; piece < n; piece += 2)
    others.emplace_back([=] { body(piece, std::min(piece + 2, n), context); });
  body(0, std::min<std::int64_t>(2, n), context);
  for (std::thread& other : others) other.join();
}

// After threads of a team slept for long, the kernels run calls on one thread for a while. This
// call runs on the threads of its plan.
template <class Call>
void run_as_planned(const cpu::Plan& plan, bool any_threads, const std::string& name, Call call) {
  if (any_threads) return call();
  cpu::forget_contention();
  const int before = parallel_calls.load();
  call();
  if (plan.threads * plan.together > 1 && parallel_calls.load() == before)
    fail(name + " ran on one thread");
}

template <class T>
struct Checker {
  const Layer& layer;
  const int threads;
  const bool half_weights = false;
  const cpu::ParallelFor parallel_for = on_threads;
  std::set<std::string>* rules = nullptr;  // of the plan that were in use
  const bool any_threads = false;          // may run on fewer threads than planned

  std::int64_t inputs = layer.sizes.input_size, hidden = layer.sizes.hidden_size;
  std::int64_t outputs = layer.output_size(), batch = layer.batch(), rows = layer.rows;
  std::int64_t gate_rows = layer.info().gates * hidden, cell_units = layer.cell_units();
  std::int64_t recurrent_rows = layer.info().dense ? gate_rows : 0;
  double tolerance = half_weights ? 1e-2 : sizeof(T) == 4 ? 2e-4 : 1e-10;

  fastrnn::WeightFormat allowed_format() const {
    return half_weights ? fastrnn::WeightFormat::kFloat16 : fastrnn::WeightFormat::kNative;
  }

  std::string name(const char* what) const {
    return layer.sizes.name + ", " + layer.info().name + ", " + cpu::isa_in_use() + ", " +
           (sizeof(T) == 4 ? "float" : "double") + ", " + std::to_string(threads) +
           " threads: " + what;
  }

  // The weights of a direction, with padding between their rows.
  template <class Storage>
  struct WeightsOf {
    Matrix<Storage> w_ih, w_hh, b_ih, b_hh, w_hr, w_unit;
    bool is_dense;
    WeightsOf(const Checker& c, const Direction& d)
        : w_ih(d.w_ih, c.gate_rows, c.inputs, 3),
          w_hh(d.w_hh, c.recurrent_rows, c.outputs, 5),
          b_ih(d.b_ih, 1, c.gate_rows),
          b_hh(d.b_hh, 1, c.recurrent_rows),
          w_hr(d.w_hr, c.layer.sizes.proj_size, c.hidden, 1),
          w_unit(d.w_unit, 1, c.layer.info().parameters * c.hidden),
          is_dense(c.layer.info().dense) {}
    fastrnn::LayerWeights<Storage> pointers() const {
      fastrnn::LayerWeights<Storage> weights{};
      weights.w_ih = w_ih.data();
      weights.b_ih = b_ih.data();
      weights.w_hr = w_hr.data();
      weights.w_unit = w_unit.data();
      if (is_dense) {
        weights.w_hh = w_hh.data();
        weights.b_hh = b_hh.data();
      }
      weights.w_ih_stride = w_ih.stride();
      weights.w_hh_stride = w_hh.stride();
      weights.w_hr_stride = w_hr.stride();
      return weights;
    }
  };
  using Weights = WeightsOf<T>;

  using Directions = std::vector<const Direction*>;

  cpu::Plan plan(cpu::Pass pass, const Directions& directions) const {
    const cpu::Plan plan = cpu::make_plan(layer.shape(false), pass, sizeof(T), threads,
                                          int(directions.size()), allowed_format());
    if (rules != nullptr) {
      auto note = [&](bool is_in_use, const char* rule) {
        if (is_in_use) rules->insert(rule);
      };
      note(plan.unit_groups > 1, "unit groups");
      note(plan.row_groups > 1, "row groups");
      note(plan.packed, "packed weights");
      note(!plan.packed, "unpacked weights");
      note(plan.input_fused, "input in the step");
      note(!plan.input_fused, "input ahead of the step");
      note(plan.shared, "shared blocks");
      note(plan.prefetch, "prefetched panels");
      note(plan.recurrent_format == fastrnn::WeightFormat::kFloat16, "half weights");
      note(plan.together == 2, "two directions at once");
    }
    return plan;
  }

  // The directions' columns of y lie side by side; one alone has padding there.
  std::int64_t y_stride(const Directions& directions) const {
    return directions.size() == 1 ? outputs + 2 : outputs * 2;
  }

  void forward(const Directions& directions) const {
    const auto run = [&](const auto* problems, int count) {
      cpu::forward(problems, count, threads, parallel_for);
    };
    forward_of<T>(directions, plan(cpu::Pass::kForward, directions), tolerance, "", run);
    if constexpr (sizeof(T) == 4) {
      if (!half_weights && layer.info().reduced) forward_in_bfloat16(directions);
    }
  }

  // With all kernels, whatever the rule.
  void forward_in_bfloat16(const Directions& directions) const {
    const auto run = [&](const auto* problems, int count) {
      cpu::bfloat16_forward(problems, count, threads, parallel_for);
    };
    for (const std::string& kernels : cpu::available_bfloat16_kernels()) {
      cpu::set_bfloat16_kernels(kernels);
      const cpu::Plan plan = cpu::make_bfloat16_plan(layer.shape(false), cpu::Pass::kForward,
                                                     threads, int(directions.size()));
      forward_of<Bfloat16>(directions, plan, 6e-2, "bfloat16, " + kernels + ", ", run);
    }
    cpu::set_bfloat16_kernels("");
  }

  // Forward with tensors of a type.
  template <class Storage, class Run>
  void forward_of(const Directions& directions, const cpu::Plan& plan, double tolerance,
                  const std::string& prefix, const Run& run) const {
    const Matrix<Storage> x(layer.x, rows, inputs, 2);
    std::vector<WeightsOf<Storage>> weights;
    std::vector<Matrix<Storage>> h0, c0;
    for (const Direction* d : directions) {
      weights.emplace_back(*this, *d);
      h0.emplace_back(d->h0, batch, outputs);
      c0.emplace_back(d->c0, batch, cell_units);
    }
    const auto label = [&](const char* what) { return prefix + name(what); };
    run_as_planned(plan, any_threads, label("forward"), [&] {
      Matrix<Storage> y(rows, outputs * std::int64_t(directions.size()), y_stride(directions));
      std::vector<Matrix<Storage>> h_n, c_n;
      std::vector<Matrix<T>> saved;
      for (std::size_t i = 0; i < directions.size(); ++i) {
        h_n.emplace_back(batch, outputs, outputs);
        c_n.emplace_back(batch, cell_units, cell_units);
        saved.emplace_back(rows, layer.info().saved * hidden, layer.info().saved * hidden);
      }
      std::vector<fastrnn::LayerForward<Storage, T>> problems;
      for (std::size_t i = 0; i < directions.size(); ++i) {
        fastrnn::LayerForward<Storage, T> problem{};
        problem.shape = layer.shape(directions[i]->reverse);
        problem.weights = weights[i].pointers();
        problem.x = x.data();
        problem.x_stride = x.stride();
        problem.h0 = h0[i].data();
        problem.c0 = c0[i].data();
        problem.y = y.data() + std::int64_t(i) * outputs;
        problem.y_stride = y.stride();
        problem.h_n = h_n[i].data();
        problem.c_n = c_n[i].data();
        problem.saved = layer.info().saved > 0 && !half_weights ? saved[i].data() : nullptr;
        problem.recurrent_format = allowed_format();
        problems.push_back(problem);
      }
      run(problems.data(), int(problems.size()));
      for (std::size_t i = 0; i < directions.size(); ++i) {
        const Direction& d = *directions[i];
        y.check(d.y, tolerance, label("y"), std::int64_t(i) * outputs, outputs);
        h_n[i].check(d.h_n, tolerance, label("h_n"));
        if (layer.info().states > 1) c_n[i].check(d.c_n, tolerance, label("c_n"));
        if (problems[i].saved != nullptr) saved[i].check(d.saved, tolerance, label("saved"));
      }
    });
  }

  // Of one direction: y and what forward saved, with its padding.
  void backward(const Directions& directions) const {
    const std::int64_t width = layer.info().gradient_columns() * hidden;
    std::vector<Weights> weights;
    std::vector<Matrix<T>> h0, c0, y, saved, d_y, d_h_n, d_c_n, d_c_steps;
    for (const Direction* d : directions) {
      weights.emplace_back(*this, *d);
      h0.emplace_back(d->h0, batch, outputs);
      c0.emplace_back(d->c0, batch, cell_units);
      y.emplace_back(d->y, rows, outputs, 2);
      saved.emplace_back(d->saved, rows, layer.info().saved * hidden);
      d_y.emplace_back(d->d_y, rows, outputs, 3);
      d_h_n.emplace_back(d->d_h_n, batch, outputs);
      d_c_n.emplace_back(d->d_c_n, batch, cell_units);
      d_c_steps.emplace_back(d->d_c_steps, d->d_c_steps.empty() ? 0 : rows, cell_units);
    }
    run_as_planned(plan(cpu::Pass::kBackward, directions), any_threads, name("backward"), [&] {
      std::vector<Matrix<T>> d_pre, d_h_all, d_h0, d_c0;
      for (std::size_t i = 0; i < directions.size(); ++i) {
        d_pre.emplace_back(rows, width, width);
        d_h_all.emplace_back(rows, outputs, outputs);
        d_h0.emplace_back(batch, outputs, outputs);
        d_c0.emplace_back(batch, cell_units, cell_units);
      }
      std::vector<fastrnn::LayerBackward<T, T>> problems;
      for (std::size_t i = 0; i < directions.size(); ++i) {
        fastrnn::LayerBackward<T, T> problem{};
        problem.shape = layer.shape(directions[i]->reverse);
        problem.weights = weights[i].pointers();
        problem.h0 = h0[i].data();
        problem.c0 = c0[i].data();
        problem.y = y[i].data();
        problem.y_stride = y[i].stride();
        problem.saved = layer.info().saved > 0 ? saved[i].data() : nullptr;
        problem.d_y = d_y[i].data();
        problem.d_y_stride = d_y[i].stride();
        problem.d_h_n = d_h_n[i].data();
        problem.d_c_n = layer.info().states > 1 ? d_c_n[i].data() : nullptr;
        problem.d_c_steps = directions[i]->d_c_steps.empty() ? nullptr : d_c_steps[i].data();
        problem.d_pre = d_pre[i].data();
        problem.d_h_all = layer.sizes.proj_size > 0 ? d_h_all[i].data() : nullptr;
        problem.d_h0 = d_h0[i].data();
        problem.d_c0 = d_c0[i].data();
        problems.push_back(problem);
      }
      cpu::backward(problems.data(), int(problems.size()), threads, parallel_for);
      for (std::size_t i = 0; i < directions.size(); ++i) {
        const Direction& d = *directions[i];
        d_pre[i].check(d.d_pre, tolerance, name("d_pre"));
        d_h0[i].check(d.d_h0, tolerance, name("d_h0"));
        if (layer.sizes.proj_size > 0) d_h_all[i].check(d.d_h_all, tolerance, name("d_h_all"));
        if (layer.info().states > 1) d_c0[i].check(d.d_c0, tolerance, name("d_c0"));
      }
    });
  }

  // Both directions add into one d_x.
  void gradients(const Directions& directions) const {
    const std::int64_t width = layer.info().gradient_columns() * hidden;
    const Matrix<T> x(layer.x, rows, inputs, 2);
    Values d_x_of_all(layer.x.size());
    std::vector<Weights> weights;
    std::vector<Matrix<T>> h0, y, d_pre;
    for (const Direction* d : directions) {
      weights.emplace_back(*this, *d);
      h0.emplace_back(d->h0, batch, outputs);
      y.emplace_back(d->y, rows, outputs, 2);
      d_pre.emplace_back(d->d_pre, rows, width);
      for (std::size_t i = 0; i < d_x_of_all.size(); ++i) d_x_of_all[i] += d->d_x[i];
    }
    run_as_planned(plan(cpu::Pass::kGradients, directions), any_threads, name("gradients"), [&] {
      Matrix<T> d_x(rows, inputs, inputs);
      std::vector<Matrix<T>> d_w_ih, d_w_hh, d_b_ih, d_b_hh;
      for (std::size_t i = 0; i < directions.size(); ++i) {
        d_w_ih.emplace_back(gate_rows, inputs, inputs);
        d_w_hh.emplace_back(recurrent_rows, outputs, outputs);
        d_b_ih.emplace_back(1, gate_rows, gate_rows);
        d_b_hh.emplace_back(1, recurrent_rows, recurrent_rows);
      }
      std::vector<fastrnn::LayerGradients<T>> problems;
      for (std::size_t i = 0; i < directions.size(); ++i) {
        fastrnn::LayerGradients<T> problem{};
        problem.shape = layer.shape(directions[i]->reverse);
        problem.w_ih = weights[i].w_ih.data();
        problem.w_ih_stride = weights[i].w_ih.stride();
        problem.x = x.data();
        problem.x_stride = x.stride();
        problem.h0 = h0[i].data();
        problem.y = y[i].data();
        problem.y_stride = y[i].stride();
        problem.rows = {0, problem.shape.sequence.total_rows()};
        problem.d_pre = d_pre[i].data();
        problem.d_x = d_x.data();
        problem.add_to_x = i > 0;
        problem.d_w_ih = d_w_ih[i].data();
        problem.d_b_ih = d_b_ih[i].data();
        if (layer.info().dense) {
          problem.d_w_hh = d_w_hh[i].data();
          problem.d_b_hh = d_b_hh[i].data();
        }
        problems.push_back(problem);
      }
      cpu::gradients(problems.data(), int(problems.size()), threads, parallel_for);
      d_x.check(d_x_of_all, tolerance, name("d_x"));
      for (std::size_t i = 0; i < directions.size(); ++i) {
        const Direction& d = *directions[i];
        d_w_ih[i].check(d.d_w_ih, tolerance, name("d_w_ih"));
        d_w_hh[i].check(d.d_w_hh, tolerance, name("d_w_hh"));
        d_b_ih[i].check(d.d_b_ih, tolerance, name("d_b_ih"));
        d_b_hh[i].check(d.d_b_hh, tolerance, name("d_b_hh"));
      }
    });
  }

  void all(const Directions& directions) const {
    forward(directions);
    if (half_weights) return;
    backward(directions);
    gradients(directions);
    if (layer.sizes.proj_size == 0 && layer.info().parameters == 0 && rows > 0) {
      recompute<T>(directions, tolerance);
      if constexpr (sizeof(T) == 4) {
        if (layer.info().reduced) recompute_in_bfloat16(directions);
      }
    }
  }

  void recompute_in_bfloat16(const Directions& directions) const {
    for (const std::string& kernels : cpu::available_bfloat16_kernels()) {
      cpu::set_bfloat16_kernels(kernels);
      recompute<Bfloat16>(directions, 6e-2);
    }
    cpu::set_bfloat16_kernels("");
  }

  // Forward and backward in chunks of two steps.
  template <class Storage>
  void recompute(const Directions& directions, double tolerance) const {
    const std::int64_t length = 2, count = std::int64_t(directions.size());
    const std::int64_t chunks = std::max(cpu::chunk_count(layer.shape(false), length),
                                         cpu::chunk_count(layer.shape(true), length));
    const std::int64_t state_size = cpu::chunk_state_size(layer.shape(false));
    const Matrix<Storage> stored_x(layer.x, rows, inputs, 2);
    const Matrix<T> x(layer.x, rows, inputs, 2);
    Matrix<Storage> stored_y(rows, outputs * count, y_stride(directions));
    Matrix<T> d_x(rows, inputs, inputs);
    Values d_x_of_all(layer.x.size());
    std::vector<WeightsOf<Storage>> stored;
    std::vector<Weights> weights;
    std::vector<Matrix<Storage>> stored_h0, stored_c0, h_n, c_n;
    std::vector<Matrix<T>> states, h0, c0, y, d_y, d_h_n, d_c_n;
    std::vector<fastrnn::LayerForward<Storage, T>> forward;
    std::vector<T*> kept;
    for (const Direction* d : directions) {
      stored.emplace_back(*this, *d);
      weights.emplace_back(*this, *d);
      stored_h0.emplace_back(d->h0, batch, outputs);
      stored_c0.emplace_back(d->c0, batch, cell_units);
      h0.emplace_back(d->h0, batch, outputs);
      c0.emplace_back(d->c0, batch, cell_units);
      h_n.emplace_back(batch, outputs, outputs);
      c_n.emplace_back(batch, cell_units, cell_units);
      states.emplace_back(chunks, state_size, state_size);
      y.emplace_back(d->y, rows, outputs, 2);
      d_y.emplace_back(d->d_y, rows, outputs, 3);
      d_h_n.emplace_back(d->d_h_n, batch, outputs);
      d_c_n.emplace_back(d->d_c_n, batch, cell_units);
      for (std::size_t i = 0; i < d_x_of_all.size(); ++i) d_x_of_all[i] += d->d_x[i];
    }
    for (std::size_t i = 0; i < directions.size(); ++i) {
      fastrnn::LayerForward<Storage, T> problem{};
      problem.shape = layer.shape(directions[i]->reverse);
      problem.weights = stored[i].pointers();
      problem.x = stored_x.data();
      problem.x_stride = stored_x.stride();
      problem.h0 = stored_h0[i].data();
      problem.c0 = stored_c0[i].data();
      problem.y = stored_y.data() + std::int64_t(i) * outputs;
      problem.y_stride = stored_y.stride();
      problem.h_n = h_n[i].data();
      problem.c_n = c_n[i].data();
      forward.push_back(problem);
      kept.push_back(states[i].data());
    }
    cpu::forward_in_chunks(forward.data(), int(count), length, kept.data(), threads, parallel_for);
    for (std::size_t i = 0; i < directions.size(); ++i) {
      const Direction& d = *directions[i];
      stored_y.check(d.y, tolerance, name("y in chunks"), std::int64_t(i) * outputs, outputs);
      h_n[i].check(d.h_n, tolerance, name("h_n in chunks"));
      if (layer.info().states > 1) c_n[i].check(d.c_n, tolerance, name("c_n in chunks"));
    }
    for (std::size_t i = 0; i < directions.size(); ++i) {
      const Direction& d = *directions[i];
      Matrix<T> d_h0(batch, outputs, outputs), d_c0(batch, cell_units, cell_units);
      Matrix<T> d_w_ih(gate_rows, inputs, inputs), d_w_hh(recurrent_rows, outputs, outputs);
      Matrix<T> d_b_ih(1, gate_rows, gate_rows), d_b_hh(1, recurrent_rows, recurrent_rows);
      cpu::ChunkedBackward<Storage, T> problem{};
      problem.forward = forward[i];
      problem.forward.y = problem.forward.h_n = problem.forward.c_n = nullptr;
      problem.states = states[i].data();
      problem.directions = int(count);
      problem.backward.shape = problem.gradients.shape = layer.shape(d.reverse);
      problem.backward.weights = weights[i].pointers();
      problem.backward.h0 = problem.gradients.h0 = h0[i].data();
      problem.backward.c0 = c0[i].data();
      problem.backward.y = problem.gradients.y = y[i].data();
      problem.backward.y_stride = problem.gradients.y_stride = y[i].stride();
      problem.backward.d_y = d_y[i].data();
      problem.backward.d_y_stride = d_y[i].stride();
      problem.backward.d_h_n = d_h_n[i].data();
      problem.backward.d_c_n = layer.info().states > 1 ? d_c_n[i].data() : nullptr;
      const Matrix<T> d_c_steps(d.d_c_steps, d.d_c_steps.empty() ? 0 : rows, cell_units);
      if (!d.d_c_steps.empty()) problem.backward.d_c_steps = d_c_steps.data();
      problem.backward.d_h0 = d_h0.data();
      problem.backward.d_c0 = layer.info().states > 1 ? d_c0.data() : nullptr;
      problem.gradients.w_ih = weights[i].w_ih.data();
      problem.gradients.w_ih_stride = weights[i].w_ih.stride();
      problem.gradients.x = x.data();
      problem.gradients.x_stride = x.stride();
      problem.gradients.d_x = d_x.data();
      problem.gradients.add_to_x = i > 0;
      problem.gradients.d_w_ih = d_w_ih.data();
      problem.gradients.d_b_ih = d_b_ih.data();
      problem.gradients.d_w_hh = layer.info().dense ? d_w_hh.data() : nullptr;
      problem.gradients.d_b_hh = layer.info().dense ? d_b_hh.data() : nullptr;
      cpu::backward_in_chunks(problem, length, threads, parallel_for);
      d_h0.check(d.d_h0, tolerance, name("d_h0 in chunks"));
      if (layer.info().states > 1) d_c0.check(d.d_c0, tolerance, name("d_c0 in chunks"));
      d_w_ih.check(d.d_w_ih, tolerance, name("d_w_ih in chunks"));
      d_w_hh.check(d.d_w_hh, tolerance, name("d_w_hh in chunks"));
      d_b_ih.check(d.d_b_ih, tolerance, name("d_b_ih in chunks"));
      d_b_hh.check(d.d_b_hh, tolerance, name("d_b_hh in chunks"));
    }
    d_x.check(d_x_of_all, tolerance, name("d_x in chunks"));
  }
};

std::vector<std::int64_t> padded(std::int64_t steps, std::int64_t batch) {
  return std::vector<std::int64_t>(std::size_t(batch), steps);
}

// Sizes are as small as they can be for the rule of the plan that they are for.
std::vector<Case> cases() {
  return {
      {"no steps", 3, 5, 0, {0, 0}},
      {"one step", 3, 70, 0, padded(1, 1)},
      {"odd sizes", 5, 7, 0, padded(4, 3)},
      {"unit groups", 24, 130, 0, padded(7, 3)},
      {"row groups", 24, 130, 0, padded(3, 9)},
      {"packed sequences", 9, 131, 0, {7, 6, 6, 4, 4, 3, 2, 1, 1}},
      {"packed, few sequences", 33, 131, 0, {9, 5, 2}},
      {"many steps", 3, 5, 0, padded(61, 5)},
      {"packed, many steps", 3, 5, 0, {150, 149, 60, 2}},
      {"wide input", 270, 21, 0, padded(3, 4)},
      {"many rows", 6, 9, 0, padded(9, 30)},
  };
}
std::vector<Case> projections() {
  return {
      {"projection", 9, 70, 19, padded(7, 3)},
      {"packed projection", 9, 70, 40, {6, 6, 5, 4, 4, 3, 2, 1, 1}},
  };
}
const Case kShared{"shared blocks", 240, 200, 0, padded(4, 30)};
const Case kHalf{"half weights", 5, 132, 0, padded(25, 1)};

// ThreadSanitizer takes several times as long as the others. A single thread has no races, and
// double has the schedules of float.
#if defined(__SANITIZE_THREAD__)
constexpr bool kOnlyRaces = true;
#else
constexpr bool kOnlyRaces = false;
#endif

std::vector<int> thread_counts() {
  const int most = std::min(4, cpu::usable_cpus());
  if (most < 2) fail("the control group's quota must be at least 2 CPUs");
  std::vector<int> counts = {2};
  if (!kOnlyRaces) counts.insert(counts.begin(), 1);
  if (most > 2) counts.push_back(most);
  return counts;
}

// Layers and their results, made once for all instruction sets, dtypes and numbers of threads.
const Layer& layer_of(CellKind cell, const Case& sizes) {
  static std::map<std::pair<int, std::string>, std::unique_ptr<Layer>> made;
  auto& layer = made[{int(cell), sizes.name}];
  if (layer == nullptr) layer = std::make_unique<Layer>(cell, sizes, unsigned(made.size()));
  return *layer;
}

template <class T>
void check_layers(std::set<std::string>& rules) {
  for (const fastrnn::CellInfo& info : fastrnn::kCells) {
    std::vector<Case> all = cases();
    if (info.projects)
      for (const Case& sizes : projections()) all.push_back(sizes);
    for (const int threads : thread_counts()) {
      for (const Case& sizes : all) {
        const Layer& layer = layer_of(info.kind, sizes);
        const Checker<T> checker{layer, threads, false, on_threads, &rules};
        checker.all({&layer.directions[0], &layer.directions[1]});
        checker.all({&layer.directions[threads % 2]});
      }
      const Layer& half = layer_of(info.kind, kHalf);
      Checker<T>{half, threads, true, on_threads, &rules}.all({&half.directions[0]});
    }
    const int most = thread_counts().back();
    const Layer& shared = layer_of(info.kind, kShared);
    const Checker<T> checker{shared, most, false, on_threads, &rules};
    checker.all({&shared.directions[0], &shared.directions[1]});
    checker.all({&shared.directions[1]});
    Checker<T>{shared, most, false, on_half_the_threads}.all({&shared.directions[0]});
  }
}

// Three layers, each with y of the one before it as its x.
template <class T>
void check_stack(std::set<std::string>& rules) {
  constexpr int kLayers = 3;
  constexpr std::int64_t kInputs = 24, kHidden = 72, kSteps = 40;
  for (const fastrnn::CellInfo& info : fastrnn::kCells) {
    for (const int threads : thread_counts()) {
      std::vector<std::unique_ptr<Layer>> layers;
      for (int i = 0; i < kLayers; ++i)
        layers.push_back(std::make_unique<Layer>(
            info.kind, Case{"stack", i == 0 ? kInputs : kHidden, kHidden, 0, padded(kSteps, 1)},
            unsigned(i)));
      using Checks = Checker<T>;
      std::vector<typename Checks::Weights> weights;
      std::vector<Matrix<T>> h0, c0;
      for (const auto& layer : layers) {
        weights.emplace_back(Checks{*layer, threads}, layer->directions[0]);
        h0.emplace_back(layer->directions[0].h0, 1, kHidden);
        c0.emplace_back(layer->directions[0].c0, 1, layer->cell_units());
      }
      const Matrix<T> x(layers[0]->x, kSteps, kInputs);
      cpu::Plan plans[2];
      const bool at_once = cpu::make_stacked_plans(layers[0]->shape(false), layers[1]->shape(false),
                                                   sizeof(T), threads, plans);
      if (at_once) rules.insert("two layers at once");
      cpu::Plan plan = cpu::make_plan(layers[0]->shape(false), cpu::Pass::kForward, sizeof(T), 1);
      const cpu::Plan one_thread = plan;
      plan.together = at_once ? 2 : 1;

      // A layer after the other, which the checks above cover, is what the stack is compared with.
      std::vector<Matrix<T>> expected;
      for (const bool stacked : {false, true}) {
        run_as_planned(stacked ? plan : one_thread, false, "stack", [&] {
          std::vector<Matrix<T>> y, h_n, c_n;
          for (int i = 0; i < kLayers; ++i) {
            y.emplace_back(kSteps, kHidden, kHidden);
            h_n.emplace_back(1, kHidden, kHidden);
            c_n.emplace_back(1, layers[std::size_t(i)]->cell_units(),
                             layers[std::size_t(i)]->cell_units());
          }
          std::vector<fastrnn::LayerForward<T, T>> problems;
          for (std::size_t i = 0; i < kLayers; ++i) {
            fastrnn::LayerForward<T, T> problem{};
            problem.shape = layers[i]->shape(false);
            problem.weights = weights[i].pointers();
            problem.x = i == 0 ? x.data() : y[i - 1].data();
            problem.x_stride = i == 0 ? kInputs : kHidden;
            problem.h0 = h0[i].data();
            problem.c0 = c0[i].data();
            problem.y = y[i].data();
            problem.y_stride = kHidden;
            problem.h_n = h_n[i].data();
            problem.c_n = c_n[i].data();
            problems.push_back(problem);
          }
          if (stacked) {
            cpu::forward_stack(problems.data(), kLayers, threads, on_threads);
          } else {
            for (const auto& problem : problems) cpu::forward(&problem, 1, 1, on_threads);
            expected = y;
            return;
          }
          for (std::size_t i = 0; i < kLayers; ++i) {
            const Values want(expected[i].data(), expected[i].data() + kSteps * kHidden);
            y[i].check(want, sizeof(T) == 4 ? 2e-4 : 1e-10, "y of a stack");
          }
        });
      }
    }
  }
}

// Packed layers on the calling thread (serial_stack.h), with the states in between: steps, several
// parts of steps, and x in the memory of y. forward() runs each layer for comparison.
template <class T>
struct SerialStackCheck {
  static constexpr std::int64_t kSteps = 70;  // more than one part of batch 3
  const CellKind cell;
  const std::int64_t inputs, hidden, projection, batch;
  const int count;
  const bool residual;
  const std::vector<std::unique_ptr<Layer>> layers = make_layers();
  const std::int64_t out = projection > 0 ? projection : hidden;
  const std::int64_t cell_units = fastrnn::cell_info(cell).states == 2 ? hidden : 0;

  std::vector<std::unique_ptr<Layer>> make_layers() const {
    const std::int64_t below = projection > 0 ? projection : hidden;
    std::vector<std::unique_ptr<Layer>> made;
    for (int i = 0; i < count; ++i)
      made.push_back(std::make_unique<Layer>(
          cell, Case{"serial", i == 0 ? inputs : below, hidden, projection, padded(kSteps, batch)},
          unsigned(i)));
    return made;
  }

  void check() const {
    std::vector<typename Checker<T>::Weights> own;
    std::vector<fastrnn::LayerWeights<T>> weights;
    for (const auto& layer : layers) own.emplace_back(Checker<T>{*layer, 1}, layer->directions[0]);
    for (const auto& weight : own) weights.push_back(weight.pointers());
    const Matrix<T> x(layers[0]->x, kSteps * batch, inputs);
    std::vector<Matrix<T>> expected_h, expected_c;
    const Values expected = run_layers(weights, x, expected_h, expected_c);

    const cpu::StackShape shape{cell, count, 1, inputs, hidden, projection, residual};
    cpu::PackedStack<T> stack(shape, 1);
    stack.pack(weights.data());
    cpu::SerialStack<T> serial(stack, batch);
    for (const std::int64_t first : {std::int64_t(0), std::int64_t(1), std::int64_t(5)}) {
      // heap memory of exactly the size that the interface promises to stay in
      std::vector<T> y(std::size_t(kSteps * batch * out));
      std::vector<T> h(std::size_t(count * batch * out));
      std::vector<T> c(std::size_t(count * batch * cell_units));
      for (int i = 0; i < count; ++i) {
        const Direction& d = layers[std::size_t(i)]->directions[0];
        copy(d.h0, h, i * batch * out);
        if (cell_units > 0) copy(d.c0, c, i * batch * cell_units);
      }
      T* const c_states = cell_units > 0 ? c.data() : nullptr;
      for (std::int64_t t = 0; t < first; ++t)
        serial.run(x.data() + t * batch * inputs, 1, y.data() + t * batch * out, h.data(), c_states,
                   false);
      serial.run(x.data() + first * batch * inputs, kSteps - first, y.data() + first * batch * out,
                 h.data(), c_states, false);
      compare(y, expected, "y of a serial stack");
      for (int i = 0; i < count; ++i) {
        const T* const own_h = h.data() + i * batch * out;
        compare({own_h, own_h + batch * out}, values(expected_h[std::size_t(i)], batch * out),
                "h of a serial stack");
        if (cell_units == 0) continue;
        const T* const own_c = c.data() + i * batch * cell_units;
        compare({own_c, own_c + batch * cell_units},
                values(expected_c[std::size_t(i)], batch * cell_units), "c of a serial stack");
      }
    }
    if (inputs == out) check_overlap(serial, x, expected);
  }

  // y in the memory of x.
  void check_overlap(cpu::SerialStack<T>& serial, const Matrix<T>& x,
                     const Values& expected) const {
    std::vector<T> shared(x.data(), x.data() + batch * inputs);
    std::vector<T> h(std::size_t(count * batch * out)), c(std::size_t(count * batch * cell_units));
    for (int i = 0; i < count; ++i) {
      const Direction& d = layers[std::size_t(i)]->directions[0];
      copy(d.h0, h, i * batch * out);
      if (cell_units > 0) copy(d.c0, c, i * batch * cell_units);
    }
    serial.run(shared.data(), 1, shared.data(), h.data(), cell_units > 0 ? c.data() : nullptr,
               false);
    compare(shared, Values(expected.begin(), expected.begin() + batch * out), "y in place of x");
  }

  Values run_layers(const std::vector<fastrnn::LayerWeights<T>>& weights, const Matrix<T>& x,
                    std::vector<Matrix<T>>& h_n, std::vector<Matrix<T>>& c_n) const {
    std::vector<T> below(x.data(), x.data() + kSteps * batch * inputs);
    for (int i = 0; i < count; ++i) {
      const Layer& layer = *layers[std::size_t(i)];
      const Matrix<T> h0(layer.directions[0].h0, batch, out);
      const Matrix<T> c0(layer.directions[0].c0, batch, layer.cell_units());
      h_n.emplace_back(batch, out, out);
      c_n.emplace_back(batch, layer.cell_units(), layer.cell_units());
      std::vector<T> y(std::size_t(kSteps * batch * out));
      fastrnn::LayerForward<T, T> problem{};
      problem.shape = layer.shape(false);
      problem.weights = weights[std::size_t(i)];
      problem.x = below.data();
      problem.x_stride = problem.shape.input_size;
      problem.h0 = h0.data();
      problem.c0 = c0.data();
      problem.y = y.data();
      problem.y_stride = out;
      problem.h_n = h_n.back().data();
      problem.c_n = c_n.back().data();
      cpu::forward(&problem, 1, 1, on_threads);
      if (residual && i > 0)
        for (std::size_t k = 0; k < y.size(); ++k) y[k] += below[k];
      below = y;
    }
    return Values(below.begin(), below.end());
  }

  static void copy(const Values& from, std::vector<T>& to, std::int64_t at) {
    for (std::size_t k = 0; k < from.size(); ++k) to[std::size_t(at) + k] = T(from[k]);
  }
  static Values values(const Matrix<T>& from, std::int64_t size) {
    return Values(from.data(), from.data() + size);
  }
  static void compare(const std::vector<T>& found, const Values& expected, const char* name) {
    if (found.size() != expected.size()) fail(std::string(name) + " has another size");
    for (std::size_t k = 0; k < found.size(); ++k)
      if (!(std::abs(double(found[k]) - expected[k]) <= (sizeof(T) == 4 ? 2e-4 : 1e-10)))
        fail(std::string(name) + " differs at " + std::to_string(k));
  }
};

template <class T>
void check_serial_stacks() {
  for (const fastrnn::CellInfo& info : fastrnn::kCells) {
    if (!cpu::StackShape::supports(info)) continue;
    SerialStackCheck<T>{info.kind, 13, 21, 0, 1, 1, false}.check();
    SerialStackCheck<T>{info.kind, 21, 21, 0, 3, 1, false}.check();
    SerialStackCheck<T>{info.kind, 13, 21, 0, 3, 3, true}.check();
    SerialStackCheck<T>{info.kind, 21, 21, 0, 2, 2, false}.check();
    if (info.projects) SerialStackCheck<T>{info.kind, 9, 30, 7, 2, 3, true}.check();
  }
}

// Two threads call one session: one call may be turned away, and none may see half a state. Each
// thread also steps a session of its own.
void check_sessions_of_threads() {
  const cpu::StackShape shape{CellKind::kLstm, 2, 1, 6, 10, 0, false};
  const SerialStackCheck<float> layers{CellKind::kLstm, 6, 10, 0, 2, 2, false};
  std::vector<Checker<float>::Weights> own;
  std::vector<fastrnn::LayerWeights<float>> weights;
  for (const auto& layer : layers.layers)
    own.emplace_back(Checker<float>{*layer, 1}, layer->directions[0]);
  for (const auto& weight : own) weights.push_back(weight.pointers());
  cpu::Session<float> shared(shape, 2, 1);
  shared.pack(weights.data());
  const auto use = [&] {
    cpu::Session<float> alone(shape, 2, 1);
    alone.pack(weights.data());
    const std::vector<float> x(2 * 6 * 40, 0.5f);
    std::vector<float> y(2 * 10 * 40), h(std::size_t(alone.h_size())),
        c(std::size_t(alone.c_size()));
    for (int round = 0; round < 200; ++round) {
      for (cpu::Session<float>* session : {&alone, &shared}) {
        try {
          session->step(x.data(), y.data());
          session->run(x.data(), 40, y.data(), false);
          session->read_states(h.data(), c.data());
          session->write_rows(1, 2, h.data(), c.data());
        } catch (const cpu::SessionBusy&) {
          if (session == &alone) fail("a session of one thread was busy");
        }
      }
    }
  };
  std::thread other(use);
  use();
  other.join();
}

// A linear recurrence and its gradients, compared with the loop that defines them.
template <class T>
void check_scan(std::int64_t steps, std::int64_t columns, bool reverse, bool from_zeros,
                bool needs_d_a) {
  std::mt19937 engine{std::uint32_t(steps * 31 + columns)};
  std::uniform_real_distribution<double> factors(-0.95, 0.95), terms(-1.0, 1.0);
  const std::size_t size = std::size_t(steps * columns);
  Values a(size), b(size), d_h(size), h0(columns);
  for (double& value : a) value = to_double(from_double<T>(factors(engine)));
  for (Values* values : {&b, &d_h, &h0})
    for (double& value : *values) value = to_double(from_double<T>(terms(engine)));
  if (from_zeros) h0.assign(h0.size(), 0.0);

  const fastrnn::ScanShape shape{steps, columns, reverse};
  Values h(size), d_a(size), d_b(size), d_h0(columns);
  for (std::int64_t column = 0; column < columns; ++column) {
    double state = h0[std::size_t(column)];
    for (std::int64_t step = 0; step < steps; ++step) {
      const std::size_t at = std::size_t(shape.row(step) * columns + column);
      d_a[at] = state;  // the state before, until the second loop
      h[at] = state = a[at] * state + b[at];
    }
    double carry = 0;
    for (std::int64_t step = steps - 1; step >= 0; --step) {
      const std::size_t at = std::size_t(shape.row(step) * columns + column);
      d_b[at] = d_h[at] + carry;
      d_a[at] *= d_b[at];
      carry = a[at] * d_b[at];
    }
    d_h0[std::size_t(column)] = carry;
  }

  const double error = sizeof(T) == 2 ? 0.1 : sizeof(T) == 4 ? 1e-4 : 1e-12;
  const Matrix<T> a_in(a, steps, columns), b_in(b, steps, columns), d_h_in(d_h, steps, columns),
      h0_in(h0, 1, columns), h_in(h, steps, columns);
  for (const int threads : thread_counts()) {
    const std::string name = "of a scan with " + std::to_string(threads) + " threads";
    Matrix<T> h_out(steps, columns, columns), d_a_out = h_out, d_b_out = h_out,
                                              d_h0_out(1, columns, columns);
    const T* first = from_zeros ? nullptr : h0_in.data();
    cpu::scan(fastrnn::linear_scan<T>(shape, a_in.data(), b_in.data(), first, h_out.data()),
              threads, on_threads);
    h_out.check(h, error, "h " + name);
    T* d_a_data = needs_d_a ? d_a_out.data() : nullptr;
    cpu::scan_gradients(
        fastrnn::linear_scan_gradients<T>(shape, d_h_in.data(), a_in.data(), h_in.data(), first,
                                          d_a_data, d_b_out.data(), d_h0_out.data()),
        threads, on_threads);
    if (needs_d_a) d_a_out.check(d_a, error, "d_a " + name);
    d_b_out.check(d_b, error, "d_b " + name);
    d_h0_out.check(d_h0, error, "d_h0 " + name);
  }
}

// Cells of layers that are linear in time, with lengths, resets and bias: all numbers of threads
// agree, bit for bit where no chunks of steps are.
template <class T>
void check_scan_cell(fastrnn::ScanCell cell, std::int64_t steps, std::int64_t batch,
                     std::int64_t units, bool reverse) {
  std::mt19937 engine{std::uint32_t(steps * 31 + units)};
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  const auto draw = [&](std::int64_t rows, std::int64_t columns) {
    Values values(std::size_t(rows * columns));
    for (double& value : values) value = uniform(engine);
    return Matrix<T>(values, rows, columns);
  };
  const std::int64_t inputs = fastrnn::kScanCells[int(cell)].inputs, width = inputs * units;
  const std::int64_t rows = steps * batch, columns = batch * units;
  const Matrix<T> pre = draw(rows, width), bias = draw(1, width), d_y = draw(rows, units);
  const Matrix<T> h0 = draw(batch, units), d_h_n = draw(batch, units), reset_h = draw(rows, units);
  std::vector<std::int64_t> lengths(batch, steps);
  lengths.back() = steps / 2;
  std::vector<std::uint8_t> resets(rows);
  for (std::uint8_t& reset : resets) reset = uniform(engine) > 0.5;

  std::vector<Matrix<T>> expected;
  for (const int threads : thread_counts()) {
    const Matrix<T> empty(rows, units, units), state(batch, units, units);
    Matrix<T> h = empty, y = empty, h_n = state, d_pre(rows, width, width), d_h0 = state;
    Matrix<fastrnn::ScanSum<T>> d_reset_h(Values(std::size_t(rows * units), 0.0), rows, units);
    const auto fill = [&](auto& problem) {
      problem.shape = {steps, columns, reverse, batch};
      problem.cell = cell;
      problem.positive = reverse;
      for (std::int64_t i = 0; i < inputs; ++i)
        problem.in[i] = {pre.data() + i * units, width, bias.data() + i * units};
      problem.h0 = h0.data();
      problem.h = h.data();
      problem.marks = {lengths.data(), resets.data(), reset_h.data(), columns};
    };
    fastrnn::Scan<T> forward{};
    fill(forward);
    forward.y = y.data();
    forward.h_n = h_n.data();
    cpu::scan(forward, threads, on_threads);
    fastrnn::ScanGradients<T> backward{};
    fill(backward);
    backward.d_y = d_y.data();
    backward.d_h_n = d_h_n.data();
    for (std::int64_t i = 0; i < inputs; ++i) backward.d_in[i] = {d_pre.data() + i * units, width};
    backward.d_h0 = d_h0.data();
    backward.d_reset_h = d_reset_h.data();
    cpu::scan_gradients(backward, threads, on_threads);
    if (!fastrnn::kScanCells[int(cell)].has_output) y = h;
    std::vector<Matrix<T>> results{h, y, h_n, d_pre, d_h0};
    if (expected.empty()) expected = results;
    for (std::size_t k = 0; k < results.size(); ++k) {
      const Matrix<T>& want = expected[k];
      Values values;
      const std::int64_t count = k == 2 || k == 4 ? columns : k == 3 ? rows * width : rows * units;
      for (std::int64_t i = 0; i < count; ++i) values.push_back(to_double(want.data()[i]));
      results[k].check(values, sizeof(T) == 8 ? 1e-9 : 1e-2,
                       "result " + std::to_string(k) + " of a cell of scans");
    }
  }
}

template <class T>
void check_scans() {
  check_scan<T>(0, 5, false, false, true);
  check_scan<T>(1, 1, true, true, true);
  check_scan<T>(7, 37, false, false, true);   // in registers
  check_scan<T>(5, 4099, true, true, false);  // states in a buffer
  constexpr std::int64_t kFewColumns = 288 / sizeof(T);
  const int most = thread_counts().back();
  if (cpu::make_scan_plan({63, 9000, false}, fastrnn::ScanCell::kLinear, sizeof(T), most).groups <
      2)
    fail("no scan is divided into groups of columns");
  if (most > 2 &&
      cpu::make_scan_plan({9000, kFewColumns, true}, fastrnn::ScanCell::kLinear, sizeof(T), most)
              .chunks < 2)
    fail("no scan is divided into chunks of steps");
  check_scan<T>(63, 9000, false, false, true);
  check_scan<T>(9000, kFewColumns, true, false, true);
  using fastrnn::ScanCell;
  for (const ScanCell cell : {ScanCell::kMinGru, ScanCell::kMinLstm, ScanCell::kSru}) {
    check_scan_cell<T>(cell, 7, 3, 37, false);
    check_scan_cell<T>(cell, 200, 5, 131, true);   // groups of columns
    check_scan_cell<T>(cell, 6000, 2, 11, false);  // chunks of steps, forward
  }
}

// Calls from two threads at once, as from two threads of Python.
void check_two_callers() {
  const Layer& lower = layer_of(CellKind::kLstm, cases()[3]);
  const Layer& upper = layer_of(CellKind::kGru, kShared);
  const int threads = thread_counts().back();
  std::thread other([&] {
    for (int round = 0; round < 20; ++round)
      Checker<float>{lower, threads, false, on_threads, nullptr, true}.all(
          {&lower.directions[0], &lower.directions[1]});
  });
  for (int round = 0; round < 4; ++round)
    Checker<double>{upper, threads, false, on_threads, nullptr, true}.all(
        {&upper.directions[round % 2]});
  other.join();
}

template <class Call>
void expect_interruption(const char* name, Call call) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()) == cpu::kInterrupted) return;
    fail(std::string(name) + " threw " + error.what());
  }
  fail(std::string(name) + " was not interrupted");
}

// Calls of a long sequence, which ask after 100 ms whether to give up. The slowest instruction set
// takes longer than that.
void check_interruption() {
  constexpr std::int64_t kInputs = 512, kHidden = 128, kSteps = 200'000;
  const Case sizes{"long", kInputs, kHidden, 0, {kSteps}};
  std::vector<std::int64_t> offset, active(std::size_t(kSteps), 1);
  for (std::int64_t t = 0; t < kSteps; ++t) offset.push_back(t);
  const std::vector<float> w(kHidden * kInputs), bias(kHidden), x(kInputs), h0(kHidden);
  std::vector<float> y(kSteps * kHidden), h_n(kHidden), d_pre(kSteps * kHidden), d_h0(kHidden);
  std::vector<float> d_w_ih(kHidden * kInputs), d_w_hh(kHidden * kHidden), d_b(kHidden);
  fastrnn::LayerWeights<float> weights{};
  weights.w_ih = weights.w_hh = w.data();
  weights.b_ih = weights.b_hh = bias.data();
  weights.w_ih_stride = kInputs;
  weights.w_hh_stride = kHidden;

  fastrnn::LayerForward<float, float> forward{};
  forward.shape = layer_shape(CellKind::kRnnTanh, sizes, false, offset, active);
  forward.weights = weights;
  forward.x = x.data();
  forward.x_stride = 0;  // all steps read one row
  forward.h0 = h0.data();
  forward.y = y.data();
  forward.y_stride = kHidden;
  forward.h_n = h_n.data();
  fastrnn::LayerBackward<float, float> backward{};
  backward.shape = forward.shape;
  backward.weights = weights;
  backward.h0 = h0.data();
  backward.y = y.data();
  backward.y_stride = kHidden;
  backward.d_pre = d_pre.data();
  backward.d_h0 = d_h0.data();
  fastrnn::LayerGradients<float> gradients{};
  gradients.shape = forward.shape;
  gradients.w_ih = w.data();
  gradients.w_ih_stride = kInputs;
  gradients.x = x.data();
  gradients.x_stride = 0;
  gradients.h0 = h0.data();
  gradients.y = y.data();
  gradients.y_stride = kHidden;
  gradients.rows = {0, forward.shape.sequence.total_rows()};
  gradients.d_pre = d_pre.data();
  gradients.d_w_ih = d_w_ih.data();
  gradients.d_w_hh = d_w_hh.data();
  gradients.d_b_ih = d_b.data();

  cpu::set_isa("baseline");
  cpu::set_interrupted([] { return true; });
  for (const int threads : {1, 2}) {
    expect_interruption("forward", [&] { cpu::forward(&forward, 1, threads, on_threads); });
    expect_interruption("backward", [&] { cpu::backward(&backward, 1, threads, on_threads); });
    expect_interruption("gradients", [&] { cpu::gradients(&gradients, 1, threads, on_threads); });
  }
  cpu::set_interrupted(nullptr);
}

// A forked child makes threads of its own for a long call, and none for a short one.
void check_fork() {
  const Layer& longer = layer_of(CellKind::kGru, kShared);
  const Layer& shorter = layer_of(CellKind::kLstm, cases()[3]);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child < 0) fail("fork failed");
  if (child == 0) {
    const int threads = thread_counts().back();
    const int before = parallel_calls.load();
    Checker<float>{longer, threads, false, on_threads, nullptr, true}.all(
        {&longer.directions[0], &longer.directions[1]});
    Checker<float>{shorter, threads, false, on_threads, nullptr, true}.all(
        {&shorter.directions[1]});
    _exit(parallel_calls.load() == before ? 0 : 2);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
    fail("the forked process failed with status " + std::to_string(status));
}

void require(const std::set<std::string>& rules, bool half_weights) {
  std::string missing;
  for (const char* rule :
       {"unit groups", "row groups", "packed weights", "unpacked weights", "input in the step",
        "input ahead of the step", "shared blocks", "two directions at once", "two layers at once"})
    if (rules.count(rule) == 0) missing += std::string("; ") + rule;
  if (half_weights && rules.count("half weights") == 0) missing += "; half weights";
  if (!missing.empty()) fail(cpu::isa_in_use() + " ran no case with " + missing.substr(2));
}

void plant(const std::string& mistake) {
  const Layer& layer = layer_of(CellKind::kGru, cases()[3]);
  const std::int64_t hidden = layer.sizes.hidden_size, inputs = layer.sizes.input_size;
  const Direction& d = layer.directions[0];
  const Checker<float> checker{layer, 1};
  const Checker<float>::Weights weights(checker, d);
  const Matrix<float> x(layer.x, layer.rows, inputs), h0(d.h0, layer.batch(), hidden);
  const std::size_t bytes = layer.step_rows.size() * sizeof(std::int64_t);
  std::vector<char> shifted(bytes + 1);
  std::memcpy(shifted.data() + 1, layer.step_rows.data(), bytes);
  Matrix<float> y(layer.rows, hidden, hidden), h_n(layer.batch(), hidden, hidden);
  Matrix<float> other_h_n = h_n;
  fastrnn::LayerForward<float, float> problem{};
  problem.shape = layer.shape(false);
  problem.weights = weights.pointers();
  problem.x = x.data();
  problem.x_stride = inputs;
  problem.h0 = h0.data();
  problem.h_n = h_n.data();
  problem.y_stride = hidden;
  if (mistake == "overflow") y.drop_last();
  if (mistake == "misaligned")
    problem.shape.sequence.step_rows = reinterpret_cast<std::int64_t*>(shifted.data() + 1);
  problem.y = y.data();
  if (mistake == "race") {
    auto other = problem;
    other.h_n = other_h_n.data();
    std::atomic<int> ready{0};
    auto repeat = [&ready](const auto& call) {
      ++ready;
      while (ready.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
      for (int round = 0; round < 100; ++round) cpu::forward(&call, 1, 1, on_threads);
    };
    std::thread thread([&] { repeat(other); });
    repeat(problem);
    thread.join();
  } else {
    cpu::forward(&problem, 1, 1, on_threads);
  }
}

// Most layers of the cases have more weights, so they run with the plans for a slow L3.
constexpr std::int64_t kSlowCacheBoundary = 4 * 1024;

void check_all(const std::string& skipped_isa) {
  for (const std::string& isa : cpu::available_isas()) {
    if (isa == skipped_isa) continue;
    cpu::set_isa(isa);
    cpu::set_slow_cache_boundary(0);
    for (const bool in_double : {false, true}) {
      if (in_double && kOnlyRaces) continue;
      std::set<std::string> rules;
      in_double ? check_layers<double>(rules) : check_layers<float>(rules);
      in_double ? check_stack<double>(rules) : check_stack<float>(rules);
      in_double ? check_serial_stacks<double>() : check_serial_stacks<float>();
      in_double ? check_scans<double>() : check_scans<float>();
      require(rules, !in_double && isa != "baseline");
    }
    cpu::set_slow_cache_boundary(kSlowCacheBoundary);
    std::set<std::string> rules;
    check_layers<float>(rules);
    if (rules.count("prefetched panels") == 0) fail(isa + " ran no case with prefetched panels");
    check_scans<Bfloat16>();
    check_two_callers();
    check_sessions_of_threads();
    std::printf("%s: every layer agrees, with %d calls on several threads so far\n", isa.c_str(),
                parallel_calls.load());
    std::fflush(stdout);
  }
  check_interruption();
  check_fork();
  cpu::release_cached_buffers();
}

}  // namespace
}  // namespace sanitize

int main(int count, char** arguments) {
  if (count == 3 && std::string(arguments[1]) == "--plant") {
    sanitize::plant(arguments[2]);
  } else if (count == 3 && std::string(arguments[1]) == "--skip") {
    sanitize::check_all(arguments[2]);
  } else if (count == 1) {
    sanitize::check_all("");
  } else {
    std::fprintf(stderr, "usage: driver [--plant overflow|misaligned|race] [--skip ISA]\n");
    return 2;
  }
  std::puts("driver: no difference found");
}
