#define _GNU_SOURCE
#include "CNBD.h"

#include <dlfcn.h>
#include <libnbd.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

const uint32_t cnbd_flag_no_hole = LIBNBD_CMD_FLAG_NO_HOLE;
const uint32_t cnbd_flag_fast_zero = LIBNBD_CMD_FLAG_FAST_ZERO;
const uint32_t cnbd_flag_fua = LIBNBD_CMD_FLAG_FUA;
const unsigned cnbd_direction_read = LIBNBD_AIO_DIRECTION_READ;
const unsigned cnbd_direction_write = LIBNBD_AIO_DIRECTION_WRITE;

#define FUNCTIONS(USE) \
    USE(create) USE(close) USE(get_error) USE(get_errno) USE(add_meta_context) \
    USE(set_pread_initialize) USE(set_uri_allow_local_file) USE(aio_connect_uri) USE(aio_is_ready) \
    USE(aio_is_dead) USE(aio_is_closed) USE(aio_get_fd) USE(aio_get_direction) USE(aio_notify_read) \
    USE(aio_notify_write) USE(aio_disconnect) USE(get_size) USE(is_read_only) USE(can_flush) \
    USE(can_zero) USE(can_fast_zero) USE(can_trim) USE(can_fua) USE(can_multi_conn) \
    USE(can_meta_context) USE(get_block_size) USE(aio_pread) USE(aio_pwrite) USE(aio_zero) \
    USE(aio_trim) USE(aio_flush) USE(aio_block_status) USE(set_tls_verify_peer) \
    USE(set_tls_certificates) USE(get_version)

#define FIELD(name) __typeof__(&nbd_##name) name;
static struct { FUNCTIONS(FIELD) } nbd;

static void (*completed)(void *, int);
static void (*extents)(void *, uint64_t, const uint32_t *, size_t);
static void (*released)(void *);

