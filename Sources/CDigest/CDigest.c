#include "CDigest.h"

#include <dlfcn.h>
#include <string.h>

// Declared as in openssl/evp.h of 1.1 and 3 (man EVP_DigestInit), so that building needs no headers
// of a library that is looked for only at run time.
static struct {
    void *(*create)(void);
    void (*destroy)(void *);
    const void *(*sha256)(void);
    int (*init)(void *, const void *, void *);
    int (*update)(void *, const void *, size_t);
    int (*finish)(void *, unsigned char *, unsigned int *);
} crypto;

const char *cdigest_load(void) {
    const char *const names[] = {"libcrypto.so.3", "libcrypto.so.1.1"};
    void *library = NULL;
    for (size_t index = 0; !library && index < sizeof names / sizeof *names; index++) {
        library = dlopen(names[index], RTLD_NOW | RTLD_LOCAL);
    }
    if (!library) return strdup(dlerror());
#define FIND(field, name) \
    if (!(crypto.field = (__typeof__(crypto.field))dlsym(library, name))) \
        return "libcrypto has no " name;
    FIND(create, "EVP_MD_CTX_new")
    FIND(destroy, "EVP_MD_CTX_free")
    FIND(sha256, "EVP_sha256")
    FIND(init, "EVP_DigestInit_ex")
    FIND(update, "EVP_DigestUpdate")
    FIND(finish, "EVP_DigestFinal_ex")
    return NULL;
}

void *cdigest_sha256_create(void) {
    void *digest = crypto.create();
    if (digest && !crypto.init(digest, crypto.sha256(), NULL)) {
        crypto.destroy(digest);
        return NULL;
    }
    return digest;
}

bool cdigest_update(void *digest, const void *bytes, size_t count) {
    return crypto.update(digest, bytes, count) == 1;
}

bool cdigest_finish(void *digest, uint8_t *result) {
    return crypto.finish(digest, result, NULL) == 1 && crypto.init(digest, crypto.sha256(), NULL) == 1;
}

void cdigest_destroy(void *digest) { crypto.destroy(digest); }
