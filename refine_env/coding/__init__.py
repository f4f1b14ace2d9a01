"""Quantizers, the refinement coder, and its bitstream."""

from refine_env.coding.bitstream import Message, RefinementCodec
from refine_env.coding.config import CODERS, PAYLOADS, CoderConfig
from refine_env.coding.kernels import Transmission
from refine_env.coding.lloyd_max import LOSSLESS_BITS, MAX_QUANTIZER_BITS, LloydMax, base_distortion
from refine_env.coding.refinement import (
    Chain,
    ClosedLoopCoder,
    Code,
    Coder,
    ForwardCoder,
    Refinement,
    make_coder,
)

__all__ = [
    "CODERS",
    "LOSSLESS_BITS",
    "MAX_QUANTIZER_BITS",
    "PAYLOADS",
    "Chain",
    "ClosedLoopCoder",
    "Code",
    "Coder",
    "CoderConfig",
    "ForwardCoder",
    "LloydMax",
    "Message",
    "Refinement",
    "RefinementCodec",
    "Transmission",
    "base_distortion",
    "make_coder",
]
