// Simulates storage latency. Preloaded into a program, this library sleeps before each data system
// call of 4 KiB or more (SLEEP_READ and SLEEP_WRITE microseconds) and before each fallocate
// (SLEEP_ZERO microseconds). RWF_NOWAIT calls fail with EAGAIN, as if the page cache were empty.
// SLEEP_LOG names a file to which each call appends a line with the number of sleeping calls.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static const size_t smallest = 4096;

static long microseconds(const char *name) {
    const char *value = getenv(name);
    return value ? atol(value) : 0;
}

static void note(int sleepers) {
    const char *path = getenv("SLEEP_LOG");
    if (!path) return;
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
    char line[16];
    int length = snprintf(line, sizeof line, "%d\n", sleepers);
    if (file >= 0) {
        syscall(SYS_write, file, line, length);
        close(file);
    }
}

static void wait_for(const char *name, size_t count) {
    if (count < smallest) return;
    long time = microseconds(name);
    if (time <= 0) return;
    static atomic_int sleepers;
    note(atomic_fetch_add(&sleepers, 1) + 1);
    struct timespec rest = {.tv_sec = time / 1000000, .tv_nsec = time % 1000000 * 1000};
    while (nanosleep(&rest, &rest) < 0) {
    }
    atomic_fetch_sub(&sleepers, 1);
}

static size_t length(const struct iovec *pieces, int count) {
    size_t sum = 0;
    for (int i = 0; i < count; i++) sum += pieces[i].iov_len;
    return sum;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, #name)

#define PLAIN(name, memory, sleep) \
    ssize_t name(int fd, memory bytes, size_t count, off64_t offset) { \
        REAL(name); \
        wait_for(sleep, count); \
        return real(fd, bytes, count, offset); \
    }
PLAIN(pread, void *, "SLEEP_READ")
PLAIN(pread64, void *, "SLEEP_READ")
PLAIN(pwrite, const void *, "SLEEP_WRITE")
PLAIN(pwrite64, const void *, "SLEEP_WRITE")

#define VECTOR(name, sleep) \
    ssize_t name(int fd, const struct iovec *pieces, int count, off64_t offset) { \
        REAL(name); \
        wait_for(sleep, length(pieces, count)); \
        return real(fd, pieces, count, offset); \
    }
VECTOR(preadv, "SLEEP_READ")
VECTOR(preadv64, "SLEEP_READ")
VECTOR(pwritev, "SLEEP_WRITE")
VECTOR(pwritev64, "SLEEP_WRITE")

#define VECTOR2(name, sleep) \
    ssize_t name(int fd, const struct iovec *pieces, int count, off64_t offset, int flags) { \
        REAL(name); \
        size_t size = length(pieces, count); \
        if (flags & RWF_NOWAIT && size >= smallest && microseconds(sleep) > 0) { \
            errno = EAGAIN; \
            return -1; \
        } \
        wait_for(sleep, size); \
        return real(fd, pieces, count, offset, flags); \
    }
VECTOR2(preadv2, "SLEEP_READ")
VECTOR2(preadv64v2, "SLEEP_READ")
VECTOR2(pwritev2, "SLEEP_WRITE")
VECTOR2(pwritev64v2, "SLEEP_WRITE")

ssize_t read(int fd, void *bytes, size_t count) {
    REAL(read);
    wait_for("SLEEP_READ", count);
    return real(fd, bytes, count);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    REAL(write);
    wait_for("SLEEP_WRITE", count);
    return real(fd, bytes, count);
}

#define ZERO(name) \
    int name(int fd, int mode, off64_t offset, off64_t length) { \
        REAL(name); \
        wait_for("SLEEP_ZERO", smallest); \
        return real(fd, mode, offset, length); \
    }
ZERO(fallocate)
ZERO(fallocate64)
