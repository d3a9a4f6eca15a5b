/* session_step MODEL BYTES STEPS ROUNDS: times steps of the C interface, and reads of as much
 * memory as the packed weights have, interleaved on one core. Prints the least nanoseconds per step
 * and per read.
 *
 * Compile with -O3 -march=native, so that a read uses the widest loads.
 */
#define _POSIX_C_SOURCE 200112L
#include <fastrnn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) { /* ns */
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return 1e9 * (double)time.tv_sec + (double)time.tv_nsec;
}

/* Reads `count` (a multiple of 128) values with 8 sums in progress, as many as hide the latency of
 * an addition. */
static float stream(const float* values, size_t count) {
  enum { LANES = 16, SUMS = 8 };
  float sums[SUMS * LANES] = {0}, total = 0;
  for (size_t i = 0; i < count; i += SUMS * LANES)
    for (int k = 0; k < SUMS * LANES; ++k) sums[k] += values[i + (size_t)k];
  for (int k = 0; k < SUMS * LANES; ++k) total += sums[k];
  return total;
}

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const size_t values = strtoull(arguments[2], NULL, 10) / sizeof(float) / 128 * 128;
  const long steps = atol(arguments[3]), rounds = atol(arguments[4]);
  fastrnn_session* session;
  if (fastrnn_open(arguments[1], 1, &session)) {
    fprintf(stderr, "%s\n", fastrnn_open_message());
    return 1;
  }
  float* x = calloc((size_t)fastrnn_input_size(session), sizeof(float));
  float* y = calloc((size_t)fastrnn_output_size(session), sizeof(float));
  void* memory;
  if (!x || !y || posix_memalign(&memory, 64, values * sizeof(float))) return 1;
  float* weights = memory;
  for (size_t i = 0; i < values; ++i) weights[i] = 1.0f;
  volatile float sink = 0;
  double least_step = 1e30, least_read = 1e30;
  for (long round = 0; round < rounds; ++round) {
    fastrnn_step(session, x, y);
    double begin = now();
    for (long step = 0; step < steps; ++step) fastrnn_step(session, x, y);
    double each = (now() - begin) / (double)steps;
    if (each < least_step) least_step = each;
    sink += stream(weights, values);
    begin = now();
    for (long step = 0; step < steps; ++step) {
      sink += stream(weights, values);
      /* Else the compiler reads once. */
      __asm__ volatile("" : : "r"(weights) : "memory");
    }
    each = (now() - begin) / (double)steps;
    if (each < least_read) least_read = each;
  }
  printf("%.1f %.1f\n", least_step, least_read);
  return 0;
}
