// The kernels of one instruction set. Compiled once for each, with MIXTURA_ISA as its name.
//
// Everything here has internal linkage but the table, and nothing of the standard library is used:
// code for a newer processor must not be what the linker keeps for all.
#include "types.h"

#define FN inline __attribute__((always_inline))

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace {
using namespace mixtura;
}

#include "tiles.h"
#include "activation.h"
#include "block.h"
#include "unpack.h"
#include "multiply_amx.h"
#include "multiply.h"
#include "rows.h"
#include "lora.h"
#include "tasks.h"
#include "attend.h"
#include "probe.h"
#include "routing_gate.h"
#include "routing_scores.h"

#define NAME_(isa) kernels_##isa
#define NAME(isa) NAME_(isa)
#define TEXT_(isa) #isa
#define TEXT(isa) TEXT_(isa)

namespace mixtura {
extern const Kernels NAME(MIXTURA_ISA);
const Kernels NAME(MIXTURA_ISA) = {
    TEXT(MIXTURA_ISA),
#if MIXTURA_BF16
    true,
#else
    false,
#endif
    kU8Zero != 0, kRows, prepare, shrink_row, gate_up, down, combine, finish_linear, read_streams, spin, spin_operations,
    prepare_gate, gate, score, soft_cap_logits, attend, join_chunks,
};
}  // namespace mixtura
