// Preloaded into a process, makes chosen system calls fail on files under one folder. See faults.py.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static const char *const NAMES[] = {"open",      "flock",           "pread", "read",      "pwrite", "ftruncate",
                                    "fallocate", "posix_fallocate", "fsync", "fdatasync", "rename", "unlink"};
enum { OPEN, FLOCK, PREAD, READ, PWRITE, FTRUNCATE, FALLOCATE, POSIX_FALLOCATE, FSYNC, FDATASYNC, RENAME, UNLINK, ALL };
enum { SHORT = -1 };

static char folder[4096];
static atomic_long calls[ALL];
static int armed = ALL, armed_error, armed_forever;
static long armed_call;

// Count the calls under `folder` anew. Call number `n`, from 1, of `function` will fail with `error`, or write only half
// if that is -1; with `forever` all later ones, too. With n = 0 none fails.
void arm(const char *under, const char *function, long n, int error, int forever) {
    snprintf(folder, sizeof folder, "%s/", under);
    for (int f = 0; f < ALL; f++) {
        calls[f] = 0;
        if (strcmp(NAMES[f], function) == 0) armed = f;
    }
    armed_call = n, armed_error = error, armed_forever = forever;
}

long calls_of(const char *function) {
    for (int f = 0; f < ALL; f++)
        if (strcmp(NAMES[f], function) == 0) return calls[f];
    return -1;
}

static int fault(int function, const char *path) {
    if (!*folder || strncmp(path, folder, strlen(folder)) != 0) return 0;
    long call = ++calls[function];
    if (function != armed || armed_call == 0) return 0;
    return call == armed_call || (armed_forever && call > armed_call) ? armed_error : 0;
}

static int fault_of_fd(int function, int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fault(function, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_IF(fault_expression, name, ...)     \
    do {                                         \
        int error = fault_expression;            \
        if (error > 0) return errno = error, -1; \
        return REAL(name)(__VA_ARGS__);          \
    } while (0)

int open64(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = va_arg(arguments, mode_t);
    va_end(arguments);
    FAIL_IF(fault(OPEN, path), open64, path, flags, mode);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    int error = fault_of_fd(PWRITE, fd);
    if (error == SHORT) return REAL(pwrite64)(fd, data, size > 1 ? size / 2 : size, offset);
    if (error) return errno = error, -1;
    return REAL(pwrite64)(fd, data, size, offset);
}

int posix_fallocate64(int fd, off64_t offset, off64_t size) {  // returns its error
    int error = fault_of_fd(POSIX_FALLOCATE, fd);
    return error > 0 ? error : REAL(posix_fallocate64)(fd, offset, size);
}

extern int flock(int, int);
int flock(int fd, int how) { FAIL_IF(fault_of_fd(FLOCK, fd), flock, fd, how); }
ssize_t read(int fd, void *data, size_t size) { FAIL_IF(fault_of_fd(READ, fd), read, fd, data, size); }
ssize_t pread64(int fd, void *data, size_t size, off64_t at) { FAIL_IF(fault_of_fd(PREAD, fd), pread64, fd, data, size, at); }
int ftruncate64(int fd, off64_t size) { FAIL_IF(fault_of_fd(FTRUNCATE, fd), ftruncate64, fd, size); }
int fallocate(int fd, int mode, off_t at, off_t size) { FAIL_IF(fault_of_fd(FALLOCATE, fd), fallocate, fd, mode, at, size); }
// Nothing here has to survive a power failure, and syncing would take most of the time.
int fsync(int fd) { int error = fault_of_fd(FSYNC, fd); return error > 0 ? (errno = error, -1) : 0; }
int fdatasync(int fd) { int error = fault_of_fd(FDATASYNC, fd); return error > 0 ? (errno = error, -1) : 0; }
int rename(const char *from, const char *to) { FAIL_IF(fault(RENAME, from), rename, from, to); }
int unlink(const char *path) { FAIL_IF(fault(UNLINK, path), unlink, path); }
