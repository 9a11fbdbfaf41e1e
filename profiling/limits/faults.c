/* Calls that change a folder fail from the n-th on, or the n-th alone, with a chosen error; the clock jumps.

   Preloaded (LD_PRELOAD) into a process, which arms it by faults_arm and faults_clock. Calls of the chosen classes are counted
   below the folder, whether they fail or not; all of them can be logged, a line each, with their paths. The counters are
   shared with forked processes, so that a parent reads those of a child that was killed. */
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
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum class { MAKE = 1, WRITE = 2, FLUSH = 4, NAME = 8, REMOVE = 16, CLOSE = 32, GROW = MAKE | WRITE, HALF = 64 };

static struct { atomic_long calls, failed, ticks; } *counters;
static char folder[PATH_MAX];
static long first, last;
static int number, classes, journal = -1;
static long jump;

__attribute__((constructor)) static void share(void) {
  counters = mmap(NULL, sizeof *counters, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (counters == MAP_FAILED) abort();
}

void faults_arm(const char *below, long from, long to, int error, int of) {
  snprintf(folder, sizeof folder, "%s", below);
  first = from, last = to, number = error, classes = of;
}

void faults_reset(void) { counters->calls = counters->failed = counters->ticks = 0; }

long faults_failed(void) { return counters->failed; }

long faults_ticks(void) { return counters->ticks; }

void faults_clock(long seconds) { jump = seconds; }

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t write_plainly(int d, const void *data, size_t size) {
  static __typeof__(&write) real;
  if (!real) real = (__typeof__(&write))dlsym(RTLD_NEXT, "write");
  return real(d, data, size);
}

void faults_log(const char *path) { journal = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666); }

static void note(const char *call, const char *from, const char *to) {
  if (journal < 0) return;
  char line[3 * PATH_MAX];
  int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", call, from, to), before = errno;
  write_plainly(journal, line, length);
  errno = before;
}

