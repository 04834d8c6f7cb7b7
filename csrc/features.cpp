#include "features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mixtura {

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx2_vnni, kernels_avx512, kernels_avx512_bf16;
extern const Kernels kernels_amx_emulated;
#if defined(MIXTURA_HAS_AMX)
extern const Kernels kernels_amx;
#endif

namespace {

struct Flags {
  bool avx2, fma, f16c, avx512, avx512_vnni, avx512_bf16, avx_vnni, amx_tile, amx_int8, amx_bf16;
};

// Registers that the operating system saves (XCR0).
uint64_t saved_registers() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

Flags read_flags() {
  Flags f{};
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool has_xsave = c >> 27 & 1;
  if (!has_xsave) return f;
  const uint64_t saved = saved_registers();
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
  const bool tiles = (saved & 0x60000) == 0x60000;
  f.fma = ymm && c >> 12 & 1;
  f.f16c = ymm && c >> 29 & 1;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const uint32_t leaves = a;
  f.avx2 = ymm && b >> 5 & 1;
  const bool foundation = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
  f.avx512 = zmm && foundation && dq && bw && vl;
  f.avx512_vnni = f.avx512 && c >> 11 & 1;
  f.amx_bf16 = tiles && d >> 22 & 1;
  f.amx_tile = tiles && d >> 24 & 1;
  f.amx_int8 = tiles && d >> 25 & 1;
  if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    f.avx_vnni = ymm && a >> 4 & 1;
    f.avx512_bf16 = f.avx512 && a >> 5 & 1;
  }
  return f;
}

const Flags& flags() {
  static const Flags found = read_flags();
  return found;
}

#if defined(MIXTURA_HAS_AMX)
// Asks the operating system for the memory of tiles, which it gives a process on request only.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace
#endif

std::vector<std::string> cpu_flags() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  const Flags& f = flags();
  const std::pair<bool, const char*> all[] = {
      {f.avx2, "avx2"},           {f.fma, "fma"},
      {f.f16c, "f16c"},           {f.avx_vnni, "avx_vnni"},
      {f.avx512, "avx512"},       {f.avx512_vnni, "avx512_vnni"},
      {f.avx512_bf16, "avx512_bf16"}, {f.amx_tile, "amx_tile"},
      {f.amx_int8, "amx_int8"},   {f.amx_bf16, "amx_bf16"},
  };
  for (const auto& [has, name] : all)
    if (has) names.push_back(name);
#endif
  return names;
}

const std::vector<const Kernels*>& runnable_kernels() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
    const Flags& f = flags();
    const bool has_avx2 = f.avx2 && f.fma && f.f16c;
    const bool has_bf16 = has_avx2 && f.avx512_vnni && f.avx512_bf16;
#if defined(MIXTURA_HAS_AMX)
    const bool has_amx = f.amx_tile && f.amx_int8 && f.amx_bf16;
    if (has_bf16 && has_amx && may_use_tiles()) kernels.push_back(&kernels_amx);
#endif
    if (has_bf16) kernels.push_back(&kernels_avx512_bf16);
    if (has_avx2 && f.avx512_vnni) kernels.push_back(&kernels_avx512);
    if (has_avx2 && f.avx_vnni) kernels.push_back(&kernels_avx2_vnni);
    if (has_avx2) kernels.push_back(&kernels_avx2);
#endif
    kernels.push_back(&kernels_portable);
#if defined(__x86_64__)
    if (has_bf16) kernels.push_back(&kernels_amx_emulated);
#endif
    return kernels;
  }();
  return found;
}

}  // namespace mixtura
