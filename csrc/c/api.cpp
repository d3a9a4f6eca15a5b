// The functions of fastrnn/include/fastrnn.h. No exception leaves them.
#include <fastrnn.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "c/model_file.h"
#include "cpu/runtime/buffer_cache.h"
#include "cpu/session.h"

struct fastrnn_session {
  fastrnn::cpu::Session<float> kernel;
  const std::vector<float> h0, c0;  // of one sequence, [L, R] and [L, H]; empty: zero

  fastrnn_session(const fastrnn::c::Model& model, std::int64_t batch)
      : kernel(model.shape, batch, 1),
        h0(copied(model.h0, model.shape.h_size(1))),
        c0(copied(model.c0, model.shape.c_size(1))) {}

  // Sets the states of these sequences to the initial ones.
  void reset_rows(std::int64_t first, std::int64_t end) {
    kernel.write_rows(first, end, h0.empty() ? nullptr : h0.data(),
                      c0.empty() ? nullptr : c0.data());
  }

 private:
  static std::vector<float> copied(const float* from, std::int64_t size) {
    return from == nullptr ? std::vector<float>() : std::vector<float>(from, from + size);
  }
};

namespace fastrnn::c {
namespace {

constexpr std::int64_t kMostBatch = 65536;

thread_local char open_message[256] = "";

// An argument of a function is wrong.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

void require(bool is_valid, const char* message) {
  if (!is_valid) throw ArgumentError(message);
}

// The error code of the exception that is being handled. report: receives its message, or null.
int code_of_exception(char* report, std::size_t size) noexcept {
  const auto with = [&](int code, const char* message) {
    if (report != nullptr) std::snprintf(report, size, "fastrnn: %s", message);
    return code;
  };
  try {
    throw;
  } catch (const ArgumentError& error) {
    return with(FASTRNN_ERROR_ARGUMENT, error.what());
  } catch (const FileError& error) {
    return with(FASTRNN_ERROR_FILE, error.what());
  } catch (const FormatError& error) {
    return with(FASTRNN_ERROR_FORMAT, error.what());
  } catch (const cpu::SessionBusy&) {
    return with(FASTRNN_ERROR_BUSY, fastrnn_error_string(FASTRNN_ERROR_BUSY));
  } catch (const cpu::OutOfMemory&) {
    return with(FASTRNN_ERROR_MEMORY, fastrnn_error_string(FASTRNN_ERROR_MEMORY));
  } catch (const std::bad_alloc&) {
    return with(FASTRNN_ERROR_MEMORY, fastrnn_error_string(FASTRNN_ERROR_MEMORY));
  } catch (const std::length_error&) {
    return with(FASTRNN_ERROR_MEMORY, fastrnn_error_string(FASTRNN_ERROR_MEMORY));
  } catch (const std::exception& error) {
    return with(FASTRNN_ERROR_INTERNAL, error.what());
  } catch (...) {
    return with(FASTRNN_ERROR_INTERNAL, fastrnn_error_string(FASTRNN_ERROR_INTERNAL));
  }
}

// Runs body() and returns its error code.
template <class Body>
int guarded(const Body& body) noexcept {
  try {
    body();
    return FASTRNN_OK;
  } catch (...) {
    return code_of_exception(nullptr, 0);
  }
}

// Opens a session with the model that read() returns.
template <class Read>
int open(std::int64_t batch, fastrnn_session** session, const Read& read) noexcept {
  open_message[0] = '\0';
  try {
    require(session != nullptr, "session must not be null");
    *session = nullptr;
    require(batch >= 1 && batch <= kMostBatch, "batch must be 1 to 65536");
    cpu::check_settings();
    const Model model = read();
    auto opened = std::make_unique<fastrnn_session>(model, batch);
    opened->kernel.pack(model.weights.data());
    opened->reset_rows(0, batch);
    *session = opened.release();
    return FASTRNN_OK;
  } catch (...) {
    return code_of_exception(open_message, sizeof(open_message));
  }
}

// The session that a function got; throws if it is null.
cpu::Session<float>& kernel_of(fastrnn_session* session) {
  require(session != nullptr, "session must not be null");
  return session->kernel;
}

bool overlap(const float* a, std::int64_t a_size, const float* b, std::int64_t b_size) {
  const std::less<const float*> before;
  return before(a, b + b_size) && before(b, a + a_size);
}

template <class Size>
std::int64_t size_of(const fastrnn_session* session, const Size& size) {
  return session == nullptr ? 0 : size(session->kernel);
}

}  // namespace
}  // namespace fastrnn::c

namespace c = fastrnn::c;
using Kernel = fastrnn::cpu::Session<float>;

