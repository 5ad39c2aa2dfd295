// Headers that must be read before the compiler is told to use other instructions than those of every machine: what
// they define is shared by all parts of the program.
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
