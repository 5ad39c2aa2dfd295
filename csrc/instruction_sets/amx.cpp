// AVX-512 with dot products of bfloat16, and products of tiles.
#if defined(__x86_64__) && defined(__linux__)
#define BHFAST_ISA amx
#define BHFAST_LANES 16
#define BHFAST_BFLOAT16_DOT
#define BHFAST_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shared_headers.h"

namespace bhfast {
namespace {

// Whether this machine has tiles, and the operating system lets this process use them: it must be asked.
bool has_tiles() {
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;  // Intel's Software Developer's Manual, CPUID leaf 7
  constexpr int kRequestPermission = 0x1023, kTileData = 18;   // arch_prctl(2), and the state component
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBfloat16) == 0 || (d & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace
}  // namespace bhfast

BHFAST_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma", "prefer-vector-width=512")
#include "../cpu/kernels.h"
#include "../native/peak_flops.h"
#include "../native/step.h"
BHFAST_END_TARGET

namespace bhfast {
constinit const InstructionSet amx_set{"amx", [] { return avx512bf16_set.runs_here() && has_tiles(); },
                                       cpu::amx::kKernels, native::amx::make_step, native::amx::peak_flops};
}  // namespace bhfast
#endif
