// The few Linux names that Swift's Glibc module hides: variadic calls, function-like macros
// and constants behind _GNU_SOURCE. No logic lives here.
#ifndef CSYSTEM_H
#define CSYSTEM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/xattr.h>
#include <unistd.h>

static const int csystem_SEEK_DATA = SEEK_DATA;
static const int csystem_SEEK_HOLE = SEEK_HOLE;
static const int csystem_O_TMPFILE = O_TMPFILE;
static const int csystem_O_DIRECT = O_DIRECT;
static const int csystem_O_DSYNC = O_DSYNC;
static const int csystem_FALLOC_FL_KEEP_SIZE = FALLOC_FL_KEEP_SIZE;
static const int csystem_FALLOC_FL_PUNCH_HOLE = FALLOC_FL_PUNCH_HOLE;
static const int csystem_FALLOC_FL_ZERO_RANGE = FALLOC_FL_ZERO_RANGE;
static const int csystem_AT_EMPTY_PATH = AT_EMPTY_PATH;

static inline int csystem_open(const char *path, int flags, unsigned int mode) {
    return open(path, flags, mode);
}

static inline int csystem_openat(int directory, const char *path, int flags, unsigned int mode) {
    return openat(directory, path, flags, mode);
}

static inline int csystem_fallocate(int fd, int mode, int64_t offset, int64_t length) {
    return fallocate(fd, mode, offset, length);
}

/// BLKGETSIZE64: the size of a block device in bytes.
static inline int csystem_device_size(int fd, uint64_t *bytes) {
    return ioctl(fd, BLKGETSIZE64, bytes);
}

/// BLKSSZGET: the logical sector size of a block device in bytes.
static inline int csystem_device_sector_size(int fd, int *bytes) {
    return ioctl(fd, BLKSSZGET, bytes);
}

/// BLKZEROOUT: zeros a sector-aligned range of a block device; the kernel writes zeros if it must.
static inline int csystem_device_zero(int fd, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return ioctl(fd, BLKZEROOUT, range);
}

/// BLKDISCARDZEROES: whether a discarded range is guaranteed to read as zeros (0 since Linux 4.12).
static inline int csystem_device_discard_zeroes(int fd) {
    unsigned int zeroes = 0;
    return ioctl(fd, BLKDISCARDZEROES, &zeroes) == 0 && zeroes != 0;
}

/// BLKDISCARD: gives a sector-aligned range of a block device back.
static inline int csystem_device_discard(int fd, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return ioctl(fd, BLKDISCARD, range);
}

/// Takes (or, with F_UNLCK, drops) an open-file-description lock on one byte range.
static inline int csystem_ofd_lock(int fd, short type, int64_t start, int64_t length) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    return fcntl(fd, F_OFD_SETLK, &lock);
}

/// 1 if another open file description holds a lock in the range, 0 if not, -1 with errno.
static inline int csystem_ofd_is_locked(int fd, int64_t start, int64_t length) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    if (fcntl(fd, F_OFD_GETLK, &lock) < 0) return -1;
    return lock.l_type != F_UNLCK;
}

static inline ssize_t csystem_readlink(const char *path, void *buffer, size_t size) {
    return readlink(path, (char *)buffer, size);
}

/// Whether something is mounted at this very path (a file bound into a container, say).
static inline int csystem_is_mount_root(const char *path) {
    struct statx status;
    return statx(AT_FDCWD, path, 0, STATX_BASIC_STATS, &status) == 0 &&
           (status.stx_attributes_mask & STATX_ATTR_MOUNT_ROOT) != 0 &&
           (status.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0;
}

/// One malloc arena for all threads: the big buffers are allocated once, so contention is no
/// concern, and every further arena costs address space (callers run us under RLIMIT_AS).
static inline void csystem_limit_malloc_arenas(void) { mallopt(M_ARENA_MAX, 1); }

#endif
