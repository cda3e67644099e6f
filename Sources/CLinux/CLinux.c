#define _GNU_SOURCE
#include "CLinux.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <malloc.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

const int clinux_SEEK_DATA = SEEK_DATA;
const int clinux_SEEK_HOLE = SEEK_HOLE;
const int clinux_O_TMPFILE = O_TMPFILE;
const int clinux_O_DIRECT = O_DIRECT;
const int clinux_O_PATH = O_PATH;
const int clinux_FALLOC_FL_KEEP_SIZE = FALLOC_FL_KEEP_SIZE;
const int clinux_FALLOC_FL_PUNCH_HOLE = FALLOC_FL_PUNCH_HOLE;
const int clinux_FALLOC_FL_ZERO_RANGE = FALLOC_FL_ZERO_RANGE;

static int argument_count;
static char **arguments;

// The C library hands constructors the arguments of `main`. Swift's own way reads /proc or searches
// the memory around the environment, and finds nothing if one is missing or the other was moved.
__attribute__((constructor)) static void keep_arguments(int count, char **values) {
    argument_count = count;
    arguments = values;
}

int clinux_argument_count(void) { return argument_count; }
const char *clinux_argument(int index) { return arguments[index]; }

int clinux_open_standard_descriptors(void) {
    for (int descriptor = STDIN_FILENO; descriptor <= STDERR_FILENO; descriptor++) {
        if (fcntl(descriptor, F_GETFD) >= 0) continue;
        // The lowest free number is this one. Without /dev the root folder takes the place: writing
        // to it is an error, and harms no image.
        int opened = open("/dev/null", O_RDWR);
        if (opened < 0) opened = open("/", O_RDONLY | O_DIRECTORY);
        if (opened < 0) return -1;
    }
    return 0;
}

// Flags that say how a file is to be kept. Immutable and append-only are not copied: we could not
// write the file, and one that has them cannot be replaced. The others tell what the file system
// has done.
static const unsigned int kept_flags = FS_SECRM_FL | FS_UNRM_FL | FS_COMPR_FL | FS_SYNC_FL | FS_NODUMP_FL |
                                       FS_NOATIME_FL | FS_NOCOMP_FL | FS_JOURNAL_DATA_FL | FS_NOTAIL_FL |
                                       FS_NOCOW_FL | FS_DAX_FL | FS_PROJINHERIT_FL;
static const unsigned int kept_xflags = FS_XFLAG_REALTIME | FS_XFLAG_EXTSIZE | FS_XFLAG_COWEXTSIZE |
                                        FS_XFLAG_NODEFRAG;

static int copy_extended_flags(int from, int to) {
    struct fsxattr old, new;
    if (ioctl(from, FS_IOC_FSGETXATTR, &old) != 0 || ioctl(to, FS_IOC_FSGETXATTR, &new) != 0) return 0;
    const unsigned int old_flags = old.fsx_xflags & kept_xflags, new_flags = new.fsx_xflags & kept_xflags;
    const int same_extents = (old_flags & FS_XFLAG_EXTSIZE) == 0 || old.fsx_extsize == new.fsx_extsize;
    const int same_copies = (old_flags & FS_XFLAG_COWEXTSIZE) == 0 || old.fsx_cowextsize == new.fsx_cowextsize;
    if (old_flags == new_flags && same_extents && same_copies && old.fsx_projid == new.fsx_projid) return 0;
    new.fsx_xflags = (new.fsx_xflags & ~kept_xflags) | old_flags;
    new.fsx_extsize = old.fsx_extsize;
    new.fsx_cowextsize = old.fsx_cowextsize;
    new.fsx_projid = old.fsx_projid;
    return ioctl(to, FS_IOC_FSSETXATTR, &new);
}

int clinux_copy_inode_flags(int from, int to) {
    unsigned int old = 0, new = 0;
    if (ioctl(from, FS_IOC_GETFLAGS, &old) == 0 && ioctl(to, FS_IOC_GETFLAGS, &new) == 0 &&
        (old & kept_flags) != (new & kept_flags)) {
        new = (new & ~kept_flags) | (old & kept_flags);
        if (ioctl(to, FS_IOC_SETFLAGS, &new) != 0) return -1;
    }
    return copy_extended_flags(from, to);
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

void clinux_thread_usage(int64_t *nanoseconds, int64_t *sleeps) {
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    *nanoseconds = (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000
                   + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000;
    *sleeps = usage.ru_nvcsw;
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

static int has_attribute(int folder, const char *name, uint64_t attribute) {
    struct statx status;
    return statx(folder, name, AT_EMPTY_PATH, STATX_BASIC_STATS, &status) == 0 &&
           (status.stx_attributes_mask & attribute) != 0 && (status.stx_attributes & attribute) != 0;
}

int clinux_is_mount_root(int folder, const char *name) {
    return has_attribute(folder, name, STATX_ATTR_MOUNT_ROOT);
}

int clinux_is_append_only(int folder) { return has_attribute(folder, "", STATX_ATTR_APPEND); }

int clinux_is_process_folder(int folder) {
    struct statfs system;
    return fstatfs(folder, &system) == 0 && system.f_type == PROC_SUPER_MAGIC;
}

static _Thread_local bool is_executor_thread;

bool clinux_is_executor_thread(void) { return is_executor_thread; }
void clinux_become_executor_thread(void) { is_executor_thread = true; }

void clinux_limit_malloc_arenas(void) { mallopt(M_ARENA_MAX, 1); }

char *const *clinux_environment(void) { return environ; }

int clinux_eventfd(void) { return eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC); }

void clinux_start_writeback(int descriptor, int64_t offset, int64_t count) {
    int before = errno;
    sync_file_range(descriptor, offset, count, SYNC_FILE_RANGE_WRITE);
    errno = before;
}
