#pragma once
#include <stddef.h>
#include <stdint.h>

// libFuzzer's entry for programs that have a `main`, as Swift's executables do.
int LLVMFuzzerRunDriver(int *count, char ***arguments, int (*test)(const uint8_t *, size_t));
