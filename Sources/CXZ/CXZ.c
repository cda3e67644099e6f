#include "CXZ.h"

#include <dlfcn.h>
#include <string.h>

static struct cxz_library xz;

const char *cxz_load(void) {
    void *library = dlopen("liblzma.so.5", RTLD_NOW | RTLD_LOCAL);
    if (!library) return strdup(dlerror());
#define FIND(name) xz.name = (__typeof__(xz.name))dlsym(library, "lzma_" #name);
    CXZ_FUNCTIONS(FIND)
    return xz.stream_decoder && xz.code && xz.end ? NULL : "liblzma is too old";
}

const struct cxz_library *cxz_loaded(void) { return &xz; }
