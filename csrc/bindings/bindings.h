// The parts of the module fastrnn._C, and the checks that they share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>

#include "problem/layer.h"

namespace fastrnn::bindings {

// CPU and CUDA plans, in bindings/plans.cpp.
void define_plans(pybind11::module_& m);
// fastrnn._C._packed: packed weights and sessions, in bindings/packed.cpp.
void define_packed(pybind11::module_& m);
// fastrnn._C._testing: hooks for the tests, in bindings/testing.cpp.
void define_testing(pybind11::module_& m);

constexpr std::int64_t kLargestSize = std::numeric_limits<std::int32_t>::max();

// Raise ValueError unless least <= value <= most. NaN is in no range.
void check_size(const char* name, std::int64_t value, std::int64_t least,
                std::int64_t most = kLargestSize);
void check_range(const char* name, double value, double least, double most);

// The checked shape of a layer; its sequence has no rows yet. In bindings/plans.cpp.
LayerShape shape_of(const std::string& cell, std::int64_t steps, std::int64_t batch,
                    std::int64_t input_size, std::int64_t hidden_size, std::int64_t proj_size,
                    std::int64_t directions);
// Raises ValueError if there is no such format. In bindings/plans.cpp.
WeightFormat weight_format_named(const std::string& name);

}  // namespace fastrnn::bindings
