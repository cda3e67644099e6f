// The functions of libnbd that NBDStorage uses, loaded when the first NBD name turns up: linked in,
// it would bring TLS and XML libraries into every start of the program, most of which need neither.
#ifndef CNBD_H
#define CNBD_H

#include <libnbd.h>
#include <stdbool.h>

#define CNBD_FUNCTIONS(USE) \
    USE(create) USE(close) USE(get_error) USE(get_errno) USE(add_meta_context) \
    USE(set_pread_initialize) USE(set_uri_allow_local_file) USE(aio_connect_uri) USE(aio_is_ready) \
    USE(aio_is_dead) USE(aio_is_closed) USE(aio_get_fd) USE(aio_get_direction) USE(aio_notify_read) \
    USE(aio_notify_write) USE(aio_disconnect) USE(get_size) USE(is_read_only) USE(can_flush) \
    USE(can_zero) USE(can_fast_zero) USE(can_trim) USE(can_fua) USE(can_multi_conn) \
    USE(can_meta_context) USE(get_block_size) USE(aio_pread) USE(aio_pwrite) USE(aio_zero) \
    USE(aio_trim) USE(aio_flush) USE(aio_block_status) USE(set_tls_verify_peer) \
    USE(set_tls_certificates) USE(get_version)
#define CNBD_FIELD(name) __typeof__(&nbd_##name) _Nonnull name;

/// The functions, by their names in libnbd without `nbd_`.
struct cnbd_library {
    CNBD_FUNCTIONS(CNBD_FIELD)
};

/// Loads libnbd; to be called once. Returns NULL, or the reason why that failed.
const char *_Nullable cnbd_load(void);

/// The functions, once they have been loaded.
const struct cnbd_library *_Nonnull cnbd_loaded(void);

/// Whether the peer of a socket is on this machine: behind a unix socket, or both ends have one
/// address. A host name does not tell, because many lead here.
bool cnbd_is_local(int socket);

#endif
