// fastrnn._C.plan and cuda_plan: how a layer of a given shape would run.
#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>

#include "cpu/api.h"
#include "cpu/bfloat16.h"
#include "cpu/int8.h"
#include "cuda/plan.h"

namespace py = pybind11;

namespace fastrnn::bindings {
namespace {

const CellInfo& find_cell(const std::string& name) {
  const CellInfo* info = fastrnn::cpu::find_cell(name);
  if (info != nullptr) return *info;
  throw py::value_error("cell must be one of " + fastrnn::cpu::cell_names() + ", got '" + name +
                        "'");
}

int element_bytes(const std::string& dtype, bool allows_int8) {
  if (dtype == "int8" && allows_int8) return 1;
  if (dtype == "float64") return 8;
  if (dtype == "float32") return 4;
  if (dtype == "float16" || dtype == "bfloat16") return 2;
  throw py::value_error("dtype must be one of float16, bfloat16, float32, float64" +
                        std::string(allows_int8 ? ", int8" : "") + ", got '" + dtype + "'");
}

py::dict cuda_plan(const std::string& cell, std::int64_t steps, std::int64_t batch,
                   std::int64_t input_size, std::int64_t hidden_size, std::int64_t proj_size,
                   const std::string& dtype, bool training, std::int64_t directions, bool tf32,
                   const std::optional<std::string>& schedule, std::int64_t capability,
                   std::int64_t multiprocessors, std::int64_t shared_bytes, bool resets) {
  using namespace fastrnn::cuda;
  const fastrnn::LayerShape shape =
      shape_of(cell, steps, batch, input_size, hidden_size, proj_size, directions);
  check_size("capability", capability, 0);
  check_size("multiprocessors", multiprocessors, 0);
  check_size("shared_bytes", shared_bytes, 0);
  Arithmetic arithmetic = tf32 ? Arithmetic::kTf32 : Arithmetic::kFloat32;
  const int bytes = element_bytes(dtype, false);
  if (bytes == 2) arithmetic = dtype == "float16" ? Arithmetic::kFloat16 : Arithmetic::kBFloat16;
  if (bytes == 8) arithmetic = Arithmetic::kFloat64;
  Choice choice;
  try {
    choice = choice_named(schedule ? schedule->c_str() : std::getenv("FASTRNN_SCHEDULE"));
  } catch (const std::exception& error) {
    throw py::value_error(error.what());
  }
  const Plan chosen = make_plan(
      {shape, int(directions), training ? Pass::kBackward : Pass::kForward, arithmetic,
       Chip{int(capability), int(multiprocessors), int(shared_bytes)}, choice, false, resets});
  py::dict result;
  result["schedule"] = chosen.schedule->name;
  result["chunk_rows"] = chosen.chunk_rows;
  if (chosen.tiling.blocks > 0) {
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

// Raises unless a layer can have int8 weights.
void check_int8(const fastrnn::LayerShape& shape, bool training) {
  const CellInfo& cell = fastrnn::cell_info(shape.cell);
  if (!fastrnn::has_int8(cell))
    throw py::value_error("cell must be one that has int8 kernels, got '" + std::string(cell.name) +
                          "'");
  if (training) throw py::value_error("training must be False for int8, got True");
  if (shape.proj_size != 0)
    throw py::value_error("proj_size must be 0 for int8, got " + std::to_string(shape.proj_size));
  check_size("input_size", shape.input_size, 1, fastrnn::kInt8MostColumns);
  check_size("hidden_size", shape.hidden_size, 1, fastrnn::kInt8MostColumns);
}

py::dict plan(const std::string& cell, std::int64_t steps, std::int64_t batch,
              std::int64_t input_size, std::int64_t hidden_size, std::int64_t proj_size,
              const std::string& dtype, std::int64_t threads, bool training,
              std::int64_t directions, const std::string& weight_format, std::int64_t layers) {
  const fastrnn::LayerShape shape =
      shape_of(cell, steps, batch, input_size, hidden_size, proj_size, directions);
  const int bytes = element_bytes(dtype, true);
  const bool is_int8 = dtype == "int8";
  if (is_int8) check_int8(shape, training);
  const WeightFormat allowed = weight_format_named(weight_format);
  check_size("threads", threads, 1);
  check_size("layers", layers, 1);
  py::dict result;
  const auto pass = training ? fastrnn::cpu::Pass::kBackward : fastrnn::cpu::Pass::kForward;
  const fastrnn::cpu::Plan chosen =
      is_int8 ? fastrnn::cpu::make_int8_plan(shape, int(threads), int(directions))
      : dtype == "bfloat16"
          ? fastrnn::cpu::make_bfloat16_plan(shape, pass, int(threads), int(directions))
          // float16: in float32
          : fastrnn::cpu::make_plan(shape, pass, std::max(bytes, 4), int(threads), int(directions),
                                    dtype == "float32" ? allowed : WeightFormat::kNative);
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
  result["recurrent_format"] = is_int8 ? "int8" : weight_format_info(chosen.recurrent_format).name;
  if (dtype == "bfloat16")
    result["bfloat16"] = training ? fastrnn::cpu::bfloat16_gradients_reason(shape)
                                  : fastrnn::cpu::bfloat16_reason(shape);
  if (is_int8) result["int8"] = fastrnn::cpu::int8_reason(shape);
  result["input"] = chosen.input_fused ? "fused" : "ahead";
  result["shared"] = chosen.shared;
  result["chunk_rows"] = chosen.chunk_rows;
  result["prefetch"] = chosen.prefetch;
  result["stacked"] = false;
  if (layers > 1 && directions == 1 && !training && allowed == WeightFormat::kNative &&
      bytes >= 4) {
    fastrnn::LayerShape upper = shape;
    upper.input_size = shape.output_size();
    fastrnn::cpu::Plan pair[2];
    result["stacked"] = fastrnn::cpu::make_stacked_plans(shape, upper, bytes, int(threads), pair);
  }
  return result;
}

py::tuple bfloat16_copies(const std::string& cell, std::int64_t hidden_size,
                          std::int64_t proj_size) {
  const auto copies =
      fastrnn::cpu::bfloat16_copies(shape_of(cell, 1, 1, 1, hidden_size, proj_size, 1));
  return py::make_tuple(copies.min_rows, py::tuple(py::cast(copies.batches)));
}

}  // namespace

LayerShape shape_of(const std::string& cell, std::int64_t steps, std::int64_t batch,
                    std::int64_t input_size, std::int64_t hidden_size, std::int64_t proj_size,
                    std::int64_t directions) {
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
  const Sequence sequence = {steps, batch, false, nullptr, nullptr};
  return {info, sequence, input_size, hidden_size, proj_size};
}

WeightFormat weight_format_named(const std::string& name) {
  std::string known;
  for (int i = 0; i < kWeightFormatCount; ++i) {
    if (name == kWeightFormats[i].name) return WeightFormat(i);
    known += std::string(known.empty() ? "" : ", ") + kWeightFormats[i].name;
  }
  throw py::value_error("weight_format must be one of " + known + ", got '" + name + "'");
}

void define_plans(py::module_& m) {
  m.def("plan", &plan, py::arg("cell"), py::arg("steps"), py::arg("batch"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("proj_size") = 0, py::arg("dtype") = "float32",
        py::arg("threads") = 1, py::arg("training") = false, py::arg("directions") = 1,
        py::arg("weight_format") = "native", py::arg("layers") = 1,
        "How the CPU would walk a layer of this shape through time (training: its backward pass).");
  m.def("bfloat16_copies", &bfloat16_copies, py::arg("cell"), py::arg("hidden_size"),
        py::arg("proj_size") = 0,
        "For which rows and batches bfloat16 copies of float32 tensors are faster.");
  m.def("cuda_plan", &cuda_plan, py::arg("cell"), py::arg("steps"), py::arg("batch"),
        py::arg("input_size"), py::arg("hidden_size"), py::arg("proj_size") = 0,
        py::arg("dtype") = "float32", py::arg("training") = false, py::arg("directions") = 1,
        py::arg("tf32") = false, py::arg("schedule") = py::none(),
        py::arg("capability") = fastrnn::cuda::kH100.major,
        py::arg("multiprocessors") = fastrnn::cuda::kH100.multiprocessors,
        py::arg("shared_bytes") = fastrnn::cuda::kH100.shared_bytes, py::arg("resets") = false,
        "The same on a GPU, an H100 unless told otherwise; schedule: auto, persistent or stepwise, "
        "None: what FASTRNN_SCHEDULE says.");
}

}  // namespace fastrnn::bindings
