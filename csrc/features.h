// What the processor can run.
#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace mixtura {

// Kernels that this processor can run, the best first, the portable ones after all others. Behind
// them are those that emulate instructions it may not have: for tests, and chosen by name only.
const std::vector<const Kernels*>& runnable_kernels();

// Names of what CPUID reports, of those that matter here.
std::vector<std::string> cpu_flags();

}  // namespace mixtura
