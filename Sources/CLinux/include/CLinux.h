// The few Linux names that Swift's Glibc module hides: variadic calls, function-like macros and
// constants behind _GNU_SOURCE. No logic lives here. Defining _GNU_SOURCE in this header would give
// Swift a second view of the system's types, so everything that needs it is in CLinux.c.
#ifndef CLINUX_H
#define CLINUX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/xattr.h>

extern const int clinux_SEEK_DATA;
extern const int clinux_SEEK_HOLE;
extern const int clinux_O_TMPFILE;
extern const int clinux_O_DIRECT;
extern const int clinux_O_PATH;
extern const int clinux_FALLOC_FL_KEEP_SIZE;
extern const int clinux_FALLOC_FL_PUNCH_HOLE;
extern const int clinux_FALLOC_FL_ZERO_RANGE;

/// FICLONERANGE: makes a range of `fd` share the blocks of a range of `source_fd`.
int clinux_clone_range(
    int fd, uint64_t offset, int source_fd, uint64_t source_offset, uint64_t length);

/// The process's arguments as `main` got them, independent of /proc and the environment.
int clinux_argument_count(void);
const char *clinux_argument(int index);

/// Opens /dev/null as those of descriptors 0, 1 and 2 that are closed. Otherwise the next file to
/// be opened would become the standard output, and messages would be written into it. -1 with errno
/// if that fails.
int clinux_open_standard_descriptors(void);

int clinux_fallocate(int fd, int mode, int64_t offset, int64_t length);

/// Gives a file the inode flags (chattr), the project and the extent size hint of another file. 0
/// also if the file system knows none; -1 with errno if a flag of the other file cannot be set.
int clinux_copy_inode_flags(int from, int to);

/// FS_NOCOW_FL: asks a file system to write to a file in place instead of to copies of its blocks.
int clinux_set_no_cow(int fd);

/// FS_IOC_FSSETXATTR: sets the unit in bytes in which a file's blocks are allocated.
int clinux_set_extent_size_hint(int fd, uint32_t bytes);

/// BLKGETSIZE64: the size of a block device in bytes.
int clinux_device_size(int fd, uint64_t *bytes);

/// BLKZEROOUT: zeros a sector-aligned range of a block device; the kernel writes zeros if it must.
int clinux_device_zero(int fd, uint64_t offset, uint64_t length);

/// BLKDISCARDZEROES: whether a discarded range is guaranteed to read as zeros (0 since Linux 4.12).
int clinux_device_discard_zeroes(int fd);

/// BLKDISCARD: gives a sector-aligned range back to a block device.
int clinux_device_discard(int fd, uint64_t offset, uint64_t length);

/// Takes an open-file-description lock on a byte range or, with F_UNLCK, drops it.
int clinux_ofd_lock(int fd, short type, int64_t start, int64_t length);

/// Returns 1 if another open file description holds a lock in the range, 0 if not, -1 with errno.
int clinux_ofd_is_locked(int fd, int64_t start, int64_t length);

/// Reads what the page cache holds of a range, from its first byte on, and never sleeps. Negative
/// if the cache holds nothing or cannot tell.
ssize_t clinux_read_cached(int fd, void *buffer, size_t size, int64_t offset);

/// Processor time of the calling thread in nanoseconds, and the number of times that it slept.
void clinux_thread_usage(int64_t *nanoseconds, int64_t *sleeps);

/// Begins to write dirty pages of a file to the disk. Only a hint.
void clinux_start_writeback(int descriptor, int64_t offset, int64_t count);

/// Number of cores that the process may run on.
int clinux_core_count(void);

/// Whether the root of a mount is exactly here (for example a file bound into a container).
int clinux_is_mount_root(int folder, const char *name);

/// Whether names can be added to an open folder but not changed or removed (chattr +a).
int clinux_is_append_only(int folder);

/// Whether a folder belongs to /proc: its links are not paths but lead to open files.
int clinux_is_process_folder(int folder);

/// A descriptor that can be read once another thread has written to it; neither ever blocks.
int clinux_eventfd(void);

/// The environment for a new process: our own.
char *const *clinux_environment(void);

/// Whether the calling thread is one of the executor's. A thread-local variable says so, and not a
/// pthread key, because keys can run out.
bool clinux_is_executor_thread(void);
void clinux_become_executor_thread(void);

/// Limits malloc to one arena for all threads: the big buffers are allocated once, so contention
/// does not matter, and every further arena costs address space (callers run us under RLIMIT_AS).
void clinux_limit_malloc_arenas(void);

#endif
