// fastrnn._C._testing: what the tests set up or observe and no user needs.
#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "cpu/api.h"
#include "cpu/runtime/buffer_cache.h"
#include "cpu/runtime/thread_budget.h"

namespace py = pybind11;

namespace fastrnn::bindings {
namespace {

std::vector<double> alone_after(const std::vector<std::pair<double, double>>& calls) {
  using Clock = fastrnn::cpu::BusyMachine::Clock;
  const auto ms = [](double count) {
    return std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double, std::milli>(count));
  };
  fastrnn::cpu::BusyMachine machine;
  Clock::time_point begin(ms(1));
  std::vector<double> result;
  double total = 0;
  for (const auto& [lasted, slept] : calls) {
    check_range("the time that a call took", lasted, 0, 1e9);
    check_range("the time that a rank slept", slept, 0, 1e9);
    check_range("the time that all calls took", total += lasted, 0, 1e9);
    const Clock::time_point end = begin + ms(lasted);
    machine.look(begin, end, ms(slept));
    double alone = 0;
    while (machine.noted(end + ms(alone))) alone += 1;
    result.push_back(alone);
    begin = end + ms(alone);
  }
  return result;
}

}  // namespace

void define_testing(py::module_& m) {
  m.doc() = "Hooks for the tests of fastrnn.";
  m.def("quota_cpus", &cpu::quota_cpus, py::arg("membership") = "/proc/self/cgroup",
        py::arg("root") = "/sys/fs/cgroup",
        "Number of CPUs in the control group's quota, rounded up; 0: no limit.");
  m.def("most_threads", &cpu::most_threads,
        "Largest number of CPU threads that calls had at once since the last time it was asked.");
  m.def("alone_after", &alone_after, py::arg("calls"),
        "Back-off time in ms after each of the given calls of a team, each a pair of its duration "
        "in ms and the time in ms that a rank slept.");
  m.def("fresh_buffers", &cpu::fresh_buffers,
        "Number of CPU buffers that were allocated since the process started.");
}

}  // namespace fastrnn::bindings
