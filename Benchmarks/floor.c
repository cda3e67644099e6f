// The lower bound for times on this machine: the same bytes are copied or decoded with the simplest
// calls on several threads.
//
// Usage: floor copy SOURCE TARGET
//        floor scan SOURCE TARGET                     leaves the target empty
//        floor zlib|zstd|plain SOURCE TARGET LIST
//        floor pack-zlib|pack-zstd SOURCE TARGET      appends clusters as they are done
//
// LIST is written by datasets.py: offset, length, guest offset and plain flag of each cluster. The
// program does not search for zeros or verify data, and a short read ends it.
#define _GNU_SOURCE
#include <fcntl.h>
#include <libdeflate.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

enum { threads = 8, cluster = 65536, block = 512 << 10 };

static struct piece { long offset, length, guest, plain; } *pieces;
static long piece_count, total;
static atomic_long next_piece, target_end;
static int source, target, is_zstd, is_scan;

static void require(int holds) {
    if (!holds) {
        perror("floor");
        exit(1);
    }
}

// Blocks begin at odd multiples of 64 KiB, as in swimg: aligned blocks are slower on some machines.
static void *copy(void *unused) {
    (void)unused;
    char *buffer = aligned_alloc(4096, block);
    for (;;) {
        long end = atomic_fetch_add(&next_piece, 1) * block + cluster, start = end - block;
        if (start < 0) start = 0;
        if (start >= total) return NULL;
        if (end > total) end = total;
        long data = lseek(source, start, SEEK_DATA);
        if (data < 0 || data >= end) continue;
        require(pread(source, buffer, end - start, start) == end - start);
        if (is_scan) {
            require(buffer[0] == 0 && memcmp(buffer, buffer + 1, end - start - 1) == 0);
            continue;
        }
        require(pwrite(target, buffer, end - start, start) == end - start);
    }
}

// Writes up to eight neighbouring clusters at once.
static void *decode(void *unused) {
    (void)unused;
    unsigned char in[2 * cluster], *out = aligned_alloc(4096, block);
    struct libdeflate_decompressor *inflater = libdeflate_alloc_decompressor();
    ZSTD_DCtx *zstd = ZSTD_createDCtx();
    for (;;) {
        long first = atomic_fetch_add(&next_piece, block / cluster), last = first + block / cluster;
        if (first >= piece_count) return NULL;
        if (last > piece_count) last = piece_count;
        long length = 0;
        for (long index = first; index < last; index++) {
            struct piece piece = pieces[index];
            unsigned char *place = out + length;
            long got = pread(source, piece.plain ? place : in, piece.length, piece.offset);
            require(got > 0);
            if (is_zstd && !piece.plain) {
                ZSTD_inBuffer from = {in, got, 0};
                ZSTD_outBuffer to = {place, cluster, 0};
                ZSTD_DCtx_reset(zstd, ZSTD_reset_session_only);
                while (to.pos < cluster) require(!ZSTD_isError(ZSTD_decompressStream(zstd, &to, &from)));
            } else if (!piece.plain) {
                size_t used, made;
                require(libdeflate_deflate_decompress_ex(inflater, in, got, place, cluster, &used, &made) == 0);
            }
            length += piece.plain ? got : cluster;
            if (index + 1 < last && pieces[index + 1].guest == piece.guest + cluster) continue;
            long start = piece.guest + (piece.plain ? got : cluster) - length;
            require(pwrite(target, out, length, start) == length);
            length = 0;
        }
    }
}

// Uses qemu-img's settings: zlib's default level with a 4 KiB window, zstd's default level.
static void *pack(void *unused) {
    (void)unused;
    static const unsigned char zeros[cluster];
    unsigned char *in = aligned_alloc(4096, cluster), out[cluster];
    ZSTD_CCtx *zstd = ZSTD_createCCtx();
    z_stream deflater = {0};
    require(deflateInit2(&deflater, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) == Z_OK);
    for (;;) {
        long start = atomic_fetch_add(&next_piece, 1) * cluster;
        if (start >= total) return NULL;
        long count = total - start < cluster ? total - start : cluster, length = 0;
        require(pread(source, in, count, start) == count);
        if (memcmp(in, zeros, count) == 0) continue;
        if (is_zstd) {
            size_t made = ZSTD_compressCCtx(zstd, out, count - 1, in, count, ZSTD_CLEVEL_DEFAULT);
            if (!ZSTD_isError(made)) length = made;
        } else {
            deflateReset(&deflater);
            deflater.next_in = in, deflater.avail_in = count, deflater.next_out = out, deflater.avail_out = count - 1;
            if (deflate(&deflater, Z_FINISH) == Z_STREAM_END) length = deflater.total_out;
        }
        long place = atomic_fetch_add(&target_end, length ? length : count);
        require(pwrite(target, length ? out : in, length ? length : count, place) == (length ? length : count));
    }
}

int main(int count, char **words) {
    require(count >= 4);
    source = open(words[2], O_RDONLY);
    unlink(words[3]);
    target = open(words[3], O_WRONLY | O_CREAT, 0644);
    require(source >= 0 && target >= 0);
    int is_packing = strncmp(words[1], "pack-", 5) == 0;
    is_zstd = strcmp(words[1], "zstd") == 0 || strcmp(words[1], "pack-zstd") == 0;
    is_scan = strcmp(words[1], "scan") == 0;
    struct stat status;
    require(fstat(source, &status) == 0);
    total = status.st_size;
    if (count > 4) {
        FILE *list = fopen(words[4], "r");
        require(list != NULL);
        long room = 0;
        struct piece piece;
        while (fscanf(list, "%ld %ld %ld %ld", &piece.offset, &piece.length, &piece.guest, &piece.plain) == 4) {
            if (piece_count == room) pieces = realloc(pieces, (room = room * 2 + 1024) * sizeof piece);
            pieces[piece_count++] = piece;
        }
    }
    pthread_t all[threads];
    void *(*work)(void *) = is_packing ? pack : count > 4 ? decode : copy;
    for (int i = 0; i < threads; i++) pthread_create(&all[i], NULL, work, NULL);
    for (int i = 0; i < threads; i++) pthread_join(all[i], NULL);
    return 0;
}
