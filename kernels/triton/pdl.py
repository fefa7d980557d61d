"""The switch of `launch` as kernels read it: values of their constexpr PDL."""

import triton.language as tl
from bwla_kernels.triton.launch import EARLY, LATE

# Kernels may read module constants only as constexpr.
PDL_EARLY = tl.constexpr(EARLY)
PDL_LATE = tl.constexpr(LATE)
