// SHA-256 by OpenSSL's libcrypto, loaded when the first digest is asked for.
//
// Why that one, measured on a 2-core EPYC with SHA-NI: libcrypto and swift-crypto (BoringSSL) both hash 1.6 GB/s,
// coreutils' own loop 0.35 GB/s. swift-crypto adds 10.8 MB to the program and 1.4 ms to every start of it, whatever
// the verb; loading libcrypto takes 2 ms, of digests alone. The kernel's AF_ALG is missing from many kernels
// and refused in many containers, this one among them.
#ifndef CDIGEST_H
#define CDIGEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { cdigest_sha256_length = 32 };

/// Loads libcrypto; to be called once. Returns NULL, or why that failed.
const char *cdigest_load(void);

/// A SHA-256 of nothing so far; NULL if there is no memory for it, or the library forbids it.
void *cdigest_sha256_create(void);
bool cdigest_update(void *digest, const void *bytes, size_t count);
/// The end; what is added afterwards begins a new one.
/// - result: of `cdigest_sha256_length` bytes.
bool cdigest_finish(void *digest, uint8_t *result);
void cdigest_destroy(void *digest);

#endif
