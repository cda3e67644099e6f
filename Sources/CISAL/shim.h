#include <isa-l/igzip_lib.h>

/// The macro is arithmetic on others, which Swift does not see.
static inline uint32_t cisal_level3_buffer_size(void) { return ISAL_DEF_LVL3_DEFAULT; }
