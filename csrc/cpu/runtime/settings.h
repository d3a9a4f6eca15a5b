// The environment variables of the CPU kernels: accepted values, and the error for all others.
// docs/environment.md describes them.
#pragma once

#include <string>

#include "cpu/api.h"

namespace fastrnn::cpu {

// The value of a variable, or "" if it is not set or empty, which means the default.
std::string setting(const char* name);
// Throws std::invalid_argument: "fastrnn: <name> must be <expected>, got '<value>'."
[[noreturn]] void reject_setting(const char* name, const std::string& expected,
                                 const std::string& value);

int threads_setting();       // FASTRNN_THREADS: largest number of threads per call, 0: no bound
bool poison_setting();       // FASTRNN_POISON
bool emulate_amx_setting();  // FASTRNN_EMULATE_AMX
int l2_kb_setting();         // FASTRNN_L2_KB: 0 to 2^20, or -1: chosen by the CPU
int widen_bytes_setting();   // FASTRNN_WIDEN_BYTES: 32, 64 or 0: chosen by the CPU
std::string isa_setting();   // FASTRNN_ISA: an available instruction set, or "": the fastest

}  // namespace fastrnn::cpu
