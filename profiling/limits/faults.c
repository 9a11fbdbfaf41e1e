/* Calls that write below a folder fail from the n-th on, or the n-th alone, with a chosen error; the clock jumps.

   Preloaded (LD_PRELOAD) into a process, which arms it by faults_arm and faults_clock. It counts every call that changes a file
   or a folder there: open with O_CREAT, write, pwrite, writev, ftruncate, fsync, rename, link, mkdir. Removal never fails. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long first, last;
static int number;
static atomic_long calls;
static long jump;
static atomic_long ticks;

void faults_arm(const char *below, long from, long to, int error) {
  snprintf(folder, sizeof folder, "%s", below);
  first = from, last = to, number = error;
  calls = 0;
}

long faults_calls(void) { return calls; }

void faults_clock(long seconds) { jump = seconds; }

static int below(const char *path) {
  size_t length = strlen(folder);
  return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int fails(const char *path) {
  if (!below(path)) return 0;
  long call = ++calls;
  if (call < first || call > last) return 0;
  errno = number;
  return 1;
}

static int fails_at(int descriptor) {
  if (!folder[0]) return 0;
  int before = errno;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = before;
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static mode_t mode_of(int flags, va_list list) { return flags & O_CREAT ? va_arg(list, mode_t) : 0; }

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    va_list list; va_start(list, flags); mode_t mode = mode_of(flags, list); va_end(list); \
    REAL(name); \
    return (flags & O_CREAT) && fails(path) ? -1 : real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    va_list list; va_start(list, flags); mode_t mode = mode_of(flags, list); va_end(list); \
    REAL(name); \
    return (flags & O_CREAT) && fails(path) ? -1 : real(at, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int d, const void *data, size_t size) { REAL(write); return fails_at(d) ? -1 : real(d, data, size); }
ssize_t pwrite64(int d, const void *data, size_t size, off64_t at) { REAL(pwrite64); return fails_at(d) ? -1 : real(d, data, size, at); }
ssize_t writev(int d, const struct iovec *parts, int count) { REAL(writev); return fails_at(d) ? -1 : real(d, parts, count); }
int ftruncate64(int d, off64_t size) { REAL(ftruncate64); return fails_at(d) ? -1 : real(d, size); }
int fsync(int d) { REAL(fsync); return fails_at(d) ? -1 : real(d); }
int rename(const char *from, const char *to) { REAL(rename); return fails(to) ? -1 : real(from, to); }
int link(const char *from, const char *to) { REAL(link); return fails(to) ? -1 : real(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
  REAL(linkat);
  return fails(to) ? -1 : real(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails(path) ? -1 : real(path, mode); }

/* The wall clock alone: a monotonic one never jumps. Back and forth, further at every reading. */
static long offset(void) {
  long tick = ++ticks;
  return jump ? (tick % 2 ? jump : -jump) * (1 + tick % 7) : 0;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(clock_gettime);
  int result = real(clock, now);
  if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
  return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  REAL(gettimeofday);
  int result = real(now, zone);
  if (!result) now->tv_sec += offset();
  return result;
}
time_t time(time_t *where) {
  REAL(time);
  time_t now = real(NULL) + offset();
  if (where) *where = now;
  return now;
}
