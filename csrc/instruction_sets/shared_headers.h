// Headers whose code all instruction sets share. Include this before the pragma that selects an instruction set: what
// is compiled after it may not run on every machine.
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

#include "../native/optimizer_step.h"
#include "../native/training_step.h"
#include "dispatch.h"
