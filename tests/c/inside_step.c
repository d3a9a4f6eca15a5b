/* inside_step MODEL BATCH MODE: runs steps of a session.
 *
 *   count      counts allocations and locks during the steps; prints their number, then the number
 *              during a malloc and a lock of its own, which shows that both are counted
 *   seccomp    in a process that the kernel kills at any system call but read, write and exit;
 *              prints "clean" or "killed"
 *   control    the same with a system call, prints "killed"; or "unavailable" without seccomp
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fastrnn.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { STEPS = 250 };

/* glibc's own functions; those below replace them for all libraries of the process. */
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* memory, size_t size);
void* __libc_memalign(size_t alignment, size_t size);
void __libc_free(void* memory);
static int (*lock)(pthread_mutex_t*);
static volatile int counted;

void* malloc(size_t size) {
  ++counted;
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  ++counted;
  return __libc_calloc(count, size);
}
void* realloc(void* memory, size_t size) {
  ++counted;
  return __libc_realloc(memory, size);
}
void* memalign(size_t alignment, size_t size) {
  ++counted;
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void** memory, size_t alignment, size_t size) {
  *memory = memalign(alignment, size);
  return *memory == NULL;
}
void free(void* memory) {
  ++counted;
  __libc_free(memory);
}
int pthread_mutex_lock(pthread_mutex_t* mutex) {
  ++counted;
  return lock == NULL ? 0 : lock(mutex);
}

static int fail(const char* message) {
  fprintf(stderr, "%s\n", message);
  return 1;
}

static int run_all(fastrnn_session* session, const float* x, float* y, float* h, float* c) {
  int errors = 0;
  const int64_t row = fastrnn_batch(session) * fastrnn_input_size(session);
  for (int t = 0; t < STEPS; ++t) errors += fastrnn_step(session, x + t * row, y) != 0;
  errors += fastrnn_run(session, x, STEPS, y) != 0;
  errors += fastrnn_get_state(session, h, c) != 0;
  errors += fastrnn_set_state(session, h, c) != 0;
  errors += fastrnn_reset_row(session, 0) != 0;
  errors += fastrnn_reset(session) != 0;
  return errors;
}

int main(int count, char** arguments) {
  if (count != 4) return fail("usage: inside_step MODEL BATCH MODE");
  *(void**)&lock = dlsym(RTLD_NEXT, "pthread_mutex_lock");
  const char* mode = arguments[3];
  const long batch = atol(arguments[2]);
  fastrnn_session* session;
  if (fastrnn_open(arguments[1], batch, &session)) return fail(fastrnn_open_message());
  const size_t x_size = STEPS * (size_t)(batch * fastrnn_input_size(session));
  float* x = malloc(x_size * sizeof(float));
  float* y = calloc(STEPS * (size_t)(batch * fastrnn_output_size(session)), sizeof(float));
  float* h = calloc((size_t)fastrnn_h_size(session), sizeof(float));
  float* c = calloc((size_t)fastrnn_c_size(session) + 1, sizeof(float));
  for (size_t i = 0; i < x_size; ++i) x[i] = (float)(i % 7) - 3.0f;

  if (!strcmp(mode, "count")) {
    const int before = counted;
    const int errors = run_all(session, x, y, h, c);
    const int during = counted - before;
    if (errors) return fail("a call failed");
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    void* volatile memory = malloc(16);
    free(memory);
    pthread_mutex_lock(&mutex);
    printf("%d %d\n", during, counted - before - during);
    fastrnn_close(session);
    return 0;
  }

  const pid_t child = fork();
  if (child == 0) {
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) != 0) _exit(2);
    const int errors = run_all(session, x, y, h, c);
    if (!strcmp(mode, "control")) syscall(SYS_getppid);
    syscall(SYS_exit, errors != 0);
  }
  int status;
  if (waitpid(child, &status, 0) != child) return fail("waitpid failed");
  if (WIFSIGNALED(status))
    puts(WTERMSIG(status) == SIGKILL ? "killed" : "crashed");
  else
    puts(WEXITSTATUS(status) == 0 ? "clean" : WEXITSTATUS(status) == 2 ? "unavailable" : "failed");
  return 0;
}
