// Headers whose code all instruction sets share, and the pragmas that select an instruction set. Include this before
// them: what is compiled between them may not run on every machine.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __aarch64__
#include <arm_neon.h>
#endif

#include "../native/optimizer_step.h"
#include "../native/training_step.h"
#include "dispatch.h"

// Between these two, functions are compiled for an instruction set. What is added to its features is for GCC alone.
#define BHFAST_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define BHFAST_BEGIN_TARGET(features, ...) \
  BHFAST_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define BHFAST_END_TARGET BHFAST_PRAGMA(clang attribute pop)
#else
#define BHFAST_BEGIN_TARGET(...) BHFAST_PRAGMA(GCC push_options) BHFAST_PRAGMA(GCC target(__VA_ARGS__))
#define BHFAST_END_TARGET BHFAST_PRAGMA(GCC pop_options)
#endif
