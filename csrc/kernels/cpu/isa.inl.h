// Everything an instruction set's file compiles: included once by each, inside its target pragma.

#include "vec.h"
#include "gemm.inl.h"
#include "blocked.inl.h"
#include "pack.inl.h"
#include "bottleneck_geometry.inl.h"
#include "bottleneck_conv.inl.h"
#include "image_rows.inl.h"
#include "backward_geometry.inl.h"
#include "bottleneck_backward.inl.h"
#include "bottleneck_entry.inl.h"
#include "peak.inl.h"
