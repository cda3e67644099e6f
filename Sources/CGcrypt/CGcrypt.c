#include "CGcrypt.h"

#include <dlfcn.h>
#include <gcrypt.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#define FUNCTIONS(USE) \
    USE(check_version) USE(control) USE(md_map_name) USE(md_get_algo_dlen) USE(md_hash_buffer) \
    USE(md_open) USE(md_close) USE(md_setkey) USE(md_reset) USE(md_write) USE(md_read) \
    USE(cipher_open) USE(cipher_close) USE(cipher_setkey) USE(cipher_setiv) \
    USE(cipher_encrypt) USE(cipher_decrypt)
#define FIELD(name) __typeof__(&gcry_##name) name;

static struct { FUNCTIONS(FIELD) } gcrypt;

const char *cgcrypt_load(void) {
    void *library = dlopen("libgcrypt.so.20", RTLD_NOW | RTLD_LOCAL);
    if (!library) return strdup(dlerror());
#define FIND(name) \
    if (!(gcrypt.name = (__typeof__(gcrypt.name))dlsym(library, "gcry_" #name))) \
        return "libgcrypt has no gcry_" #name;
    FUNCTIONS(FIND)
    // 1.8 is the first version with XTS.
    if (!gcrypt.check_version("1.8.0")) return "libgcrypt is older than 1.8";
    // Another library of the process may have set it up.
    if (!gcrypt.control(GCRYCTL_INITIALIZATION_FINISHED_P)) {
        gcrypt.control(GCRYCTL_DISABLE_SECMEM, 0);
        gcrypt.control(GCRYCTL_INITIALIZATION_FINISHED, 0);
    }
    return NULL;
}

size_t cgcrypt_hash_length(const char *hash) {
    int number = gcrypt.md_map_name(hash);
    return number ? gcrypt.md_get_algo_dlen(number) : 0;
}

void cgcrypt_hash(const char *hash, const void *bytes, size_t count, void *result) {
    gcrypt.md_hash_buffer(gcrypt.md_map_name(hash), result, bytes, count);
}

// Length of the longest hash in bytes.
enum { longest_hash = 64 };

// Iterations between two looks at whether to stop: some 25 ms.
enum { look_distance = 1 << 16 };

// Computes one block of a key: the hash of the salt and the number, hashed again and again, and all
// of these added.
static enum cgcrypt_outcome derive_block(
    gcry_md_hd_t hmac, size_t length, const void *salt, size_t salt_length, uint32_t number,
    uint32_t iterations, unsigned char *sum, bool (*stops)(void)) {
    unsigned char last[longest_hash];
    unsigned char bytes[4] = {number >> 24, number >> 16, number >> 8, number};
    gcrypt.md_reset(hmac);
    gcrypt.md_write(hmac, salt, salt_length);
    gcrypt.md_write(hmac, bytes, sizeof bytes);
    memcpy(last, gcrypt.md_read(hmac, 0), length);
    memcpy(sum, last, length);
    enum cgcrypt_outcome outcome = cgcrypt_done;
    for (uint32_t count = 1; count < iterations; count++) {
        if (count % look_distance == 0 && stops()) {
            outcome = cgcrypt_stopped;
            break;
        }
        gcrypt.md_reset(hmac);
        gcrypt.md_write(hmac, last, length);
        memcpy(last, gcrypt.md_read(hmac, 0), length);
        for (size_t index = 0; index < length; index++) sum[index] ^= last[index];
    }
    explicit_bzero(last, sizeof last);
    return outcome;
}

enum cgcrypt_outcome cgcrypt_derive(
    const char *hash, const void *password, size_t password_length, const void *salt,
    size_t salt_length, uint32_t iterations, void *key, size_t key_length, bool (*stops)(void)) {
    size_t length = cgcrypt_hash_length(hash);
    gcry_md_hd_t hmac = NULL;
    if (!length || length > longest_hash
        || gcrypt.md_open(&hmac, gcrypt.md_map_name(hash), GCRY_MD_FLAG_HMAC)) {
        return cgcrypt_failed;
    }
    enum cgcrypt_outcome outcome =
        gcrypt.md_setkey(hmac, password, password_length) ? cgcrypt_failed : cgcrypt_done;
    unsigned char sum[longest_hash];
    size_t done = 0;
    for (uint32_t number = 1; outcome == cgcrypt_done && done < key_length; number++) {
        outcome = derive_block(hmac, length, salt, salt_length, number, iterations, sum, stops);
        size_t part = key_length - done < length ? key_length - done : length;
        memcpy((char *)key + done, sum, part);
        done += part;
    }
    explicit_bzero(sum, sizeof sum);
    gcrypt.md_close(hmac);
    return outcome;
}

bool cgcrypt_randomize(void *bytes, size_t count) {
    for (size_t done = 0; done < count;) {
        // Requests of up to 256 bytes are never cut short by a signal (man getrandom).
        size_t part = count - done < 256 ? count - done : 256;
        if (getrandom((char *)bytes + done, part, 0) != (ssize_t)part) return false;
        done += part;
    }
    return true;
}

struct cgcrypt_cipher {
    gcry_cipher_hd_t data;
    // Makes the start values of ESSIV; NULL for other generators.
    gcry_cipher_hd_t start_value;
    bool is_short;
};

// Length of a cipher's block, and of a start value, in bytes.
enum { block = 16 };

static const struct { const char *name; size_t key_length; int number; } ciphers[] = {
    {"aes", 16, GCRY_CIPHER_AES128},         {"aes", 24, GCRY_CIPHER_AES192},
    {"aes", 32, GCRY_CIPHER_AES256},         {"serpent", 16, GCRY_CIPHER_SERPENT128},
    {"serpent", 24, GCRY_CIPHER_SERPENT192}, {"serpent", 32, GCRY_CIPHER_SERPENT256},
    {"twofish", 16, GCRY_CIPHER_TWOFISH128}, {"twofish", 32, GCRY_CIPHER_TWOFISH},
};

// libgcrypt's number of a cipher; 0 if it has none.
static int cipher_number(const char *name, size_t key_length) {
    for (size_t index = 0; index < sizeof ciphers / sizeof *ciphers; index++) {
        if (!strcmp(ciphers[index].name, name) && ciphers[index].key_length == key_length) {
            return ciphers[index].number;
        }
    }
    return 0;
}

bool cgcrypt_knows(const char *cipher, size_t key_length) {
    return cipher_number(cipher, key_length) != 0;
}

static gcry_cipher_hd_t open_cipher(int number, int mode, const void *key, size_t key_length) {
    gcry_cipher_hd_t handle = NULL;
    if (!number || gcrypt.cipher_open(&handle, number, mode, 0)) return NULL;
    if (!gcrypt.cipher_setkey(handle, key, key_length)) return handle;
    gcrypt.cipher_close(handle);
    return NULL;
}

// ESSIV: start values are encrypted by the same cipher, with the hash of the key as its key.
static gcry_cipher_hd_t open_start_value(
    const char *cipher, const void *key, size_t key_length, const char *hash) {
    unsigned char digest[longest_hash];
    size_t length = cgcrypt_hash_length(hash);
    if (length > sizeof digest) return NULL;
    cgcrypt_hash(hash, key, key_length, digest);
    gcry_cipher_hd_t handle =
        open_cipher(cipher_number(cipher, length), GCRY_CIPHER_MODE_ECB, digest, length);
    explicit_bzero(digest, sizeof digest);
    return handle;
}

cgcrypt_cipher *cgcrypt_create(
    const char *cipher, bool is_xts, const void *key, size_t key_length,
    enum cgcrypt_start_value start_value, const char *hash) {
    cgcrypt_cipher *made = calloc(1, sizeof *made);
    if (!made) return NULL;
    made->is_short = start_value == cgcrypt_plain;
    int number = cipher_number(cipher, is_xts ? key_length / 2 : key_length);
    made->data = open_cipher(
        number, is_xts ? GCRY_CIPHER_MODE_XTS : GCRY_CIPHER_MODE_CBC, key, key_length);
    if (start_value == cgcrypt_essiv) {
        made->start_value = hash ? open_start_value(cipher, key, key_length, hash) : NULL;
    }
    if (made->data && (made->start_value || start_value != cgcrypt_essiv)) return made;
    cgcrypt_destroy(made);
    return NULL;
}

bool cgcrypt_apply(
    cgcrypt_cipher *cipher, bool encrypts, uint64_t first_sector, void *bytes, size_t count) {
    for (size_t done = 0; done < count; done += cgcrypt_sector) {
        uint64_t sector = first_sector + done / cgcrypt_sector;
        if (cipher->is_short) sector &= UINT32_MAX;
        unsigned char start[block] = {0};
        for (int byte = 0; byte < 8; byte++) start[byte] = (unsigned char)(sector >> 8 * byte);
        if (cipher->start_value
            && gcrypt.cipher_encrypt(cipher->start_value, start, block, NULL, 0)) {
            return false;
        }
        unsigned char *place = (unsigned char *)bytes + done;
        if (gcrypt.cipher_setiv(cipher->data, start, block)) return false;
        if (encrypts ? gcrypt.cipher_encrypt(cipher->data, place, cgcrypt_sector, NULL, 0)
                     : gcrypt.cipher_decrypt(cipher->data, place, cgcrypt_sector, NULL, 0)) {
            return false;
        }
    }
    return true;
}

void cgcrypt_destroy(cgcrypt_cipher *cipher) {
    if (cipher->data) gcrypt.cipher_close(cipher->data);
    if (cipher->start_value) gcrypt.cipher_close(cipher->start_value);
    free(cipher);
}
