// The part of libnbd that NBDStorage uses, loaded when the first NBD name turns up: linked in, it
// would bring TLS and XML libraries into every start of the program, most of which need neither.
#ifndef CNBD_H
#define CNBD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct nbd_handle;

/// Loads libnbd; to be called once. Returns NULL, or the reason why that failed.
///
/// - completed: called for each finished request with its `context`, and an errno or 0.
/// - extents: called for each answer about `base:allocation`: pairs of length and flags.
/// - released: called once for each `context`, when it will not be used again.
const char *cnbd_load(
    void (*completed)(void *context, int error),
    void (*extents)(void *context, uint64_t offset, const uint32_t *pairs, size_t count),
    void (*released)(void *context));

extern const uint32_t cnbd_flag_no_hole;
extern const uint32_t cnbd_flag_fast_zero;
extern const uint32_t cnbd_flag_fua;
extern const unsigned cnbd_direction_read;
extern const unsigned cnbd_direction_write;

/// Makes a handle that asks for `base:allocation`, does not clear buffers before it reads into
/// them, and takes TLS files from the URI. NULL after an error.
struct nbd_handle *cnbd_create(void);
/// Ends the connection at once; for requests in flight only `released` is called.
void cnbd_close(struct nbd_handle *handle);
const char *cnbd_error(void);
int cnbd_errno(void);

const char *cnbd_version(struct nbd_handle *handle);
/// Lets a server pass with any certificate; older libraries do not take this from the URI.
int cnbd_waive_proof(struct nbd_handle *handle);
/// Sets the folder of the authorities' certificates, unless the URI names one.
int cnbd_set_certificates(struct nbd_handle *handle, const char *folder);

int cnbd_connect(struct nbd_handle *handle, const char *uri);
bool cnbd_is_ready(struct nbd_handle *handle);
/// Whether the connection has ended, by either side or by an error.
bool cnbd_is_over(struct nbd_handle *handle);
/// Whether the connection has ended in good order, by either side.
bool cnbd_is_closed(struct nbd_handle *handle);
int cnbd_descriptor(struct nbd_handle *handle);
unsigned cnbd_direction(struct nbd_handle *handle);
int cnbd_notify_read(struct nbd_handle *handle);
int cnbd_notify_write(struct nbd_handle *handle);
int cnbd_disconnect(struct nbd_handle *handle);

/// Whether the server is on this machine: behind a unix socket, or both ends have one address. A
/// host name does not tell, because many lead here.
bool cnbd_server_is_local(struct nbd_handle *handle);

int64_t cnbd_size(struct nbd_handle *handle);
bool cnbd_is_read_only(struct nbd_handle *handle);
bool cnbd_can_flush(struct nbd_handle *handle);
bool cnbd_can_zero(struct nbd_handle *handle);
bool cnbd_can_fast_zero(struct nbd_handle *handle);
bool cnbd_can_trim(struct nbd_handle *handle);
bool cnbd_can_fua(struct nbd_handle *handle);
bool cnbd_can_multi_conn(struct nbd_handle *handle);
bool cnbd_can_block_status(struct nbd_handle *handle);
/// Block sizes and largest payload in bytes; 0 if the server does not say.
int64_t cnbd_minimum_block(struct nbd_handle *handle);
int64_t cnbd_preferred_block(struct nbd_handle *handle);
int64_t cnbd_maximum_payload(struct nbd_handle *handle);

// Each function returns a negative number if the request could not be begun.
int64_t cnbd_read(
    struct nbd_handle *handle, void *bytes, size_t count, uint64_t offset, void *context);
int64_t cnbd_write(
    struct nbd_handle *handle, const void *bytes, size_t count, uint64_t offset, uint32_t flags,
    void *context);
int64_t cnbd_zero(
    struct nbd_handle *handle, uint64_t count, uint64_t offset, uint32_t flags, void *context);
int64_t cnbd_trim(
    struct nbd_handle *handle, uint64_t count, uint64_t offset, uint32_t flags, void *context);
int64_t cnbd_flush(struct nbd_handle *handle, void *context);
int64_t cnbd_block_status(
    struct nbd_handle *handle, uint64_t count, uint64_t offset, void *context);

#endif
