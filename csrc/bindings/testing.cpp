// fastrnn._C._testing: what the tests set up or observe and no user needs.
#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/api.h"
#include "cpu/bfloat16.h"
#include "cpu/int8.h"
#include "cpu/panels.h"
#include "cpu/runtime/buffer_cache.h"
#include "cpu/runtime/cache.h"
#include "cpu/runtime/thread_budget.h"

namespace py = pybind11;

namespace fastrnn::bindings {
namespace {

std::vector<double> simulate_backoff(const std::vector<std::pair<double, double>>& calls) {
  using Clock = fastrnn::cpu::ContentionBackoff::Clock;
  const auto ms = [](double count) {
    return std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double, std::milli>(count));
  };
  fastrnn::cpu::ContentionBackoff contention;
  Clock::time_point begin(ms(1));
  std::vector<double> result;
  double total = 0;
  for (const auto& [lasted, slept] : calls) {
    check_range("the time that a call took", lasted, 0, 1e9);
    check_range("the time that a rank slept", slept, 0, 1e9);
    check_range("the time that all calls took", total += lasted, 0, 1e9);
    const Clock::time_point end = begin + ms(lasted);
    contention.record(begin, end, ms(slept));
    double backoff = 0;
    while (contention.is_backing_off(end + ms(backoff))) backoff += 1;
    result.push_back(backoff);
    begin = end + ms(backoff);
  }
  return result;
}

// A ParallelFor with a thread for each piece.
void on_threads(std::int64_t n, void (*body)(std::int64_t, std::int64_t, void*), void* context) {
  std::vector<std::thread> others;
  for (std::int64_t i = 1; i < n; ++i) others.emplace_back(body, i, i + 1, context);
  body(0, 1, context);
  for (std::thread& other : others) other.join();
}

template <class T>
bool panels_outlive_calls(LayerShape shape, int threads, WeightFormat allowed_format) {
  const std::int64_t steps = shape.sequence.steps, batch = shape.sequence.batch;
  const std::int64_t hidden = shape.hidden_size, out = shape.output_size();
  const std::int64_t gates = cell_info(shape.cell).gates * hidden;
  std::vector<std::int64_t> offsets, rows(std::size_t(steps), batch);
  for (std::int64_t t = 0; t < steps; ++t) offsets.push_back(t * batch);
  shape.sequence.step_offset = offsets.data();
  shape.sequence.step_rows = rows.data();

  std::uint32_t state = 1;  // of a linear congruential generator
  const auto random = [&state](std::int64_t count) {
    std::vector<T> values;
    for (std::int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      values.push_back(T(state) / T(0xffffffffu) - T(0.5));
    }
    return values;
  };
  const std::vector<T> x = random(steps * batch * shape.input_size);
  const std::vector<T> h0 = random(batch * out),
                       c0 = random(batch * cell_info(shape.cell).cell_states() * hidden);
  std::vector<T> w_ih = random(gates * shape.input_size), w_hh = random(gates * out);
  std::vector<T> w_hr = random(shape.proj_size * hidden);
  std::vector<T> b_ih = random(gates), b_hh = random(gates);
  std::vector<T> w_unit = random(cell_info(shape.cell).parameters * hidden);
  std::vector<T> y(x.size() / std::size_t(shape.input_size) * std::size_t(out));
  std::vector<T> h_n(h0.size()), c_n(c0.size());
  LayerForward<T, T> problem{};
  problem.shape = shape;
  problem.weights = {w_ih.data(),      w_hh.data(), b_ih.data(), b_hh.data(),  w_hr.data(),
                     shape.input_size, out,         hidden,      w_unit.data()};
  problem.x = x.data();
  problem.x_stride = shape.input_size;
  problem.h0 = h0.data();
  problem.c0 = c0.data();
  problem.y = y.data();
  problem.y_stride = out;
  problem.h_n = h_n.data();
  problem.c_n = c_n.data();

  problem.recurrent_format = allowed_format;

  threads = std::min(threads, cpu::usable_cpus());
  const cpu::Plan plan =
      cpu::make_plan(shape, cpu::Pass::kForward, int(sizeof(T)), threads, 1, allowed_format);
  if (!plan.packed) throw py::value_error("the plan must pack the weights");
  const T nan = std::numeric_limits<T>::quiet_NaN();
  cpu::forward(&problem, 1, threads, on_threads);
  const std::vector<T> expected = y;
  cpu::Workspace panels(std::size_t(cpu::panel_size(shape, plan)) * sizeof(T));
  cpu::pack_panels(shape, problem.weights, plan, static_cast<T*>(panels.data()));
  for (std::vector<T>* weights : {&w_ih, &w_hh, &w_hr, &b_ih, &b_hh})
    std::fill(weights->begin(), weights->end(), nan);  // later calls must not read them
  const cpu::PackedForward<T> packed{problem, static_cast<T*>(panels.data())};
  for (int call = 0; call < 2; ++call) {
    std::fill(y.begin(), y.end(), nan);
    cpu::forward_packed(&packed, 1, plan, threads, on_threads);
    if (std::memcmp(y.data(), expected.data(), y.size() * sizeof(T)) != 0) return false;
  }
  return std::all_of(expected.begin(), expected.end(),
                     [](T value) { return std::isfinite(value); });
}

bool panels_outlive_calls_of(const std::string& cell, std::int64_t steps, std::int64_t batch,
                             std::int64_t input_size, std::int64_t hidden_size,
                             std::int64_t proj_size, const std::string& dtype, int threads,
                             const std::string& weight_format) {
  check_size("input_size", input_size, 1);
  check_size("threads", threads, 1);
  const LayerShape shape = shape_of(cell, steps, batch, input_size, hidden_size, proj_size, 1);
  const WeightFormat allowed = weight_format_named(weight_format);
  return dtype == "float64" ? panels_outlive_calls<double>(shape, threads, allowed)
                            : panels_outlive_calls<float>(shape, threads, allowed);
}

void set_l2_kb(const std::optional<int>& kilobytes) {
  if (kilobytes) check_size("kilobytes", *kilobytes, 0);
  cpu::set_slow_cache_boundary(kilobytes ? std::int64_t(*kilobytes) * 1024 : -1);
}

// sum_k bytes q - zero_points sums of the kernels in use, as the bytes of int32 [rows, gates, 16].
py::bytes int8_sums(const std::string& bytes, const std::vector<std::int32_t>& zero_points,
                    const std::string& panel, int gates) {
  const auto rows = std::int64_t(zero_points.size());
  const std::int64_t width = gates * kInt8Units;
  if (gates != 1 && gates != 3 && gates != 4)
    throw py::value_error("gates must be 1, 3 or 4, got " + std::to_string(gates));
  const std::int64_t quads = std::int64_t(panel.size()) / (width * kInt8Depth);
  check_size("the number of zero points", rows, 1);
  check_size("the number of columns", quads * kInt8Depth, 1, kInt8MostColumns);
  if (std::int64_t(panel.size()) != quads * width * kInt8Depth ||
      std::int64_t(bytes.size()) != rows * quads * kInt8Depth)
    throw py::value_error("panel must hold whole columns, and bytes as many columns per row");
  for (const std::int32_t zero_point : zero_points) check_size("a zero point", zero_point, 0, 255);
  std::vector<std::int32_t> sums(std::size_t(width), 0);
  for (std::size_t i = 0; i < panel.size(); ++i)
    sums[i / kInt8Depth % std::size_t(width)] += static_cast<std::int8_t>(panel[i]);
  std::vector<std::int32_t> out(std::size_t(rows * width));
  cpu::int8_sums(reinterpret_cast<const std::uint8_t*>(bytes.data()), zero_points.data(), rows,
                 reinterpret_cast<const std::int8_t*>(panel.data()), sums.data(), quads, gates,
                 out.data());
  return py::bytes(reinterpret_cast<const char*>(out.data()), out.size() * sizeof(out[0]));
}

void set_int8_kernels(const std::optional<std::string>& name) {
  if (!cpu::set_int8_kernels(name.value_or("")))
    throw py::value_error("name must be one of available_int8_kernels(), got '" + *name + "'");
}

void set_bfloat16_kernels(const std::optional<std::string>& name) {
  if (!cpu::set_bfloat16_kernels(name.value_or("")))
    throw py::value_error("name must be float32 or one of available_bfloat16_kernels(), got '" +
                          *name + "'");
}

}  // namespace

