#pragma once

// The program's own pages, most of what a conversion had in memory. When a page is touched that is not mapped, the kernel maps
// those of the 64 KiB around it, too, but none beyond the mapping's end: of a program of which little is used most of what is
// mapped is such neighbours. Where a long conversion is to be expected, the mappings are cut into single pages before the
// program begins. A process takes some 15 ms longer with it.

/// The letters of `convert` that need nothing behind them.
#define PROGRAM_PAGES_CONVERT_FLAGS "cCnpqUW"

/// Unmaps what has been read so far of the program and its libraries; what is needed again comes back
/// from the page cache. Reading the command line goes through half of the program, for lists of types
/// and conformances that nobody asks for again, and so do opening and creating: megabytes, for as long as a
/// conversion runs. Other threads may run meanwhile.
void program_pages_release(void);
