// Ciphers, hashes and key derivation of libgcrypt, which is loaded when the first encrypted image
// turns up. docs/decisions/2026-11-28-luks.md says why this library.
#ifndef CGCRYPT_H
#define CGCRYPT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/// Length of a sector that is encrypted on its own, in bytes.
enum { cgcrypt_sector = 512 };

/// The generator of a sector's start value.
enum cgcrypt_start_value { cgcrypt_plain, cgcrypt_plain64, cgcrypt_essiv };

/// Loads libgcrypt; to be called once. Returns NULL, or the reason why that failed.
const char *_Nullable cgcrypt_load(void);

/// Length of a hash in bytes; 0 if libgcrypt does not have it.
size_t cgcrypt_hash_length(const char *_Nonnull hash);
/// - result: as long as the hash.
void cgcrypt_hash(
    const char *_Nonnull hash, const void *_Nullable bytes, size_t count, void *_Nullable result);
enum cgcrypt_outcome { cgcrypt_done, cgcrypt_failed, cgcrypt_stopped };

/// Derives a key by PBKDF2 (RFC 8018). libgcrypt's own function is as fast and cannot be stopped,
/// and a header can ask for billions of iterations.
/// - stops: asked now and then; true ends the work.
enum cgcrypt_outcome cgcrypt_derive(
    const char *_Nonnull hash, const void *_Nullable password, size_t password_length,
    const void *_Nonnull salt, size_t salt_length, uint32_t iterations, void *_Nonnull key,
    size_t key_length, bool (*_Nonnull stops)(void));

/// Fills memory with random bytes of the kernel; false with errno if that fails.
bool cgcrypt_randomize(void *_Nullable bytes, size_t count);

/// A cipher with its key, for one thread at a time.
typedef struct cgcrypt_cipher cgcrypt_cipher;

/// Whether libgcrypt has a cipher with a key of this length in bytes, without that for XTS.
bool cgcrypt_knows(const char *_Nonnull cipher, size_t key_length);
/// - is_xts: XTS, whose key has the key of the start value as its second half; otherwise CBC.
/// - hash: the hash of ESSIV; NULL for other generators.
/// Returns NULL if there is no memory, or libgcrypt refuses the key.
cgcrypt_cipher *_Nullable cgcrypt_create(
    const char *_Nonnull cipher, bool is_xts, const void *_Nullable key, size_t key_length,
    enum cgcrypt_start_value start_value, const char *_Nullable hash);
/// Encrypts or decrypts sectors in place.
/// - count: a multiple of the sector's length.
bool cgcrypt_apply(
    cgcrypt_cipher *_Nonnull cipher, bool encrypts, uint64_t first_sector, void *_Nullable bytes,
    size_t count);
/// Wipes the key.
void cgcrypt_destroy(cgcrypt_cipher *_Nonnull cipher);

#endif
