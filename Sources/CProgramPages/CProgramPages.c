#define _GNU_SOURCE
#include "CProgramPages.h"

#include <endian.h>
#include <fcntl.h>
#include <link.h>
#include <linux/magic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

// How much has to be there for the cut to be worth its time, in bytes: allocated to a file that is compressed or read, or seen
// by the guest.
static const int64_t long_to_compress = 256LL << 20, long_to_read = 1LL << 30, long_to_walk = 1LL << 40;

// Whole pages of one segment of the program or a library; none if it is no such segment.
struct pages {
    uintptr_t start, end;
};

static struct pages segment_pages(const struct dl_phdr_info *object, int index) {
    const ElfW(Phdr) *segment = &object->dlpi_phdr[index];
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), base = object->dlpi_addr + segment->p_vaddr;
    struct pages pages = {(base + page - 1) / page * page, (base + segment->p_memsz) / page * page};
    if (segment->p_type != PT_LOAD || pages.end < pages.start) pages.end = pages.start;
    return pages;
}

static int release_pages(struct dl_phdr_info *object, size_t size, void *context) {
    (void)size;
    (void)context;
    for (int index = 0; index < object->dlpi_phnum; index++) {
        // A page that was ever writable may hold what the file does not.
        if ((object->dlpi_phdr[index].p_flags & PF_W) != 0) continue;
        struct pages pages = segment_pages(object, index);
        if (pages.start < pages.end) madvise((void *)pages.start, pages.end - pages.start, MADV_DONTNEED);
    }
    return 0;
}

void program_pages_release(void) { dl_iterate_phdr(release_pages, NULL); }

static int divide_mappings(struct dl_phdr_info *object, size_t size, void *context) {
    (void)size;
    (void)context;
    const uintptr_t piece = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (int index = 0; index < object->dlpi_phnum; index++) {
        struct pages pages = segment_pages(object, index);
        // Mappings with different advice stay apart. This one means nothing to mappings of files, but is kept.
        for (uintptr_t at = pages.start / (2 * piece) * 2 * piece; at < pages.end; at += 2 * piece) {
            uintptr_t start = at > pages.start ? at : pages.start;
            uintptr_t end = at + piece < pages.end ? at + piece : pages.end;
            // The kernel's own page in each process refuses it, and everything where there are no huge pages.
            if (start < end && madvise((void *)start, end - start, MADV_NOHUGEPAGE) != 0) return 0;
        }
    }
    return 0;
}

// Whether there is a -c in it, by itself or with other letters that need nothing behind them.
static bool is_compressing(const char *word) {
    return word[0] == '-' && memchr(word + 1, 'c', strspn(word + 1, PROGRAM_PAGES_CONVERT_FLAGS)) != NULL;
}

// In bytes; 0 for what is no qcow2 image, as far as its first bytes tell.
static int64_t qcow2_size(int file) {
    struct {
        uint32_t magic, fields[5];
        uint64_t size;
    } header;
    if (pread(file, &header, sizeof header, 0) != sizeof header || be32toh(header.magic) != 0x514649fb) return 0;
    const uint64_t size = be64toh(header.size);
    return size > INT64_MAX ? INT64_MAX : (int64_t)size;
}

// Whether a conversion of it takes long, or is done without reading it.
static bool is_long(const char *path, bool compresses) {
    struct stat status;
    if (stat(path, &status) != 0 || !S_ISREG(status.st_mode)) return false;
    const int64_t allocated = (int64_t)status.st_blocks * 512;
    if (compresses && allocated >= long_to_compress) return true;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    const int64_t guest = qcow2_size(file);
    struct statfs system;
    // A raw image has only to be copied, which is soon over; where XFS and btrfs share blocks it takes the least memory.
    const bool shares = fstatfs(file, &system) == 0 && (system.f_type == XFS_SUPER_MAGIC || system.f_type == BTRFS_SUPER_MAGIC);
    close(file);
    return guest >= long_to_walk || (allocated >= long_to_read && (guest > 0 || shares));
}

// Before the runtimes of C++ and Swift begin, which alone touch more of the program than a long conversion does.
__attribute__((constructor(101))) static void prepare(int count, char **words) {
    if (count < 2 || strcmp(words[1], "convert") != 0) return;
    bool compresses = false;
    for (int index = 2; index < count; index++) compresses |= is_compressing(words[index]);
    for (int index = 2; index < count; index++) {
        if (!is_long(words[index], compresses)) continue;
        dl_iterate_phdr(divide_mappings, NULL);
        return program_pages_release();
    }
}
