// The functions of libbz2 that Decompression uses, loaded when the first .bz2 file turns up, so that
// no other start of the program pays for them.
#ifndef CBZIP2_H
#define CBZIP2_H

#include <bzlib.h>

#define CBZIP2_FUNCTIONS(USE) USE(DecompressInit) USE(Decompress) USE(DecompressEnd)
#define CBZIP2_FIELD(name) __typeof__(&BZ2_bz##name) _Nonnull name;

/// The functions, by their names in libbz2 without `BZ2_bz`.
struct cbzip2_library {
    CBZIP2_FUNCTIONS(CBZIP2_FIELD)
};

/// Loads libbz2; to be called once. Returns NULL, or the reason why that failed.
const char *_Nullable cbzip2_load(void);

/// The functions, once they have been loaded.
const struct cbzip2_library *_Nonnull cbzip2_loaded(void);

#endif
