/* The C interface of fastrnn: inference step by step, without Python and torch.
 *
 *   fastrnn_session *session;
 *   int error = fastrnn_open("model.safetensors", 1, &session);
 *   if (error) { fprintf(stderr, "%s\n", fastrnn_open_message()); return 1; }
 *   while (read_input(x)) {
 *     fastrnn_step(session, x, y);
 *     write_output(y);
 *   }
 *   fastrnn_close(session);
 *
 * The file is written in Python: layer.stream().export("model.safetensors"). Values are float.
 * A session continues from the states that the step before left. At first they are the initial
 * states: those that the layer has learned (learn_initial_state=True), or zero.
 *
 * fastrnn_step, fastrnn_run and the functions for states run on the calling thread. They allocate
 * no memory, take no lock and make no system call, so they can run in a real-time thread. Different
 * threads may use different sessions at the same time. Of two calls that use the same session at
 * the same time, one returns FASTRNN_ERROR_BUSY.
 *
 * Sizes: B batch (number of sequences), I input_size, H hidden_size, R output_size (H, or the size
 * of a projection), L layers. Arrays are contiguous, the last index varies fastest.
 */
#ifndef FASTRNN_H
#define FASTRNN_H

#include <stddef.h>
#include <stdint.h>

#define FASTRNN_VERSION_MAJOR 0
#define FASTRNN_VERSION_MINOR 1
#define FASTRNN_VERSION_PATCH 0
/* 10203 is version 1.2.3. */
#define FASTRNN_VERSION_NUMBER \
  (FASTRNN_VERSION_MAJOR * 10000 + FASTRNN_VERSION_MINOR * 100 + FASTRNN_VERSION_PATCH)

#if defined(__GNUC__)
#define FASTRNN_API __attribute__((visibility("default")))
#else
#define FASTRNN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What the functions return. */
enum {
  FASTRNN_OK = 0,
  FASTRNN_ERROR_ARGUMENT = 1, /* an argument is null or out of range */
  FASTRNN_ERROR_FILE = 2,     /* the file cannot be read */
  FASTRNN_ERROR_FORMAT = 3,   /* the content is not that of an exported session */
  FASTRNN_ERROR_MEMORY = 4,   /* there is not enough memory */
  FASTRNN_ERROR_BUSY = 5,     /* another thread uses the session */
  FASTRNN_ERROR_INTERNAL = 6  /* an environment variable is invalid, or a defect of fastrnn */
};

typedef struct fastrnn_session fastrnn_session;

/* FASTRNN_VERSION_NUMBER of the library, which may differ from that of this header. */
FASTRNN_API int fastrnn_version(void);
/* A sentence that describes an error code. Never null. */
FASTRNN_API const char* fastrnn_error_string(int error);

/* Makes a session of the weights in a file, with its initial states. batch: B, 1 to 65536. On
 * failure *session is null. */
FASTRNN_API int fastrnn_open(const char* path, int64_t batch, fastrnn_session** session);
/* The same with the content of such a file. The session does not use `data` afterwards. */
FASTRNN_API int fastrnn_open_memory(const void* data, size_t size, int64_t batch,
                                    fastrnn_session** session);
/* Why the last call of fastrnn_open or fastrnn_open_memory on this thread failed; "" if it did not.
 * Valid until the next such call. */
FASTRNN_API const char* fastrnn_open_message(void);
/* Frees a session, which no thread may be using. Null does nothing. */
FASTRNN_API void fastrnn_close(fastrnn_session* session);

/* Runs the next step: x [B, I], y [B, R]. They may overlap. */
FASTRNN_API int fastrnn_step(fastrnn_session* session, const float* x, float* y);
/* Runs the next steps, which is faster than fastrnn_step for each: x [steps, B, I], y [steps, B,
 * R]. They must not overlap. */
FASTRNN_API int fastrnn_run(fastrnn_session* session, const float* x, int64_t steps, float* y);

/* Copies the states: h [L, B, R] and c [L, B, H]. c is not used, and may be null, if the cell has
 * no c. */
FASTRNN_API int fastrnn_get_state(fastrnn_session* session, float* h, float* c);
/* Replaces the states by copies of h and c. */
FASTRNN_API int fastrnn_set_state(fastrnn_session* session, const float* h, const float* c);
/* Sets all states to the initial ones. */
FASTRNN_API int fastrnn_reset(fastrnn_session* session);
/* Sets the states of one of the B sequences to the initial ones. */
FASTRNN_API int fastrnn_reset_row(fastrnn_session* session, int64_t row);

/* Sizes; 0 for a null session. */
FASTRNN_API int64_t fastrnn_batch(const fastrnn_session* session);       /* B */
FASTRNN_API int64_t fastrnn_input_size(const fastrnn_session* session);  /* I */
FASTRNN_API int64_t fastrnn_hidden_size(const fastrnn_session* session); /* H */
FASTRNN_API int64_t fastrnn_output_size(const fastrnn_session* session); /* R */
FASTRNN_API int64_t fastrnn_num_layers(const fastrnn_session* session);  /* L */
FASTRNN_API int64_t fastrnn_h_size(const fastrnn_session* session);      /* L * B * R */
FASTRNN_API int64_t fastrnn_c_size(const fastrnn_session* session);      /* L * B * H; 0: no c */

#ifdef __cplusplus
}
#endif

#endif
