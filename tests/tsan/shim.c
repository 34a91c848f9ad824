/* Preloaded by `make tsan`: what the thread sanitizer has to be told of.
 *
 * It runs the handler of a signal when the thread that got it makes its next call that it knows. Rust's locks
 * sleep in a system call that it does not know, so a signal for a thread that sleeps there would wait until
 * somebody wakes that thread. Here each such sleep ends by itself after a tenth of a second: a spurious wake-up,
 * which everybody who sleeps so expects.
 *
 * It takes what one thread did before epoll_ctl for done before what another one does after epoll_wait, if both
 * name the same descriptor. Tokio has two of one epoll, the second by a fcntl that it does not know; a dup3 it knows.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SLEEP_NS 100000000L
#define SECOND_NS 1000000000L

typedef long syscall_call(long, ...);
typedef int fcntl_call(int, int, ...);

long syscall(long number, ...) {
  static syscall_call *next;
  if (next == NULL) next = (syscall_call *)dlsym(RTLD_NEXT, "syscall");
  long words[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; i++) words[i] = va_arg(list, long);
  va_end(list);
  int sleeps = number == SYS_futex && (words[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET && words[3] == 0;
  struct timespec end;
  if (sleeps) {
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_nsec += SLEEP_NS;
    if (end.tv_nsec >= SECOND_NS) end.tv_sec++, end.tv_nsec -= SECOND_NS;
    words[3] = (long)&end;
  }
  long result = next(number, words[0], words[1], words[2], words[3], words[4], words[5]);
  return sleeps && result < 0 && errno == ETIMEDOUT ? 0 : result;
}

/* Not a file: to close one of its descriptors, which dup3 does, would give up the locks of the process. */
static int is_nameless(int descriptor) {
  struct stat found;
  return fstat(descriptor, &found) == 0 && (found.st_mode & S_IFMT) == 0;
}

static int duplicate(int descriptor, int command, long argument) {
  static fcntl_call *next;
  if (next == NULL) next = (fcntl_call *)dlsym(RTLD_NEXT, "fcntl64");
  int result = next(descriptor, command, argument);
  if (command != F_DUPFD_CLOEXEC || result < 0 || !is_nameless(descriptor)) return result;
  return dup3(descriptor, result, O_CLOEXEC);
}

int fcntl64(int descriptor, int command, ...) {
  va_list list;
  va_start(list, command);
  long argument = va_arg(list, long);
  va_end(list);
  return duplicate(descriptor, command, argument);
}

int fcntl(int descriptor, int command, ...) {
  va_list list;
  va_start(list, command);
  long argument = va_arg(list, long);
  va_end(list);
  return duplicate(descriptor, command, argument);
}
