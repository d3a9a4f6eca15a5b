// Whether this machine has AMX, and lets this process use it (amx.cpp).
#pragma once

namespace fastrnn::cpu {

bool has_amx_bf16();
bool has_amx_int8();

}  // namespace fastrnn::cpu