static const char *load(void) {
    // libnbd.so.0 is the only version so far; within it, functions are only ever added.
    void *library = dlopen("libnbd.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!library) return strdup(dlerror());
#define FIND(name) \
    if (!(nbd.name = (__typeof__(nbd.name))dlsym(library, "nbd_" #name))) return "libnbd is too old";
    FUNCTIONS(FIND)
    return NULL;
}

const char *cnbd_load(
    void (*on_completed)(void *, int),
    void (*on_extents)(void *, uint64_t, const uint32_t *, size_t), void (*on_released)(void *)) {
    completed = on_completed;
    extents = on_extents;
    released = on_released;
    return load();
}

static int on_completed(void *context, int *error) {
    completed(context, *error);
    return 1;  // Retires the request: no call will ask for its result.
}

static int on_extents(
    void *context, const char *name, uint64_t offset, uint32_t *pairs, size_t count, int *error) {
    (void)error;
    if (strcmp(name, "base:allocation") == 0) extents(context, offset, pairs, count);
    return 0;
}

static nbd_completion_callback completion(void *context) {
    return (nbd_completion_callback){
        .callback = on_completed, .user_data = context, .free = released};
}

struct nbd_handle *cnbd_create(void) {
    struct nbd_handle *handle = nbd.create();
    if (handle
        && (nbd.add_meta_context(handle, "base:allocation") < 0
            || nbd.set_pread_initialize(handle, false) < 0
            || nbd.set_uri_allow_local_file(handle, true) < 0)) {
        nbd.close(handle);
        return NULL;
    }
    return handle;
}

void cnbd_close(struct nbd_handle *handle) { nbd.close(handle); }
const char *cnbd_error(void) { return nbd.get_error(); }
int cnbd_errno(void) { return nbd.get_errno(); }

const char *cnbd_version(struct nbd_handle *handle) { return nbd.get_version(handle); }
int cnbd_waive_proof(struct nbd_handle *handle) { return nbd.set_tls_verify_peer(handle, false); }
int cnbd_set_certificates(struct nbd_handle *handle, const char *folder) {
    return nbd.set_tls_certificates(handle, folder);
}

int cnbd_connect(struct nbd_handle *handle, const char *uri) {
    return nbd.aio_connect_uri(handle, uri);
}

bool cnbd_is_ready(struct nbd_handle *handle) { return nbd.aio_is_ready(handle) > 0; }
bool cnbd_is_over(struct nbd_handle *handle) {
    return nbd.aio_is_dead(handle) != 0 || nbd.aio_is_closed(handle) != 0;
}
bool cnbd_is_closed(struct nbd_handle *handle) { return nbd.aio_is_closed(handle) > 0; }
int cnbd_descriptor(struct nbd_handle *handle) { return nbd.aio_get_fd(handle); }
unsigned cnbd_direction(struct nbd_handle *handle) { return nbd.aio_get_direction(handle); }
int cnbd_notify_read(struct nbd_handle *handle) { return nbd.aio_notify_read(handle); }
int cnbd_notify_write(struct nbd_handle *handle) { return nbd.aio_notify_write(handle); }
int cnbd_disconnect(struct nbd_handle *handle) { return nbd.aio_disconnect(handle, 0); }

bool cnbd_server_is_local(struct nbd_handle *handle) {
    int fd = nbd.aio_get_fd(handle);
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_storage room;
    } ours, theirs;
    socklen_t ours_length = sizeof(ours), theirs_length = sizeof(theirs);
    if (getsockname(fd, &ours.any, &ours_length) < 0
        || getpeername(fd, &theirs.any, &theirs_length) < 0
        || ours.any.sa_family != theirs.any.sa_family)
        return false;
    switch (ours.any.sa_family) {
        case AF_UNIX: return true;
        case AF_INET: return ours.v4.sin_addr.s_addr == theirs.v4.sin_addr.s_addr;
        case AF_INET6:
            return memcmp(&ours.v6.sin6_addr, &theirs.v6.sin6_addr, sizeof(struct in6_addr)) == 0;
        default: return false;
    }
}

int64_t cnbd_size(struct nbd_handle *handle) { return nbd.get_size(handle); }
bool cnbd_is_read_only(struct nbd_handle *handle) { return nbd.is_read_only(handle) > 0; }
bool cnbd_can_flush(struct nbd_handle *handle) { return nbd.can_flush(handle) > 0; }
bool cnbd_can_zero(struct nbd_handle *handle) { return nbd.can_zero(handle) > 0; }
bool cnbd_can_fast_zero(struct nbd_handle *handle) { return nbd.can_fast_zero(handle) > 0; }
bool cnbd_can_trim(struct nbd_handle *handle) { return nbd.can_trim(handle) > 0; }
bool cnbd_can_fua(struct nbd_handle *handle) { return nbd.can_fua(handle) > 0; }
bool cnbd_can_multi_conn(struct nbd_handle *handle) { return nbd.can_multi_conn(handle) > 0; }
bool cnbd_can_block_status(struct nbd_handle *handle) {
    return nbd.can_meta_context(handle, "base:allocation") > 0;
}

static int64_t block_size(struct nbd_handle *handle, int type) {
    int64_t size = nbd.get_block_size(handle, type);
    return size < 0 ? 0 : size;
}
int64_t cnbd_minimum_block(struct nbd_handle *handle) {
    return block_size(handle, LIBNBD_SIZE_MINIMUM);
}
int64_t cnbd_preferred_block(struct nbd_handle *handle) {
    return block_size(handle, LIBNBD_SIZE_PREFERRED);
}
int64_t cnbd_maximum_payload(struct nbd_handle *handle) {
    return block_size(handle, LIBNBD_SIZE_MAXIMUM);
}

int64_t cnbd_read(
    struct nbd_handle *handle, void *bytes, size_t count, uint64_t offset, void *context) {
    return nbd.aio_pread(handle, bytes, count, offset, completion(context), 0);
}

int64_t cnbd_write(
    struct nbd_handle *handle, const void *bytes, size_t count, uint64_t offset, uint32_t flags,
    void *context) {
    return nbd.aio_pwrite(handle, bytes, count, offset, completion(context), flags);
}

int64_t cnbd_zero(
    struct nbd_handle *handle, uint64_t count, uint64_t offset, uint32_t flags, void *context) {
    return nbd.aio_zero(handle, count, offset, completion(context), flags);
}

int64_t cnbd_trim(
    struct nbd_handle *handle, uint64_t count, uint64_t offset, uint32_t flags, void *context) {
    return nbd.aio_trim(handle, count, offset, completion(context), flags);
}

int64_t cnbd_flush(struct nbd_handle *handle, void *context) {
    return nbd.aio_flush(handle, completion(context), 0);
}

int64_t cnbd_block_status(
    struct nbd_handle *handle, uint64_t count, uint64_t offset, void *context) {
    nbd_extent_callback each = {.callback = on_extents, .user_data = context, .free = NULL};
    return nbd.aio_block_status(handle, count, offset, each, completion(context), 0);
}
