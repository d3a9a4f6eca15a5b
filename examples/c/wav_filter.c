/* Passes a WAV file (PCM, 16 bits) through a recurrent layer, block by block, as an audio plug-in
 * would. The layer has I = R = 1: one sample in, one sample out. Each channel is a sequence of the
 * batch, so the interleaved samples of a file are x [T, B, 1] as they are. */
#include <fastrnn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 64, MOST_CHANNELS = 8 };

static uint32_t number(const unsigned char* bytes, int count) { /* little endian */
  uint32_t value = 0;
  while (count-- > 0) value = value << 8 | bytes[count];
  return value;
}

/* Copies all chunks before the samples to `out`. Returns the number of bytes of the samples, or -1
 * if the file is no WAV file that this program can read. */
static long copy_header(FILE* in, FILE* out, int* channels) {
  unsigned char bytes[64];
  *channels = 0;
  if (fread(bytes, 1, 12, in) != 12 || memcmp(bytes, "RIFF", 4) || memcmp(bytes + 8, "WAVE", 4))
    return -1;
  fwrite(bytes, 1, 12, out);
  while (fread(bytes, 1, 8, in) == 8) {
    const uint32_t size = number(bytes + 4, 4);
    fwrite(bytes, 1, 8, out);
    if (!memcmp(bytes, "data", 4)) return *channels ? (long)size : -1;
    if (size < 16 || size > sizeof(bytes) || fread(bytes, 1, size, in) != size) return -1;
    fwrite(bytes, 1, size, out);
    if (number(bytes, 2) != 1 || number(bytes + 14, 2) != 16) return -1;
    *channels = (int)number(bytes + 2, 2);
    if (*channels < 1 || *channels > MOST_CHANNELS) return -1;
  }
  return -1;
}

static int fail(const char* message) {
  fprintf(stderr, "wav_filter: %s\n", message);
  return 1;
}

int main(int count, char** arguments) {
  static unsigned char bytes[2 * BLOCK * MOST_CHANNELS];
  static float x[BLOCK * MOST_CHANNELS], y[BLOCK * MOST_CHANNELS];
  if (count != 4) return fail("usage: wav_filter MODEL IN.wav OUT.wav");
  FILE *in = fopen(arguments[2], "rb"), *out = fopen(arguments[3], "wb");
  if (!in || !out) return fail("a file cannot be opened");
  int channels;
  long left = copy_header(in, out, &channels) / 2; /* samples */
  if (channels == 0) return fail("the input must be a WAV file of 16-bit PCM");

  fastrnn_session* session;
  if (fastrnn_open(arguments[1], channels, &session)) return fail(fastrnn_open_message());
  if (fastrnn_input_size(session) != 1 || fastrnn_output_size(session) != 1)
    return fail("the model must have one input and one output");

  while (left >= channels) {
    const size_t most = (size_t)BLOCK * channels;
    const size_t wanted = (size_t)left < most ? (size_t)left / channels * channels : most;
    const size_t samples = fread(bytes, 2, wanted, in) / channels * channels;
    if (samples == 0) break;
    for (size_t i = 0; i < samples; ++i) x[i] = (float)(int16_t)number(bytes + 2 * i, 2) / 32768.0f;
    const int error = fastrnn_run(session, x, (int64_t)samples / channels, y);
    if (error) return fail(fastrnn_error_string(error));
    for (size_t i = 0; i < samples; ++i) {
      const float scaled = y[i] * 32768.0f;
      const long rounded = scaled < 0 ? (long)(scaled - 0.5f) : (long)(scaled + 0.5f);
      const long sample = rounded > 32767 ? 32767 : rounded < -32768 ? -32768 : rounded;
      bytes[2 * i] = (unsigned char)(sample & 0xff);
      bytes[2 * i + 1] = (unsigned char)(sample >> 8 & 0xff);
    }
    fwrite(bytes, 2, samples, out);
    left -= (long)samples;
  }
  fastrnn_close(session);
  fclose(in);
  return fclose(out) == 0 ? 0 : fail("the output cannot be written");
}
