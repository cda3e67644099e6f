#define _GNU_SOURCE
#include "CLinux.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <malloc.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

const int clinux_SEEK_DATA = SEEK_DATA;
const int clinux_SEEK_HOLE = SEEK_HOLE;
const int clinux_O_TMPFILE = O_TMPFILE;
const int clinux_O_DIRECT = O_DIRECT;
const int clinux_O_DSYNC = O_DSYNC;
const int clinux_FALLOC_FL_KEEP_SIZE = FALLOC_FL_KEEP_SIZE;
const int clinux_FALLOC_FL_PUNCH_HOLE = FALLOC_FL_PUNCH_HOLE;
const int clinux_FALLOC_FL_ZERO_RANGE = FALLOC_FL_ZERO_RANGE;

int clinux_open(const char *path, int flags, unsigned int mode) {
    return open(path, flags, mode);
}

int clinux_clone_range(
    int fd, uint64_t offset, int source_fd, uint64_t source_offset, uint64_t length) {
    struct file_clone_range range = {
        .src_fd = source_fd, .src_offset = source_offset, .src_length = length,
        .dest_offset = offset};
    return ioctl(fd, FICLONERANGE, &range);
}

ssize_t clinux_read_cached(int fd, void *buffer, size_t size, int64_t offset) {
    struct iovec vector = {.iov_base = buffer, .iov_len = size};
    return preadv2(fd, &vector, 1, offset, RWF_NOWAIT);
}

int clinux_core_count(void) {
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
}

int clinux_fallocate(int fd, int mode, int64_t offset, int64_t length) {
    return fallocate(fd, mode, offset, length);
}

int clinux_set_no_cow(int fd) {
    int flags;
    if (ioctl(fd, FS_IOC_GETFLAGS, &flags) != 0) return -1;
    flags |= FS_NOCOW_FL;
    return ioctl(fd, FS_IOC_SETFLAGS, &flags);
}

int clinux_set_extent_size_hint(int fd, uint32_t bytes) {
    struct fsxattr attributes;
    if (ioctl(fd, FS_IOC_FSGETXATTR, &attributes) != 0) return -1;
    attributes.fsx_xflags |= FS_XFLAG_EXTSIZE;
    attributes.fsx_extsize = bytes;
    return ioctl(fd, FS_IOC_FSSETXATTR, &attributes);
}

int clinux_device_size(int fd, uint64_t *bytes) {
    return ioctl(fd, BLKGETSIZE64, bytes);
}

int clinux_device_zero(int fd, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return ioctl(fd, BLKZEROOUT, range);
}

int clinux_device_discard_zeroes(int fd) {
    unsigned int zeroes = 0;
    return ioctl(fd, BLKDISCARDZEROES, &zeroes) == 0 && zeroes != 0;
}

int clinux_device_discard(int fd, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return ioctl(fd, BLKDISCARD, range);
}

int clinux_ofd_lock(int fd, short type, int64_t start, int64_t length) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    return fcntl(fd, F_OFD_SETLK, &lock);
}

int clinux_ofd_is_locked(int fd, int64_t start, int64_t length) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    if (fcntl(fd, F_OFD_GETLK, &lock) < 0) return -1;
    return lock.l_type != F_UNLCK;
}

ssize_t clinux_readlink(const char *path, void *buffer, size_t size) {
    return readlink(path, (char *)buffer, size);
}

int clinux_is_mount_root(const char *path) {
    struct statx status;
    return statx(AT_FDCWD, path, 0, STATX_BASIC_STATS, &status) == 0 &&
           (status.stx_attributes_mask & STATX_ATTR_MOUNT_ROOT) != 0 &&
           (status.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0;
}

void clinux_limit_malloc_arenas(void) { mallopt(M_ARENA_MAX, 1); }

char *const *clinux_environment(void) { return environ; }

int clinux_eventfd(void) { return eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC); }

int64_t clinux_file_system(int fd) {
    struct statfs system;
    return fstatfs(fd, &system) == 0 ? (int64_t)system.f_type : -1;
}

int clinux_open_queue(unsigned long *queue) {
    *queue = 0;
    if (syscall(SYS_io_setup, clinux_queue_depth, queue) != 0) return -1;
    // Once writes are under way nothing can be done without this call: what refuses it has to do so now.
    if (syscall(SYS_io_getevents, *queue, 0, 0, NULL, NULL) == 0) return 0;
    clinux_close_queue(*queue);
    return -1;
}

void clinux_close_queue(unsigned long queue) { syscall(SYS_io_destroy, queue); }

void clinux_write_together(unsigned long queue, int fd, struct clinux_write *writes, int count) {
    struct iocb blocks[clinux_queue_depth] = {0}, *list[clinux_queue_depth];
    struct io_event events[clinux_queue_depth];
    for (int index = 0; index < count; index++) {
        struct clinux_write *write = &writes[index];
        blocks[index] = (struct iocb){
            .aio_data = index, .aio_fildes = fd, .aio_lio_opcode = IOCB_CMD_PWRITEV,
            .aio_buf = (uintptr_t)write->pieces, .aio_nbytes = write->piece_count,
            .aio_offset = write->offset};
        list[index] = &blocks[index];
        write->result = -EAGAIN;
    }
    // It stops at the first that it refuses at once.
    long begun = syscall(SYS_io_submit, queue, count, list);
    for (long ended = 0; ended < begun;) {
        long news = syscall(SYS_io_getevents, queue, begun - ended, begun - ended, events, NULL);
        // Interrupted. The memory is the kernel's until all have ended.
        if (news < 0) continue;
        for (long index = 0; index < news; index++) writes[events[index].data].result = events[index].res;
        ended += news;
    }
}
