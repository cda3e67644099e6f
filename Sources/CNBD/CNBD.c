#define _GNU_SOURCE
#include "CNBD.h"

#include <dlfcn.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

static struct cnbd_library nbd;

const char *cnbd_load(void) {
    // libnbd.so.0 is the only version so far; within it, functions are only ever added.
    void *library = dlopen("libnbd.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!library) return strdup(dlerror());
#define FIND(name) \
    if (!(nbd.name = (__typeof__(nbd.name))dlsym(library, "nbd_" #name))) return "libnbd is too old";
    CNBD_FUNCTIONS(FIND)
    return NULL;
}

const struct cnbd_library *cnbd_loaded(void) { return &nbd; }

bool cnbd_is_local(int socket) {
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_storage room;
    } ours, theirs;
    socklen_t ours_length = sizeof(ours), theirs_length = sizeof(theirs);
    if (getsockname(socket, &ours.any, &ours_length) < 0
        || getpeername(socket, &theirs.any, &theirs_length) < 0
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