extern "C" {

int fastrnn_version(void) { return FASTRNN_VERSION_NUMBER; }

const char* fastrnn_error_string(int error) {
  switch (error) {
    case FASTRNN_OK:
      return "no error";
    case FASTRNN_ERROR_ARGUMENT:
      return "an argument is null or out of range";
    case FASTRNN_ERROR_FILE:
      return "the file cannot be read";
    case FASTRNN_ERROR_FORMAT:
      return "the content is not that of an exported session";
    case FASTRNN_ERROR_MEMORY:
      return "there is not enough memory";
    case FASTRNN_ERROR_BUSY:
      return "another thread uses the session";
    case FASTRNN_ERROR_INTERNAL:
      return "internal error";
    default:
      return "unknown error code";
  }
}

int fastrnn_open(const char* path, int64_t batch, fastrnn_session** session) {
  return c::open(batch, session, [&] {
    c::require(path != nullptr, "path must not be null");
    const std::vector<char> content = c::read_file(path);
    return c::parse_model(content.data(), content.size());
  });
}

int fastrnn_open_memory(const void* data, size_t size, int64_t batch, fastrnn_session** session) {
  return c::open(batch, session, [&] {
    c::require(data != nullptr, "data must not be null");
    return c::parse_model(static_cast<const char*>(data), size);
  });
}

const char* fastrnn_open_message(void) { return c::open_message; }

void fastrnn_close(fastrnn_session* session) { delete session; }

int fastrnn_step(fastrnn_session* session, const float* x, float* y) {
  if (session == nullptr || x == nullptr || y == nullptr) return FASTRNN_ERROR_ARGUMENT;
  return c::guarded([&] { session->kernel.step(x, y); });
}

int fastrnn_run(fastrnn_session* session, const float* x, int64_t steps, float* y) {
  if (session == nullptr || steps < 0) return FASTRNN_ERROR_ARGUMENT;
  if (steps == 0) return FASTRNN_OK;
  if (x == nullptr || y == nullptr) return FASTRNN_ERROR_ARGUMENT;
  Kernel& kernel = session->kernel;
  const int64_t x_size = kernel.batch() * kernel.shape().input_size;
  const int64_t y_size = kernel.batch() * kernel.shape().output_size();
  if (steps > INT64_MAX / 8 / std::max(x_size, y_size) ||
      c::overlap(x, steps * x_size, y, steps * y_size))
    return FASTRNN_ERROR_ARGUMENT;
  return c::guarded([&] { kernel.run(x, steps, y, false); });
}

int fastrnn_get_state(fastrnn_session* session, float* h, float* c_state) {
  return c::guarded([&] {
    Kernel& kernel = c::kernel_of(session);
    c::require(h != nullptr && (c_state != nullptr || kernel.c_size() == 0), "null");
    kernel.read_states(h, c_state);
  });
}

int fastrnn_set_state(fastrnn_session* session, const float* h, const float* c_state) {
  return c::guarded([&] {
    Kernel& kernel = c::kernel_of(session);
    c::require(h != nullptr && (c_state != nullptr || kernel.c_size() == 0), "null");
    kernel.write_states(h, c_state);
  });
}

int fastrnn_reset(fastrnn_session* session) {
  return c::guarded([&] {
    const Kernel& kernel = c::kernel_of(session);
    session->reset_rows(0, kernel.batch());
  });
}

int fastrnn_reset_row(fastrnn_session* session, int64_t row) {
  return c::guarded([&] {
    Kernel& kernel = c::kernel_of(session);
    c::require(row >= 0 && row < kernel.batch(), "row");
    session->reset_rows(row, row + 1);
  });
}

int64_t fastrnn_batch(const fastrnn_session* session) {
  return c::size_of(session, [](const Kernel& kernel) { return kernel.batch(); });
}
int64_t fastrnn_input_size(const fastrnn_session* session) {
  return c::size_of(session, [](const Kernel& kernel) { return kernel.shape().input_size; });
}
int64_t fastrnn_hidden_size(const fastrnn_session* session) {
  return c::size_of(session, [](const Kernel& kernel) { return kernel.shape().hidden_size; });
}
int64_t fastrnn_output_size(const fastrnn_session* session) {
  return c::size_of(session, [](const Kernel& kernel) { return kernel.shape().output_size(); });
}
int64_t fastrnn_num_layers(const fastrnn_session* session) {
  return c::size_of(session, [](const Kernel& kernel) { return kernel.shape().layers; });
}
int64_t fastrnn_h_size(const fastrnn_session* session) {
  return c::size_of(session, [](const Kernel& kernel) { return kernel.h_size(); });
}
int64_t fastrnn_c_size(const fastrnn_session* session) {
  return c::size_of(session, [](const Kernel& kernel) { return kernel.c_size(); });
}

}  // extern "C"
