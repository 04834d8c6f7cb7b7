// The bindings of routing.h.
#pragma once

#include <nanobind/nanobind.h>

#include "types.h"

// `kernels` names those that run.
void bind_routing(nanobind::module_& m, const mixtura::Kernels& (*kernels)());
