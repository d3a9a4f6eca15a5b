// fastrnn._C: build facts, CPU capability and plans of the kernels' library, for Python. No tensors
// and no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "cells/loop_cells.h"
#include "cpu/api.h"
#include "cpu/runtime/buffer_cache.h"
#include "cpu/runtime/thread_budget.h"
#include "torch/slots.h"

namespace py = pybind11;

namespace fastrnn::bindings {

void check_size(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value < least || value > most)
    throw py::value_error(
        std::string(name) + " must be at " + (value < least ? "least " : "most ") +
        std::to_string(value < least ? least : most) + ", got " + std::to_string(value));
}

void check_range(const char* name, double value, double least, double most) {
  if (value >= least && value <= most) return;
  char text[160];
  std::snprintf(text, sizeof(text), "%s must be from %g to %g, got %g", name, least, most, value);
  throw py::value_error(text);
}

namespace {

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
  info["headers"] = FASTRNN_HEADERS;
  info["kernel_flags"] = FASTRNN_KERNEL_FLAGS;
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

void add_defined_cell(const std::string& path) {
  fastrnn::cpu::add_defined_cell(path, FASTRNN_HEADERS);
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

// What a signal's handler raised during a call that it ended, until raise_interruption.
PyObject* interruption = nullptr;

// Runs the handlers of signals that have arrived, on Python's main thread alone; true:
// one raised.
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

py::dict facts(const CellInfo& info) {
  py::dict cell;
  cell["gates"] = info.gates;
  cell["first_gates"] = fastrnn::first_gates(info);
  cell["pre"] = info.pre;
  cell["saved"] = info.saved;
  cell["states"] = info.states;
  cell["parameters"] = info.parameters;
  cell["dense"] = info.dense;
  cell["projects"] = info.projects;
  cell["reduced"] = info.reduced;
  cell["pre_x"] = std::vector<int>(info.pre_x, info.pre_x + info.gates);
  cell["pre_h"] = std::vector<int>(info.pre_h, info.pre_h + info.gates);
  return cell;
}

py::dict cells() {
  py::dict all;
  for (const CellInfo& info : fastrnn::kCells) all[info.name] = facts(info);
  return all;
}

py::dict loop_cells() {
  py::dict all;
  for (const fastrnn::LoopCell& cell : fastrnn::kLoopCells) all[cell.info.name] = facts(cell.info);
  return all;
}

std::vector<std::string> recurrence_parts() {
  return {std::begin(fastrnn::kRecurrencePartNames), std::end(fastrnn::kRecurrencePartNames)};
}

std::vector<std::string> weight_slots() {
  return {std::begin(fastrnn::kWeightSlotNames), std::end(fastrnn::kWeightSlotNames)};
}

std::vector<std::string> weight_formats() {
  std::vector<std::string> names;
  for (int i = 0; i < kWeightFormatCount; ++i) names.emplace_back(kWeightFormats[i].name);
  return names;
}

py::dict sequence_slots() {
  py::dict all;
  for (int slot = fastrnn::kFirstSequenceSlot; slot < fastrnn::kSequenceSlotsEnd; ++slot)
    all[fastrnn::kSequenceSlotNames[slot - fastrnn::kFirstSequenceSlot]] = slot;
  return all;
}

py::dict output_slots() {
  py::dict all;
  all["recurrent_forward"] = std::vector<std::string>(std::begin(fastrnn::kForwardOutputNames),
                                                      std::end(fastrnn::kForwardOutputNames));
  all["recurrent_gradients"] = std::vector<std::string>(std::begin(fastrnn::kGradientOutputNames),
                                                        std::end(fastrnn::kGradientOutputNames));
  return all;
}

}  // namespace
}  // namespace fastrnn::bindings

PYBIND11_MODULE(_C, m) {
  using namespace fastrnn::bindings;
  m.doc() = "Build facts, CPU capability and plans of the fastrnn kernels.";
  m.def("build_info", &build_info, "What this build is made of.");
  m.def("available_isas", &fastrnn::cpu::available_isas,
        "Instruction sets that were compiled in and run here, worst first.");
  m.def("cpu_capability", &fastrnn::cpu::isa_in_use, "The instruction set in use.");
  m.def("cpu_vendor", &fastrnn::cpu::cpu_vendor, "Vendor of this CPU: amd, intel or other.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Forces an instruction set; None goes back to FASTRNN_ISA or the best.");
  m.def("usable_cpus", &fastrnn::cpu::usable_cpus,
        "CPUs that this thread may use: its affinity and the control group's quota.");
  m.def("max_threads", &fastrnn::cpu::max_threads, "Upper bound of a call's threads, 0: none.");
  m.def("check_settings", &fastrnn::cpu::check_settings,
        "Raises ValueError where an environment variable has a value that it cannot have.");
  m.def("set_max_threads", &set_max_threads, py::arg("threads"),
        "Bounds the threads of every call; 0 takes the bound away.");
  m.def("cached_bytes", &fastrnn::cpu::cached_bytes,
        "Bytes of CPU buffers that are kept ready for the next call.");
  m.def("release_cached_buffers", &fastrnn::cpu::release_cached_buffers,
        "Gives the kept CPU buffers back to the system.");
  m.def("fma_peak", &fma_peak, py::arg("threads"), py::arg("seconds"),
        "GFLOP/s of float32 multiply-adds on registers, all threads at once.");
  m.def("add_defined_cell", &add_defined_cell, py::arg("path"),
        "Adds the cell of a library that fastrnn.define_cell has compiled.");
  m.def("has_defined_cell", &fastrnn::cpu::has_defined_cell, py::arg("name"),
        "Whether a cell was added that has kernels for the instruction set in use.");
  m.def("cells", &cells, "The contract of each cell in the registry.");
  m.def("loop_cells", &loop_cells, "The same of the cells that only time loops with options run.");
  m.def("recurrence_parts", &recurrence_parts,
        "Names of the parts of the operator recurrence, by number.");
  m.def("weight_slots", &weight_slots, "Names of the weight slots of the operators, by number.");
  m.def("weight_formats", &weight_formats,
        "Names of the formats in which the CPU can hold w_hh, by number.");
  m.def("sequence_slots", &sequence_slots,
        "Numbers of the sequence slots of the operators, by name.");
  m.def("output_slots", &output_slots,
        "Names of the results that the argument outputs of an operator asks for, by number.");
  m.def("raise_interruption", &raise_interruption, py::arg("message"),
        "Raises what a signal's handler raised, if the message is that of the call it ended.");
  define_plans(m);
  py::module_ packed = m.def_submodule("_packed");
  define_packed(packed);
  py::module_ testing = m.def_submodule("_testing");
  define_testing(testing);
  fastrnn::cpu::set_interrupted(interrupted);
}
