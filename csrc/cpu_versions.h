// One binary for old and new processors: the loader picks the version that the machine can run.
//
// The versions go by what a processor can do. An "arch=" with the name of a processor would be
// picked on that very model alone, and everything else would run the oldest version.

#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#define INLINE inline __attribute__((always_inline))
#else
#define FOR_EACH_CPU
#define INLINE inline
#endif
