"""The options of a refinement coder, checked in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from refine_env._validation import check_choice, check_flag
from refine_env.errors import ConfigurationError

__all__ = ["CODERS", "PAYLOADS", "CoderConfig"]

CODERS = ("forward", "closed_loop")
PAYLOADS = ("latent", "posterior_mean")


@dataclass(frozen=True, kw_only=True)
class CoderConfig:
    """The options of a refinement coder; ``forward`` does not look at those of the closed-loop coder.

    Args:
        coder: the refinement coder, ``"forward"`` (the paper's) or ``"closed_loop"``.
        payload: what is sent, ``"latent"`` (x_t, the paper's) or ``"posterior_mean"`` (y_t = E[x_0 | x_{t+1}], closed
            loop only; the device then starts from the prior mean, 0).
        rotation: of the closed-loop coder: rotate the residual before it is quantized, and back after, by permutation,
            random signs and Walsh–Hadamard transform. Every delivery of an episode has a rotation of its own, from
            numbers that both ends know. The recursion needs Gaussian residuals; without rotation they carry the last
            quantizer's error with its tails.
        sent_scale: of the closed-loop coder: send the root mean square of every residual as float16, 16 bits a
            message. The scale is then exact for each message.
        same_step_refinement: of the closed-loop coder: the step that the device holds with an error may be sent again.
        entropy_coding: of the closed-loop coder, with rotation and sent scale: entropy-code the indices, which are
            those of Gaussian values then. Payloads have a fixed, smaller size (:mod:`refine_env.coding.entropy`). A
            residual that does not fit is sent with a scale s above its root mean square, mostly by one step of float16,
            and e = s² D_base(b) is that little too large.

    Raises:
        ConfigurationError: if a value is out of range, the payload is not one that the coder predicts, or
            ``entropy_coding`` is asked for without rotation or sent scale: the codelength is not known then.
    """

    coder: str = "forward"
    payload: str = "latent"
    rotation: bool = True
    sent_scale: bool = True
    same_step_refinement: bool = True
    entropy_coding: bool = False

    def __post_init__(self) -> None:
        check_choice("coder", self.coder, CODERS)
        check_choice("payload", self.payload, PAYLOADS)
        for name in ("rotation", "sent_scale", "same_step_refinement", "entropy_coding"):
            check_flag(name, getattr(self, name))
        if self.entropy_coding and not (self.coder == "closed_loop" and self.rotation and self.sent_scale):
            raise ConfigurationError(
                "`entropy_coding` must be False unless coder='closed_loop', rotation=True and sent_scale=True, got "
                f"coder={self.coder!r}, rotation={self.rotation}, sent_scale={self.sent_scale}. Set these three, or "
                "leave it out."
            )
        if self.payload != "latent" and self.coder != "closed_loop":
            raise ConfigurationError(
                f"`payload` must be 'latent' for the coder {self.coder!r}, which predicts x_t, got {self.payload!r}. "
                "Use coder='closed_loop'."
            )

    def coder_options(self) -> dict[str, Any]:
        """The options as a JSON object."""
        return {item.name: getattr(self, item.name) for item in fields(CoderConfig)}
