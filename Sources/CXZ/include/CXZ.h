// The functions of liblzma that Decompression uses, loaded when the first .xz file turns up, so that
// no other start of the program pays for them.
#ifndef CXZ_H
#define CXZ_H

#include <lzma.h>

#define CXZ_FUNCTIONS(USE) USE(stream_decoder_mt) USE(stream_decoder) USE(code) USE(end)
#define CXZ_FIELD(name) __typeof__(&lzma_##name) _Nullable name;

/// The functions, by their names in liblzma without `lzma_`.
struct cxz_library {
    CXZ_FUNCTIONS(CXZ_FIELD)
};

/// Loads liblzma; to be called once. Returns NULL, or the reason why that failed.
/// `stream_decoder_mt` is NULL in versions before 5.4.
const char *_Nullable cxz_load(void);

/// The functions, once they have been loaded.
const struct cxz_library *_Nonnull cxz_loaded(void);

#endif
