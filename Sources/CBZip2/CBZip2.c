#include "CBZip2.h"

#include <dlfcn.h>
#include <string.h>

static struct cbzip2_library bzip2;

const char *cbzip2_load(void) {
    // Fedora's name for the same library is the second one.
    void *library = dlopen("libbz2.so.1.0", RTLD_NOW | RTLD_LOCAL);
    if (!library) library = dlopen("libbz2.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return strdup(dlerror());
#define FIND(name) \
    if (!(bzip2.name = (__typeof__(bzip2.name))dlsym(library, "BZ2_bz" #name))) \
        return "libbz2 has no BZ2_bz" #name;
    CBZIP2_FUNCTIONS(FIND)
    return NULL;
}

const struct cbzip2_library *cbzip2_loaded(void) { return &bzip2; }
