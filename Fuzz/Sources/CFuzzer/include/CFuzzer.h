#pragma once
#include <stddef.h>
#include <stdint.h>

// libFuzzer's own, for programs that have a `main`: Swift's executables do.
int LLVMFuzzerRunDriver(int *count, char ***arguments, int (*test)(const uint8_t *, size_t));
