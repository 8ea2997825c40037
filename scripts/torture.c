/* Faults in system calls on files below a directory, for scripts/torture. Loaded with LD_PRELOAD.
 *
 * TORTURE_CONTROL names a file that all processes map. While `call` is set, every call of that kind on a file below
 * `directory` is counted, and the one that brings `remaining` to 0 fails with `error`, writes half of its bytes if
 * `error` is 0, or kills the process if `error` is -1. The real-time clock is shifted by `clock_shift` seconds.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { NONE, WRITE, FSYNC, RENAME, OPEN };
struct control {
    atomic_int call, remaining, error, injected;
    atomic_int seen[5];
    atomic_long clock_shift;
    char directory[4096];
};
static struct control *control;

__attribute__((constructor)) static void map_control(void) {
    const char *path = getenv("TORTURE_CONTROL");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *memory = fd < 0 ? MAP_FAILED : mmap(0, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    control = memory == MAP_FAILED ? 0 : memory;
    if (fd >= 0) close(fd);
}

static int is_below(const char *path) {
    char directory[4096];
    if (path && path[0] != '/') path = getcwd(directory, sizeof directory);
    size_t length = strlen(control->directory);
    return path && strncmp(path, control->directory, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int is_descriptor_below(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return path[0] == '/' && is_below(path); /* not "pipe:[1]" */
}

/* Returns whether this call is the one to fail. */
static int is_chosen(int call) {
    atomic_fetch_add(&control->seen[call], 1);
    if (atomic_load(&control->call) != call || atomic_fetch_sub(&control->remaining, 1) != 1) return 0;
    atomic_store(&control->injected, 1);
    if (control->error == -1) kill(getpid(), SIGKILL);
    return 1;
}

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))
#define FAIL_IF(chosen) if (control && (chosen) && control->error) { errno = control->error; return -1; }

ssize_t write(int fd, const void *data, size_t size) {
    if (control && is_descriptor_below(fd) && is_chosen(WRITE)) {
        if (control->error) { errno = control->error; return -1; }
        size = (size + 1) / 2;
    }
    return REAL(write)(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    if (control && is_descriptor_below(fd) && is_chosen(WRITE)) {
        if (control->error) { errno = control->error; return -1; }
        size = (size + 1) / 2;
    }
    return REAL(pwrite64)(fd, data, size, offset);
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
    if (control && is_descriptor_below(to) && is_chosen(WRITE)) {
        if (control->error) { errno = control->error; return -1; }
        size = (size + 1) / 2;
    }
    return REAL(sendfile64)(to, from, offset, size);
}

int posix_fallocate64(int fd, off64_t offset, off64_t size) { /* returns the error, and cannot be short */
    if (control && is_descriptor_below(fd) && is_chosen(WRITE) && control->error) return control->error;
    return REAL(posix_fallocate64)(fd, offset, size);
}

int fsync(int fd) {
    FAIL_IF(is_descriptor_below(fd) && is_chosen(FSYNC))
    return REAL(fsync)(fd);
}

int fdatasync(int fd) {
    FAIL_IF(is_descriptor_below(fd) && is_chosen(FSYNC))
    return REAL(fdatasync)(fd);
}

int rename(const char *old, const char *new) {
    FAIL_IF(is_below(new) && is_chosen(RENAME))
    return REAL(rename)(old, new);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    FAIL_IF(is_below(new) && is_chosen(RENAME))
    return REAL(renameat2)(from, old, to, new, flags);
}

int open64(const char *path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(list, mode_t) : 0;
    va_end(list);
    FAIL_IF(flags & O_CREAT && is_below(path) && is_chosen(OPEN))
    return REAL(open64)(path, flags, mode);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = REAL(clock_gettime)(clock, now);
    if (control && clock == CLOCK_REALTIME && status == 0) now->tv_sec += atomic_load(&control->clock_shift);
    return status;
}