void define_testing(py::module_& m) {
  m.doc() = "Hooks for the tests of fastrnn.";
  m.def("quota_cpus", &cpu::quota_cpus, py::arg("membership") = "/proc/self/cgroup",
        py::arg("root") = "/sys/fs/cgroup",
        "Number of CPUs in the control group's quota, rounded up; 0: no limit.");
  m.def("peak_threads", &cpu::peak_threads,
        "Largest number of CPU threads that calls had at once since the last time it was asked.");
  m.def("simulate_backoff", &simulate_backoff, py::arg("calls"),
        "Back-off time in ms after each of the given calls of a team, each a pair of its duration "
        "in ms and the time in ms that a rank slept.");
  m.def("panels_outlive_calls", &panels_outlive_calls_of, py::arg("cell"), py::arg("steps"),
        py::arg("batch"), py::arg("input_size"), py::arg("hidden_size"), py::arg("proj_size") = 0,
        py::arg("dtype") = "float32", py::arg("threads") = 1, py::arg("weight_format") = "native",
        "Whether forward, with panels that were packed once, gives the bits of a call that packs "
        "its own, also after the weights have changed.");
  m.def("set_l2_kb", &set_l2_kb, py::arg("kilobytes"),
        "Makes plans for an L2 of this size before a slow L3; 0: for a fast L3; None: for this "
        "machine.");
  m.def("available_bfloat16_kernels", &cpu::available_bfloat16_kernels,
        "Bfloat16 kernels that this machine can run, the slowest first.");
  m.def("set_bfloat16_kernels", &set_bfloat16_kernels, py::arg("name"),
        "Forces bfloat16 kernels for all shapes, together with set_isa for theirs; float32: forces "
        "float32 copies; None: restores the choice.");
  m.def("available_int8_kernels", &cpu::available_int8_kernels,
        "Int8 kernels that this machine can run, the slowest first, except for emulated ones.");
  m.def("set_int8_kernels", &set_int8_kernels, py::arg("name"),
        "Forces int8 kernels for all shapes; None restores the choice.");
  m.def("int8_sums", &int8_sums, py::arg("bytes"), py::arg("zero_points"), py::arg("panel"),
        py::arg("gates"),
        "Integer sums of the int8 kernels in use for rows of bytes and one block of a panel, as "
        "the bytes of int32 [rows, gates, 16].");
  m.def("fresh_buffers", &cpu::fresh_buffers,
        "Number of CPU buffers that were allocated since the process started.");
}

}  // namespace fastrnn::bindings
