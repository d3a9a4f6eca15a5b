// Errors of the operators: one line that begins with "fastrnn: ", which names the argument, what it
// must be and what it is. The modules check first, with torch's messages; these messages are for
// direct callers of torch.ops.fastrnn.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

// Since torch 2.13; null where the torch that is loaded is older.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastrnn {

// Parts of a message. (Without C++ streams, see cpu/runtime/thread_budget.cpp.)
inline const std::string& text(const std::string& part) { return part; }
inline const char* text(const char* part) { return part; }
inline std::string text(int64_t part) { return std::to_string(part); }
inline std::string text(const std::vector<int64_t>& sizes) {
  std::string result = "[";
  for (size_t i = 0; i < sizes.size(); ++i)
    result += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return result + "]";
}

// Raises an error of these parts. (STD_TORCH_CHECK would put the function, file and line of the
// machine that compiled this before the message.)
template <class... Parts>
[[noreturn]] void throw_error(const Parts&... parts) {
  std::string message = "fastrnn: ";
  ((message += text(parts)), ...);
  throw std::runtime_error(message);
}
#define FASTRNN_CHECK(condition, ...) \
  if (!(condition)) ::fastrnn::throw_error(__VA_ARGS__)

// Begins the message of a call that failed, unlike one whose arguments are wrong: another way to
// compute it would hide the failure. fastrnn/ops/operators.py knows these words.
inline constexpr const char* kCallFailed = "the call failed: ";

// Whether this is a message of `throw_error`.
inline bool is_own_message(const char* message) {
  return std::strncmp(message, "fastrnn: ", 9) == 0;
}

// Raises what torch's C interface has reported. Where one of these operators had reported it to
// torch, that is its own message, around which Python may have put a traceback. torch 2.13 and
// newer keep the message; older ones have printed it on stderr.
[[noreturn]] inline void throw_torch_error() {
  if (torch_exception_get_what_without_backtrace != nullptr) {
    const char* message = torch_exception_get_what_without_backtrace();
    const char* own = message == nullptr ? nullptr : std::strstr(message, "fastrnn: ");
    if (own != nullptr) throw std::runtime_error(std::string(own, std::strcspn(own, "\n")));
    if (message != nullptr && *message != 0)
      throw_error(kCallFailed, "torch reports: ", std::string(message));
  }
  throw_error(kCallFailed, "see the message of torch above.");
}

// Checks the result of a function of torch's C interface. (The macro of its headers for this has
// another name in each release.)
inline void check_torch(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw_torch_error();
}

// Runs an operator. Errors of others get a message like this library's own: those of torch's
// headers name a file of the machine that compiled them.
template <class Operator>
auto guarded(const Operator& run) {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    throw_error(kCallFailed, "there is not enough memory.");
  } catch (const std::length_error&) {
    throw_error(kCallFailed, "there is not enough memory.");
  } catch (const std::exception& error) {
    if (is_own_message(error.what())) throw;
    if (std::strstr(error.what(), "API call failed") != nullptr) throw_torch_error();
    throw_error(kCallFailed, std::string(error.what()));
  }
}

}  // namespace fastrnn
