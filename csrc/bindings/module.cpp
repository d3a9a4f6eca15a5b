// fastrnn._C: what the kernels' library knows of itself, for Python. No tensors and no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu/api.h"
#include "cpu/runtime/buffer_cache.h"
#include "cpu/runtime/thread_budget.h"
#include "cuda/plan.h"

namespace py = pybind11;

namespace {

using fastrnn::CellInfo;

std::optional<std::string> if_any(const std::string& text) {
  return text.empty() ? std::nullopt : std::optional(text);
}

py::dict build_info() {
  std::vector<std::string> archs;
  std::istringstream list(FASTRNN_CUDA_ARCHS);
  for (std::string arch; std::getline(list, arch, ';');) archs.push_back(arch);
  py::dict info;
  info["version"] = FASTRNN_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch_built_against"] = FASTRNN_TORCH_VERSION;
  info["isas"] = fastrnn::cpu::compiled_isas();
  info["cuda"] = !std::string(FASTRNN_CUDA_VERSION).empty();
  info["cuda_version"] = if_any(FASTRNN_CUDA_VERSION);
  info["cuda_archs"] = archs;
  return info;
}

void set_isa(const std::optional<std::string>& name) {
  if (fastrnn::cpu::set_isa(name.value_or(""))) return;
  std::string known;
  for (const std::string& isa : fastrnn::cpu::available_isas())
    known += (known.empty() ? "" : ", ") + isa;
  throw py::value_error("isa must be None or one of " + known + ", got '" + name.value_or("") +
                        "'");
}

const CellInfo& find_cell(const std::string& name) {
  std::string known;
  for (const CellInfo& info : fastrnn::kCells) {
    if (name == info.name) return info;
    known += std::string(known.empty() ? "" : ", ") + info.name;
  }
  throw py::value_error("cell must be one of " + known + ", got '" + name + "'");
}

int element_bytes(const std::string& dtype) {
  if (dtype == "float64") return 8;
  if (dtype == "float32") return 4;
  if (dtype == "float16" || dtype == "bfloat16") return 2;
  throw py::value_error("dtype must be one of float16, bfloat16, float32, float64, got '" + dtype +
                        "'");
}

constexpr std::int64_t kMostOfASize = std::numeric_limits<std::int32_t>::max();

void check_size(const char* name, std::int64_t value, std::int64_t least,
                std::int64_t most = kMostOfASize) {
  if (value < least || value > most)
    throw py::value_error(
        std::string(name) + " must be at " + (value < least ? "least " : "most ") +
        std::to_string(value < least ? least : most) + ", got " + std::to_string(value));
}

// NaN is in no range.
void check_range(const char* name, double value, double least, double most) {
  if (value >= least && value <= most) return;
  char text[160];
  std::snprintf(text, sizeof(text), "%s must be from %g to %g, got %g", name, least, most, value);
  throw py::value_error(text);
}

void set_max_threads(std::int64_t threads) {
  check_size("threads", threads, 0);
  fastrnn::cpu::set_max_threads(int(threads));
}

double fma_peak(std::int64_t threads, double seconds) {
  check_size("threads", threads, 1, 4096);
  check_range("seconds", seconds, 1e-6, 60.0);
  const py::gil_scoped_release others_may_run;
  return fastrnn::cpu::fma_peak(int(threads), seconds);
}

fastrnn::LayerShape shape_of(const std::string& cell, std::int64_t steps, std::int64_t batch,
                             std::int64_t input_size, std::int64_t hidden_size,
                             std::int64_t proj_size, std::int64_t directions) {
  const CellInfo& info = find_cell(cell);
  check_size("steps", steps, 0);
  check_size("batch", batch, 0);
  check_size("input_size", input_size, 0);
  check_size("hidden_size", hidden_size, 1);
  check_size("proj_size", proj_size, 0);
  check_size("directions", directions, 1, 2);
  if (proj_size > 0 && info.states != 2)
    throw py::value_error("proj_size must be 0 for " + cell + ", got " + std::to_string(proj_size));
  const double products = double(steps) * double(batch) * double(info.gates) * double(hidden_size) *
                          double(2 * input_size + hidden_size + proj_size + 1);
  check_range("the number of multiply-adds", products, 0, double(std::int64_t(1) << 60));
  const fastrnn::Sequence sequence = {steps, batch, false, nullptr, nullptr};
  return {info.kind, sequence, input_size, hidden_size, proj_size};
}

py::dict cuda_plan(const std::string& cell, std::int64_t steps, std::int64_t batch,
                   std::int64_t input_size, std::int64_t hidden_size, std::int64_t proj_size,
                   const std::string& dtype, bool training, std::int64_t directions, bool tf32,
                   const std::optional<std::string>& schedule, std::int64_t capability,
                   std::int64_t multiprocessors, std::int64_t shared_bytes) {
  using namespace fastrnn::cuda;
  const fastrnn::LayerShape shape =
      shape_of(cell, steps, batch, input_size, hidden_size, proj_size, directions);
  check_size("capability", capability, 0);
  check_size("multiprocessors", multiprocessors, 0);
  check_size("shared_bytes", shared_bytes, 0);
  Arithmetic arithmetic = tf32 ? Arithmetic::kTf32 : Arithmetic::kFloat32;
  if (element_bytes(dtype) == 2)
    arithmetic = dtype == "float16" ? Arithmetic::kFloat16 : Arithmetic::kBFloat16;
  if (element_bytes(dtype) == 8) arithmetic = Arithmetic::kFloat64;
  Choice choice;
  try {
    choice = choice_named(schedule ? schedule->c_str() : std::getenv("FASTRNN_SCHEDULE"));
  } catch (const std::exception& error) {
    throw py::value_error(error.what());
  }
  const Plan chosen =
      make_plan({shape, int(directions), training ? Pass::kBackward : Pass::kForward, arithmetic,
                 Chip{int(capability), int(multiprocessors), int(shared_bytes)}, choice});
  py::dict result;
  result["schedule"] = chosen.schedule->name;
  result["chunk_rows"] = chosen.chunk_rows;
  if (chosen.schedule->schedule == Schedule::kPersistent) {
    const Tiling& tiling = chosen.tiling;
    result["tensor_cores"] = tiling.tensor_cores;
    result["units"] = tiling.units;
    result["unit_blocks"] = tiling.unit_blocks;
    result["output_blocks"] = tiling.output_blocks;
    result["row_tiles"] = tiling.row_tiles;
    result["row_groups"] = tiling.row_groups;
    result["blocks"] = tiling.blocks;
    result["shared_bytes"] = tiling.shared_bytes;
  }
  return result;
}

py::dict plan(const std::string& cell, std::int64_t steps, std::int64_t batch,
              std::int64_t input_size, std::int64_t hidden_size, std::int64_t proj_size,
              const std::string& dtype, std::int64_t threads, bool training,
              std::int64_t directions, bool half_weights, std::int64_t layers) {
  const fastrnn::LayerShape shape =
      shape_of(cell, steps, batch, input_size, hidden_size, proj_size, directions);
  const int bytes = element_bytes(dtype);
  check_size("threads", threads, 1);
  check_size("layers", layers, 1);
  py::dict result;
  const auto pass = training ? fastrnn::cpu::Pass::kBackward : fastrnn::cpu::Pass::kForward;
  const fastrnn::cpu::Plan chosen =
      // half types: in float32
      fastrnn::cpu::make_plan(shape, pass, std::max(bytes, 4), int(threads), int(directions),
                              half_weights && dtype == "float32");
  result["schedule"] = "persistent";
  result["isa"] = chosen.isa;
  result["vector_lanes"] = chosen.vector_lanes;
  result["threads"] = chosen.threads;
  result["together"] = chosen.together;
  result["row_groups"] = chosen.row_groups;
  result["unit_groups"] = chosen.unit_groups;
  result["unit_vectors"] = chosen.unit_vectors;
  result["back_vectors"] = chosen.back_vectors;
  result["packed"] = chosen.packed;
  result["half_weights"] = chosen.half_weights;
  result["input"] = chosen.input_fused ? "fused" : "ahead";
  result["shared"] = chosen.shared;
  result["chunk_rows"] = chosen.chunk_rows;
  result["stacked"] = false;
  if (layers > 1 && directions == 1 && !training && !half_weights && bytes >= 4) {
    fastrnn::LayerShape upper = shape;
    upper.input_size = shape.output_size();
    fastrnn::cpu::Plan pair[2];
    result["stacked"] = fastrnn::cpu::make_stacked_plans(shape, upper, bytes, int(threads), pair);
  }
  return result;
}

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

// What a signal's handler raised during a call that it ended, until raise_interruption.
PyObject* interruption = nullptr;

// Runs the handlers of signals that have arrived, on Python's main thread alone; true: one raised.
bool interrupted() {
  if (syscall(SYS_gettid) != getpid() || !Py_IsInitialized()) return false;
  const PyGILState_STATE state = PyGILState_Ensure();
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);  // of the caller, if any: not for the handlers
  const bool raised = PyErr_CheckSignals() != 0;
  if (raised) {
    PyObject *own_type, *own_value, *own_traceback;
    PyErr_Fetch(&own_type, &own_value, &own_traceback);
    PyErr_NormalizeException(&own_type, &own_value, &own_traceback);
    if (own_traceback != nullptr) PyException_SetTraceback(own_value, own_traceback);
    Py_XDECREF(interruption);
    interruption = own_value;
    Py_XDECREF(own_type);
    Py_XDECREF(own_traceback);
  }
  PyErr_Restore(type, value, traceback);
  PyGILState_Release(state);
  return raised;
}

