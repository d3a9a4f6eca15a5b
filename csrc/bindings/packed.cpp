// fastrnn._C._packed: inference with weights that are packed once. Tensors are
// addresses of contiguous memory, 0 for none: Python has checked them.
#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "cpu/packed_stack.h"
#include "cpu/runtime/thread_pool.h"
#include "cpu/session.h"
#include "torch/slots.h"

namespace py = pybind11;

namespace fastrnn::bindings {
namespace {

using Address = std::uintptr_t;

// Addresses of the weights of each layer and direction, by slot (torch/slots.h).
using Weights = std::vector<std::array<Address, kWeightSlots>>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

cpu::StackShape stack_shape(const std::string& cell, std::int64_t layers, std::int64_t directions,
                            std::int64_t input_size, std::int64_t hidden_size,
                            std::int64_t proj_size, bool residual) {
  check_size("layers", layers, 1);
  const LayerShape layer = shape_of(cell, 1, 1, input_size, hidden_size, proj_size, directions);
  const CellInfo& info = cell_info(layer.cell);
  if (!cpu::StackShape::supports(info))
    throw py::value_error("cell must be one of a public module, got '" + cell + "'");
  return {layer.cell, int(layers), int(directions), input_size, hidden_size, proj_size, residual};
}

template <class T, class Packed>
void pack(Packed& packed, const Weights& addresses) {
  const cpu::StackShape& shape = packed.shape();
  if (std::int64_t(addresses.size()) != shape.states())
    throw py::value_error("weights must have " + std::to_string(shape.states()) + " entries, got " +
                          std::to_string(addresses.size()));
  std::vector<LayerWeights<T>> weights;
  const std::int64_t below = shape.directions * shape.output_size();
  for (const auto& own : addresses) {
    const bool first_layer = std::int64_t(weights.size()) < shape.directions;
    weights.push_back({at<T>(own[kWIh]), at<T>(own[kWHh]), at<T>(own[kBIh]), at<T>(own[kBHh]),
                       at<T>(own[kWHr]), first_layer ? shape.input_size : below,
                       shape.output_size(), shape.hidden_size, nullptr});
  }
  const py::gil_scoped_release others_may_run;
  packed.pack(weights.data());
}

template <class T>
void define_for(py::module_& m, const char* dtype) {
  using Stack = cpu::PackedStack<T>;
  using Session = cpu::Session<T>;
  const std::string suffix = std::string("_") + dtype;

  py::class_<Stack>(m, ("PackedStack" + suffix).c_str(), "Packed weights of stacked layers.")
      .def(py::init([](const std::string& cell, std::int64_t layers, std::int64_t directions,
                       std::int64_t input_size, std::int64_t hidden_size, std::int64_t proj_size,
                       bool residual) {
             return new Stack(stack_shape(cell, layers, directions, input_size, hidden_size,
                                          proj_size, residual),
                              cpu::thread_pool().threads());
           }),
           py::arg("cell"), py::arg("layers"), py::arg("directions"), py::arg("input_size"),
           py::arg("hidden_size"), py::arg("proj_size"), py::arg("residual"))
      .def("pack", &pack<T, Stack>, py::arg("weights"), "Copies the weights.")
      .def(
          "forward",
          [](const Stack& stack, std::int64_t steps, std::int64_t batch, Address x, Address h0,
             Address c0, Address y, Address h_n, Address c_n) {
            const py::gil_scoped_release others_may_run;
            const cpu::ThreadPool pool = cpu::thread_pool();
            stack.forward(
                {steps, batch, at<T>(x), at<T>(h0), at<T>(c0), at<T>(y), at<T>(h_n), at<T>(c_n)},
                pool.threads(), pool.parallel_for);
          },
          "Runs the layers: steps, batch, x, h0, c0, y, h_n, c_n.");

  py::class_<Session>(m, ("Session" + suffix).c_str(), "Packed weights with states.")
      .def(py::init([](const std::string& cell, std::int64_t layers, std::int64_t input_size,
                       std::int64_t hidden_size, std::int64_t proj_size, bool residual,
                       std::int64_t batch, std::int64_t threads) {
             check_size("batch", batch, 1);
             check_size("threads", threads, 1);
             return new Session(
                 stack_shape(cell, layers, 1, input_size, hidden_size, proj_size, residual), batch,
                 int(threads));
           }),
           py::arg("cell"), py::arg("layers"), py::arg("input_size"), py::arg("hidden_size"),
           py::arg("proj_size"), py::arg("residual"), py::arg("batch"), py::arg("threads"))
      .def("pack", &pack<T, Session>, py::arg("weights"), "Copies the weights.")
      .def(
          "step",
          [](Session& session, Address x, Address y) {
            const py::gil_scoped_release others_may_run;
            session.step(at<T>(x), at<T>(y));
          },
          "Runs the next step: x, y.")
      .def(
          "run",
          [](Session& session, Address x, std::int64_t steps, Address y) {
            const py::gil_scoped_release others_may_run;
            session.run(at<T>(x), steps, at<T>(y), true);
          },
          "Runs the next steps: x, steps, y.")
      .def(
          "read_states",
          [](Session& session, Address h, Address c) { session.read_states(at<T>(h), at<T>(c)); },
          "Copies the states to h and c.")
      .def(
          "write_states",
          [](Session& session, Address h, Address c) { session.write_states(at<T>(h), at<T>(c)); },
          "Replaces the states by h and c; 0: zeros.")
      .def(
          "clear_row",
          [](Session& session, std::int64_t row) {
            if (row < 0 || row >= session.batch())
              throw py::value_error("row must be below the batch size");
            session.write_rows(row, row + 1, nullptr, nullptr);
          },
          py::arg("row"), "Sets the states of a sequence to zero.");
}

}  // namespace

void define_packed(py::module_& m) {
  define_for<float>(m, "float32");
  define_for<double>(m, "float64");
}

}  // namespace fastrnn::bindings
