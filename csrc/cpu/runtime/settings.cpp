#include "cpu/runtime/settings.h"

#include <cstdlib>
#include <limits>
#include <stdexcept>

namespace fastrnn::cpu {

std::string setting(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

void reject_setting(const char* name, const std::string& expected, const std::string& value) {
  throw std::invalid_argument(std::string("fastrnn: ") + name + " must be " + expected + ", got '" +
                              value + "'.");
}

namespace {

// value: digits. note: what 0 means.
int whole_number(const char* name, const std::string& value, int most, const std::string& note) {
  long long number = 0;
  for (const char digit : value) {
    number = number * 10 + (digit - '0');
    if (digit < '0' || digit > '9' || number > most)
      reject_setting(name, "a whole number from 0 (" + note + ") to " + std::to_string(most),
                     value);
  }
  return int(number);
}

bool zero_or_one(const char* name, const std::string& value) {
  if (value.empty() || value == "0") return false;
  if (value == "1") return true;
  reject_setting(name, "0 or 1", value);
}

}  // namespace

int threads_setting() {
  return whole_number("FASTRNN_THREADS", setting("FASTRNN_THREADS"),
                      std::numeric_limits<int>::max(), "no bound");
}

int l2_kb_setting() {
  const std::string value = setting("FASTRNN_L2_KB");
  return value.empty() ? -1 : whole_number("FASTRNN_L2_KB", value, 1 << 20, "a fast L3");
}

bool poison_setting() { return zero_or_one("FASTRNN_POISON", setting("FASTRNN_POISON")); }
bool emulate_amx_setting() {
  return zero_or_one("FASTRNN_EMULATE_AMX", setting("FASTRNN_EMULATE_AMX"));
}

int widen_bytes_setting() {
  const std::string value = setting("FASTRNN_WIDEN_BYTES");
  if (value.empty()) return 0;
  if (value == "32") return 32;
  if (value == "64") return 64;
  reject_setting("FASTRNN_WIDEN_BYTES", "32 or 64", value);
}

std::string isa_setting() {
  const std::string value = setting("FASTRNN_ISA");
  if (value.empty()) return value;
  std::string known;
  for (const std::string& name : available_isas()) {
    if (name == value) return value;
    known += (known.empty() ? "" : ", ") + name;
  }
  reject_setting("FASTRNN_ISA", "one of the instruction sets that this machine has, " + known,
                 value);
}

void check_settings() {
  isa_setting();
  threads_setting();
  l2_kb_setting();
  poison_setting();
  emulate_amx_setting();
  widen_bytes_setting();
}

}  // namespace fastrnn::cpu