// Takes the exception out, so that nothing raises it twice.
void raise_interruption(const std::string& message) {
  if (interruption == nullptr || message.find(fastrnn::cpu::kInterrupted) == std::string::npos)
    return;
  PyObject* exception = interruption;
  interruption = nullptr;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception)), exception);
  Py_DECREF(exception);
  throw py::error_already_set();
}

py::dict cells() {
  py::dict all;
  for (const CellInfo& info : fastrnn::kCells) {
    py::dict cell;
    cell["gates"] = info.gates;
    cell["pre"] = info.pre;
    cell["saved"] = info.saved;
    cell["states"] = info.states;
    cell["pre_x"] = std::vector<int>(info.pre_x, info.pre_x + info.gates);
    cell["pre_h"] = std::vector<int>(info.pre_h, info.pre_h + info.gates);
    all[info.name] = cell;
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, CPU capability and plans of the fastrnn kernels.";
  m.def("build_info", &build_info, "What this build is made of.");
  m.def("available_isas", &fastrnn::cpu::available_isas,
        "Instruction sets that were compiled in and run here, worst first.");
  m.def("cpu_capability", &fastrnn::cpu::isa_in_use, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Forces an instruction set; None goes back to FASTRNN_ISA or the best.");
  m.def("usable_cpus", &fastrnn::cpu::usable_cpus,
        "CPUs that this thread may use: its affinity and the control group's quota.");
  m.def("quota_cpus", &fastrnn::cpu::quota_cpus, py::arg("membership") = "/proc/self/cgroup",
        py::arg("root") = "/sys/fs/cgroup",
        "CPUs that the control group's quota amounts to, rounded up; 0: no limit.");
  m.def("max_threads", &fastrnn::cpu::max_threads, "Upper bound of a call's threads, 0: none.");
  m.def("check_settings", &fastrnn::cpu::check_settings,
        "Raises ValueError where an environment variable has a value that it cannot have.");
  m.def("set_max_threads", &set_max_threads, py::arg("threads"),
        "Bounds the threads of every call; 0 takes the bound away.");
  m.def("kept_bytes", &fastrnn::cpu::kept_bytes,
        "Bytes of CPU buffers that are kept ready for the next call.");
  m.def("release_kept_buffers", &fastrnn::cpu::release_kept_buffers,
        "Gives the kept CPU buffers back to the system.");
  m.def("fresh_buffers", &fastrnn::cpu::fresh_buffers,
        "Number of CPU buffers that were allocated since the process started.");
  m.def("plan", &plan, py::arg("cell"), py::arg("steps"), py::arg("batch"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("proj_size") = 0, py::arg("dtype") = "float32",
        py::arg("threads") = 1, py::arg("training") = false, py::arg("directions") = 1,
        py::arg("half_weights") = false, py::arg("layers") = 1,
        "How the CPU would walk a layer of this shape through time (training: its backward pass).");
  m.def("cuda_plan", &cuda_plan, py::arg("cell"), py::arg("steps"), py::arg("batch"),
        py::arg("input_size"), py::arg("hidden_size"), py::arg("proj_size") = 0,
        py::arg("dtype") = "float32", py::arg("training") = false, py::arg("directions") = 1,
        py::arg("tf32") = false, py::arg("schedule") = py::none(),
        py::arg("capability") = fastrnn::cuda::kH100.major,
        py::arg("multiprocessors") = fastrnn::cuda::kH100.multiprocessors,
        py::arg("shared_bytes") = fastrnn::cuda::kH100.shared_bytes,
        "The same on a GPU, an H100 unless told otherwise; schedule: auto, persistent or stepwise, "
        "None: what FASTRNN_SCHEDULE says.");
  m.def("most_threads", &fastrnn::cpu::most_threads,
        "The most threads of the CPU that calls had together, since this was asked the last time.");
  m.def("alone_after", &alone_after, py::arg("calls"),
        "For how many ms a call sends those after it down one thread, if a team's calls took so "
        "many ms and a rank of it slept so many of them, one call after the other.");
  m.def("fma_peak", &fma_peak, py::arg("threads"), py::arg("seconds"),
        "GFLOP/s of float32 multiply-adds on registers, all threads at once.");
  m.def("cells", &cells, "The registry of cells.");
  m.def("raise_interruption", &raise_interruption, py::arg("message"),
        "Raises what a signal's handler raised, if the message is that of the call it ended.");
  fastrnn::cpu::set_interrupted(interrupted);
}
