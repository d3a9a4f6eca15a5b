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

int threads_setting() {
  const std::string value = setting("FASTRNN_THREADS");
  constexpr int kMost = std::numeric_limits<int>::max();
  long long threads = 0;
  for (const char digit : value) {
    threads = threads * 10 + (digit - '0');
    if (digit < '0' || digit > '9' || threads > kMost)
      reject_setting("FASTRNN_THREADS",
                     "a whole number from 0 (no bound) to " + std::to_string(kMost), value);
  }
  return int(threads);
}

bool poison_setting() {
  const std::string value = setting("FASTRNN_POISON");
  if (value.empty() || value == "0") return false;
  if (value == "1") return true;
  reject_setting("FASTRNN_POISON", "0 or 1", value);
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
  poison_setting();
  widen_bytes_setting();
}

}  // namespace fastrnn::cpu
