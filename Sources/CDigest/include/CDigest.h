// SHA-256 by OpenSSL's libcrypto, which is loaded when the first digest is requested.
//
// Measured on a 2-core EPYC with SHA-NI: libcrypto and swift-crypto (BoringSSL) both hash 1.6 GB/s,
// coreutils' own loop 0.35 GB/s. swift-crypto adds 10.8 MB to the program and 1.4 ms to every
// start, whatever the verb; loading libcrypto takes 2 ms, and only for digests. The kernel's AF_ALG
// is missing from many kernels and refused in many containers, this one included.
#ifndef CDIGEST_H
#define CDIGEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { cdigest_sha256_length = 32 };

/// Loads libcrypto; to be called once. Returns NULL, or the reason why that failed.
const char *cdigest_load(void);

/// Begins a SHA-256. NULL if there is no memory for it, or the library forbids it.
void *cdigest_sha256_create(void);
bool cdigest_update(void *digest, const void *bytes, size_t count);
/// Ends a digest; bytes added afterwards begin a new one.
/// - result: `cdigest_sha256_length` bytes.
bool cdigest_finish(void *digest, uint8_t *result);
void cdigest_destroy(void *digest);

#endif