static int below(const char *path) {
  size_t length = strlen(folder);
  return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

/* The path of a descriptor, or of a name relative to one; 0 if it has none. */
static int path_of(int descriptor, const char *name, char *path) {
  if (name && (name[0] == '/' || descriptor == AT_FDCWD)) return snprintf(path, PATH_MAX, "%s", name), 1;
  int before = errno;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  errno = before;
  if (length < 0) return 0;
  snprintf(path + length, PATH_MAX - length, name ? "/%s" : "%.0s", name ? name : "");
  return 1;
}

/* Whether a call of a class fails; HALF if it is a write that does half its work. */
static int fails(enum class of, const char *path) {
  if (!below(path)) return 0;
  if (classes & HALF) {
    long call = of == WRITE ? ++counters->calls : counters->calls;
    if (!(of & GROW) || call < first) return 0;
    if (of == WRITE && call == first) {
      counters->failed++;
      return HALF;
    }
    if (of == MAKE && !counters->failed) return 0;
  } else {
    if (!(of & classes)) return 0;
    long call = ++counters->calls;
    if (call < first || call > last) return 0;
  }
  counters->failed++;
  errno = number;
  return 1;
}

static int fails_at(enum class of, const char *call, int descriptor) {
  char path[PATH_MAX];
  if (!folder[0] || !path_of(descriptor, NULL, path)) return 0;
  if (below(path)) note(call, path, "");
  return fails(of, path);
}

static int fails_in(enum class of, const char *call, int at, const char *name) {
  char path[PATH_MAX];
  if (!folder[0] || !path_of(at, name, path)) return 0;
  if (below(path)) note(call, path, "");
  return fails(of, path);
}

static int fails_from_to(const char *call, int a, const char *from, int b, const char *to) {
  char source[PATH_MAX], target[PATH_MAX];
  if (!folder[0] || !path_of(a, from, source) || !path_of(b, to, target)) return 0;
  if (below(target)) note(call, source, target);
  return fails(NAME, target);
}

/* Errors that the system itself gives count as well. */
static long met(long result, int descriptor) {
  char path[PATH_MAX];
  if (result < 0 && folder[0] && path_of(descriptor, NULL, path) && below(path)) counters->failed++;
  return result;
}

static long met_in(long result, int at, const char *name) {
  char path[PATH_MAX];
  if (result < 0 && errno != EEXIST && folder[0] && path_of(at, name, path) && below(path)) counters->failed++;
  return result;
}

static mode_t mode_of(int flags, va_list list) { return flags & O_CREAT ? va_arg(list, mode_t) : 0; }

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    va_list list; va_start(list, flags); mode_t mode = mode_of(flags, list); va_end(list); \
    REAL(name); \
    if ((flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT)) return real(path, flags, mode); \
    if ((flags & O_CREAT) && fails_in(MAKE, "make", AT_FDCWD, path)) return -1; \
    return met_in(real(path, flags, mode), AT_FDCWD, path); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    va_list list; va_start(list, flags); mode_t mode = mode_of(flags, list); va_end(list); \
    REAL(name); \
    if ((flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT)) return real(at, path, flags, mode); \
    if ((flags & O_CREAT) && fails_in(MAKE, "make", at, path)) return -1; \
    return met_in(real(at, path, flags, mode), at, path); \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
  FILE *name(const char *path, const char *mode) { \
    REAL(name); \
    return strpbrk(mode, "wa") && fails_in(MAKE, "make", AT_FDCWD, path) ? NULL : real(path, mode); \
  }
FOPEN(fopen)
FOPEN(fopen64)

#define HALVED(d, size, all, half) \
  int how = fails_at(WRITE, "write", d); \
  if (how == HALF && (size) > 1) return half; \
  if (how) return errno = number, -1; \
  return met(all, d);

ssize_t write(int d, const void *data, size_t size) {
  REAL(write);
  HALVED(d, size, real(d, data, size), real(d, data, size / 2))
}
ssize_t pwrite(int d, const void *data, size_t size, off_t at) {
  REAL(pwrite);
  HALVED(d, size, real(d, data, size, at), real(d, data, size / 2, at))
}
ssize_t pwrite64(int d, const void *data, size_t size, off64_t at) {
  REAL(pwrite64);
  HALVED(d, size, real(d, data, size, at), real(d, data, size / 2, at))
}
ssize_t writev(int d, const struct iovec *parts, int count) {
  REAL(writev);
  HALVED(d, count ? parts->iov_len : 0, real(d, parts, count), write_plainly(d, parts->iov_base, parts->iov_len / 2))
}
ssize_t sendfile(int d, int from, off_t *at, size_t size) {
  REAL(sendfile);
  HALVED(d, size, real(d, from, at, size), real(d, from, at, size / 2))
}
ssize_t sendfile64(int d, int from, off64_t *at, size_t size) {
  REAL(sendfile64);
  HALVED(d, size, real(d, from, at, size), real(d, from, at, size / 2))
}
int ftruncate(int d, off_t size) { REAL(ftruncate); return fails_at(MAKE, "truncate", d) ? -1 : met(real(d, size), d); }
int ftruncate64(int d, off64_t size) { REAL(ftruncate64); return fails_at(MAKE, "truncate", d) ? -1 : met(real(d, size), d); }
int fsync(int d) { REAL(fsync); return fails_at(FLUSH, "sync", d) ? -1 : met(real(d), d); }
int fdatasync(int d) { REAL(fdatasync); return fails_at(FLUSH, "sync", d) ? -1 : met(real(d), d); }

int rename(const char *from, const char *to) {
  REAL(rename);
  return fails_from_to("rename", AT_FDCWD, from, AT_FDCWD, to) ? -1 : met_in(real(from, to), AT_FDCWD, to);
}
int renameat(int a, const char *from, int b, const char *to) {
  REAL(renameat);
  return fails_from_to("rename", a, from, b, to) ? -1 : met_in(real(a, from, b, to), b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  REAL(renameat2);
  return fails_from_to("rename", a, from, b, to) ? -1 : met_in(real(a, from, b, to, flags), b, to);
}
int link(const char *from, const char *to) {
  REAL(link);
  return fails_from_to("link", AT_FDCWD, from, AT_FDCWD, to) ? -1 : met_in(real(from, to), AT_FDCWD, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
  REAL(linkat);
  return fails_from_to("link", a, from, b, to) ? -1 : met_in(real(a, from, b, to, flags), b, to);
}
int mkdir(const char *path, mode_t mode) {
  REAL(mkdir);
  return fails_in(MAKE, "folder", AT_FDCWD, path) ? -1 : met_in(real(path, mode), AT_FDCWD, path);
}
int mkdirat(int at, const char *path, mode_t mode) {
  REAL(mkdirat);
  return fails_in(MAKE, "folder", at, path) ? -1 : met_in(real(at, path, mode), at, path);
}

/* A file that is not there is no file that cannot be removed. */
int unlink(const char *path) {
  REAL(unlink);
  return !faccessat(AT_FDCWD, path, F_OK, AT_SYMLINK_NOFOLLOW) && fails_in(REMOVE, "remove", AT_FDCWD, path) ? -1 : real(path);
}
int unlinkat(int at, const char *path, int flags) {
  REAL(unlinkat);
  return !faccessat(at, path, F_OK, AT_SYMLINK_NOFOLLOW) && fails_in(REMOVE, "remove", at, path) ? -1 : real(at, path, flags);
}

/* Network file systems say at last at the close what has not been written; the descriptor is gone all the same. */
int close(int d) {
  REAL(close);
  int flags = folder[0] ? fcntl(d, F_GETFL) : -1;
  int failed = flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && fails_at(CLOSE, "close", d);
  int result = real(d);
  return failed ? errno = number, -1 : result;
}

/* The wall clock alone: a monotonic one never jumps. Back and forth, further at every reading. */
static long offset(void) {
  if (!jump) return 0;
  long tick = ++counters->ticks;
  return (tick % 2 ? jump : -jump) * (1 + tick % 7);
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
