"""Quantizers and the refinement coder."""

from refine_env.coding.lloyd_max import LOSSLESS_BITS, MAX_QUANTIZER_BITS, LloydMax, base_distortion
from refine_env.coding.refinement import CODERS, Chain, Coder, ForwardCoder, Refinement, make_coder

__all__ = [
    "CODERS",
    "LOSSLESS_BITS",
    "MAX_QUANTIZER_BITS",
    "Chain",
    "Coder",
    "ForwardCoder",
    "LloydMax",
    "Refinement",
    "base_distortion",
    "make_coder",
]
