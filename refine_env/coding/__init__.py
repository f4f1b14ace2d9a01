"""Quantizers, the refinement coder, and its bitstream."""

from refine_env.coding.bitstream import Message, RefinementCodec
from refine_env.coding.lloyd_max import LOSSLESS_BITS, MAX_QUANTIZER_BITS, LloydMax, base_distortion
from refine_env.coding.refinement import (
    CODERS,
    Chain,
    ClosedLoopCoder,
    Code,
    Coder,
    ForwardCoder,
    Refinement,
    check_entropy_coding,
    make_coder,
)

__all__ = [
    "CODERS",
    "LOSSLESS_BITS",
    "MAX_QUANTIZER_BITS",
    "Chain",
    "ClosedLoopCoder",
    "Code",
    "Coder",
    "ForwardCoder",
    "LloydMax",
    "Message",
    "Refinement",
    "RefinementCodec",
    "base_distortion",
    "check_entropy_coding",
    "make_coder",
]
