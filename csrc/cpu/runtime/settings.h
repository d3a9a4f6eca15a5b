// The environment variables of the CPU's kernels: what each accepts, and the error for the rest.
// docs/environment.md has them all.
#pragma once

#include <string>

#include "cpu/api.h"

namespace fastrnn::cpu {

// The value of a variable; "" where it is not set or empty, which means the default.
std::string setting(const char* name);
// Throws std::invalid_argument: "fastrnn: <name> must be <expected>, got '<value>'."
[[noreturn]] void reject_setting(const char* name, const std::string& expected,
                                 const std::string& value);

int threads_setting();      // FASTRNN_THREADS: the bound of a call's threads, 0: none
bool poison_setting();      // FASTRNN_POISON
int widen_bytes_setting();  // FASTRNN_WIDEN_BYTES: 32, 64 or 0, which leaves it to the CPU
std::string isa_setting();  // FASTRNN_ISA: a set that runs here, or "" for the best

}  // namespace fastrnn::cpu
