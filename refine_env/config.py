"""One complete, frozen description of a system: all that a policy may know in advance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env._validation import (
    check_choice,
    check_flag,
    check_integer,
    check_positive,
    check_quantile,
    check_snr_db,
    did_you_mean,
    shown,
)
from refine_env.coding import (
    LOSSLESS_BITS,
    PAYLOADS,
    Coder,
    CoderConfig,
    RefinementCodec,
    base_distortion,
    make_coder,
)
from refine_env.errors import ConfigurationError
from refine_env.link import (
    ChannelModel,
    RateChain,
    RateLaw,
    RateStatistics,
    rate_chain,
    rate_law,
    rate_statistics,
    total_power,
)
from refine_env.link.latency import LATENCY_MODELS
from refine_env.link.waterfilling import SNR_REFERENCES
from refine_env.model.decoding import DecoderCurve
from refine_env.model.distortion import RefinementModel, SecondMoments
from refine_env.model.schedule import NoiseSchedule

__all__ = [
    "PAPER_BIT_DEPTHS",
    "PAPER_DEADLINE",
    "PAPER_LATENCY_QUANTILE",
    "PAYLOADS",
    "LinkConfig",
    "SystemConfig",
    "WarmStart",
]

PAPER_BIT_DEPTHS = (3, 4, 8, 10, 16)
PAPER_DEADLINE = 60
PAPER_LATENCY_QUANTILE = 0.9
"""[K] §V-A: 𝓑, T_d [slots] and q, the defaults everywhere."""

DEFAULT_NAME_BITS = 32.0
"""Bits of a midpoint's name: a store of 10⁴ midpoints has two of the same name with probability 0.01."""

_MOST_NAME_BITS = 65536  # what a message's side information can hold
_SMALLEST, _LARGEST = 1e-30, 1e30
_MOST_SLOTS = 100_000


@dataclass(frozen=True, kw_only=True)
class LinkConfig(ChannelModel):
    """The wireless link and the prompt's uplink ([K] §II-A, §V-A).

    ℓ and B_s are stated for latents of ``reference_latent_dim`` dimensions and are scaled to the latent of the system,
    so that bits per dimension and slot stay those of the paper. Without this scaling every SNR would be easy for a
    small latent. K is not scaled, and neither is the relative variance of the rate.

    Args:
        num_subchannels: K.
        symbols_per_slot: ℓ, symbols per subchannel and slot at the reference dimension.
        uplink_bits: B_s, size of the prompt [bit] at the reference dimension.
        snr_reference: ``"subchannel"`` (default) or ``"total"``, see :func:`refine_env.link.total_power`.
        reference_latent_dim: M at which ℓ and B_s hold; ``None`` takes them as they are, unscaled.

    The other arguments, from ``fading`` on, are those of :class:`refine_env.link.ChannelModel`.
    ``docs/links.md`` has their formulas.

    Raises:
        ConfigurationError: if a value is out of range, or the combination has no model.
    """

    num_subchannels: int = 60
    symbols_per_slot: float = 70.0
    uplink_bits: float = 8192.0
    snr_reference: str = "subchannel"
    reference_latent_dim: int | None = 16384

    def __post_init__(self) -> None:
        super().__post_init__()
        checked = {
            "num_subchannels": check_integer(
                "num_subchannels", self.num_subchannels, 1, 1_000_000, advice="Give K, for example 60."
            ),
            "symbols_per_slot": check_positive(
                "symbols_per_slot", self.symbols_per_slot, advice="Give ℓ, for example 70."
            ),
            "uplink_bits": check_positive(
                "uplink_bits", self.uplink_bits, advice="Give the prompt's size, for example 8192."
            ),
            "snr_reference": check_choice("snr_reference", self.snr_reference, SNR_REFERENCES),
        }
        if self.reference_latent_dim is not None:
            checked["reference_latent_dim"] = check_integer(
                "reference_latent_dim", self.reference_latent_dim, 1, 2**62, advice="Give M, for example 16384."
            )
        for name, value in checked.items():  # plain int and float, so that it is JSON
            object.__setattr__(self, name, value)

    @cached_property
    def channel(self) -> ChannelModel:
        """How gains are drawn and powers allotted, without the numbers of the link."""
        return ChannelModel(**{item.name: getattr(self, item.name) for item in fields(ChannelModel)})

    def scale(self, latent_dim: int) -> float:
        """Factor on ℓ and B_s for latents of ``latent_dim`` dimensions."""
        return 1.0 if self.reference_latent_dim is None else latent_dim / self.reference_latent_dim

    @classmethod
    def from_mapping(cls, settings: LinkConfig | Mapping[str, Any] | None) -> LinkConfig:
        """A ``LinkConfig`` from a JSON object of its arguments (``None``: the defaults).

        Raises:
            ConfigurationError: if a key is not an argument.
        """
        if settings is None:
            return cls()
        if isinstance(settings, LinkConfig):
            return settings
        known = [item.name for item in fields(cls)]
        if not isinstance(settings, Mapping) or not set(settings) <= set(known):
            likely = did_you_mean(set(settings) - set(known), known) if isinstance(settings, Mapping) else ""
            raise ConfigurationError(
                f"`link` must be an object with keys among {', '.join(known)}, got {shown(settings)}. "
                f"{likely}Leave out what should keep its default."
            )
        return cls(**settings)


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Generation that starts from a stored midpoint x_m in place of noise (``docs/warm-start.md``).

    Args:
        step: m; the server has x_m as soon as the prompt has arrived. 1 … T − 1.
        shared: whether the device has the midpoint in its own store: it then starts with x_m, without error.
        name_bits: of the midpoint's name, by which the device looks it up; the first message is longer by them. Counts
            only where the midpoint is shared.

    Raises:
        ConfigurationError: if a value is out of range.
    """

    step: int
    shared: bool = False
    name_bits: float = DEFAULT_NAME_BITS

    def __post_init__(self) -> None:
        step = check_integer("warm_start.step", self.step, 1, advice="Give m in 1 … T − 1, for example 35 of 50 steps.")
        check_flag("warm_start.shared", self.shared)
        advice = f"Give the length of the midpoint's name, for example {DEFAULT_NAME_BITS}."
        name_bits = check_positive("warm_start.name_bits", self.name_bits, advice=advice)
        if name_bits > _MOST_NAME_BITS:
            raise ConfigurationError(
                f"`warm_start.name_bits` must be at most {_MOST_NAME_BITS}, got {shown(self.name_bits)}. {advice}"
            )
        object.__setattr__(self, "step", step)  # plain int and float, so that it is JSON
        object.__setattr__(self, "name_bits", name_bits)

    @classmethod
    def from_mapping(cls, settings: WarmStart | Mapping[str, Any] | None) -> WarmStart | None:
        """A ``WarmStart`` from a JSON object of its arguments; None: there is none.

        Raises:
            ConfigurationError: if a key is not an argument, or ``step`` is missing.
        """
        if settings is None or isinstance(settings, WarmStart):
            return settings
        known = [item.name for item in fields(cls)]
        if not isinstance(settings, Mapping) or "step" not in settings or not set(settings) <= set(known):
            likely = did_you_mean(set(settings) - set(known), known) if isinstance(settings, Mapping) else ""
            raise ConfigurationError(
                f"`warm_start` must be an object with `step` and keys among {', '.join(known)}, got "
                f'{shown(settings)}. {likely}Give for example {{"step": 35, "shared": true}}.'
            )
        return cls(**settings)


def _is_list(value: Any) -> bool:
    """Whether a value is a list of numbers in some form: not a text, and not one number."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _check_bit_depths(value: Any) -> tuple[int, ...]:
    advice = "Give ascending bit depths without repetition in 1 … 16, for example [3, 4, 8, 10, 16]."
    if not _is_list(value) or len(value) == 0:
        raise ConfigurationError(f"`bit_depths` must be a non-empty sequence, got {shown(value)}. {advice}")
    depths = tuple(check_integer("bit_depths", depth, 1, LOSSLESS_BITS, advice=advice) for depth in value)
    if any(a >= b for a, b in itertools.pairwise(depths)):
        raise ConfigurationError(f"`bit_depths` must be strictly ascending, got {list(depths)}. {advice}")
    return depths


def _check_snr_range(value: Any) -> float | tuple[float, float]:
    if _is_list(value):
        if len(value) != 2:
            raise ConfigurationError(
                f"`snr_db` must be one number or a pair [low, high], got {shown(value)}. "
                "Give for example 6.0, or [0, 24] to draw the SNR of every episode."
            )
        low, high = (check_snr_db(end) for end in value)
        if not low < high:
            raise ConfigurationError(
                f"`snr_db` must be a pair with low < high, got {[low, high]}. Give one number for a fixed SNR."
            )
        return low, high
    return check_snr_db(value.item() if isinstance(value, np.ndarray) else value)


@dataclass(frozen=True, kw_only=True)
class SystemConfig(CoderConfig):
    """Everything that defines the decision problem; an agent needs neither environment nor cache.

    The coder's options are those of :class:`refine_env.coding.CoderConfig`.

    Args:
        snr_db: mean SNR per subchannel [dB], or a pair (low, high) from which every episode draws uniformly.
        latent_dim: M.
        schedule: the noise schedule, T + 1 values of ᾱ.
        bit_depths: 𝓑, ascending, each 1 … 16; 16 is lossless.
        deadline: T_d [slots].
        latency_quantile: the quantile q of the latency that a policy plans with.
        latency_model: the law of which a policy takes the q-quantile: ``"paper"``, [K]'s Gaussian law with the fixed
            cutoff, or ``"exact"``, the law of the link as it is.
        link: the link.
        second_moments: second moments of the payload, with which the closed-loop coder predicts; None: those of x_t
            under the forward process.
        decoder_curve: what the device's decoder makes of this payload at the deadline; None: the device has none.
        warm_start: the midpoint that generation starts from, or a JSON object of :class:`WarmStart`'s arguments; None:
            it starts from noise.

    Raises:
        ConfigurationError: if a value is out of range.
    """

    snr_db: float | tuple[float, float]
    latent_dim: int = 16384
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule.stable_diffusion)
    bit_depths: tuple[int, ...] = PAPER_BIT_DEPTHS
    deadline: int = PAPER_DEADLINE
    latency_quantile: float = PAPER_LATENCY_QUANTILE
    latency_model: str = "paper"
    link: LinkConfig = field(default_factory=LinkConfig)
    second_moments: SecondMoments | None = None
    decoder_curve: DecoderCurve | None = None
    warm_start: WarmStart | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "snr_db", _check_snr_range(self.snr_db))
        set_field(
            self,
            "latent_dim",
            check_integer("latent_dim", self.latent_dim, 1, 2**62, advice="Give M, for example 16384."),
        )
        if not isinstance(self.schedule, NoiseSchedule):
            raise ConfigurationError(
                f"`schedule` must be a NoiseSchedule, got {type(self.schedule).__name__}. "
                "Use for example NoiseSchedule.stable_diffusion(num_steps=50)."
            )
        set_field(self, "bit_depths", _check_bit_depths(self.bit_depths))
        set_field(
            self,
            "deadline",
            check_integer("deadline", self.deadline, 1, _MOST_SLOTS, advice="Give T_d in slots, for example 60."),
        )
        set_field(self, "latency_quantile", check_quantile(self.latency_quantile, "latency_quantile"))
        check_choice("latency_model", self.latency_model, LATENCY_MODELS)
        set_field(self, "link", LinkConfig.from_mapping(self.link))
        super().__post_init__()
        set_field(self, "warm_start", WarmStart.from_mapping(self.warm_start))
        self._check_moments()
        self._check_warm_start()
        for name, value in (("symbols_per_slot", self.symbols_per_slot), ("uplink_bits", self.uplink_bits)):
            if not _SMALLEST < value / self.latent_dim < _LARGEST:
                raise ConfigurationError(
                    f"`{name}` must be between {_SMALLEST:g} and {_LARGEST:g} per latent dimension, got "
                    f"{value / self.latent_dim!r}. Check the link's numbers and `reference_latent_dim`."
                )

    def _check_moments(self) -> None:
        moments = self.second_moments
        if moments is None:
            if self.payload != "latent":
                raise ConfigurationError(
                    f"`second_moments` must be given for the payload {self.payload!r}, got None. "
                    "Take them from the trajectory cache."
                )
        elif not isinstance(moments, SecondMoments) or moments.num_steps != self.num_steps:
            got = type(moments).__name__ if not isinstance(moments, SecondMoments) else f"{moments.num_steps} steps"
            raise ConfigurationError(
                f"`second_moments` must be SecondMoments of {self.num_steps} steps, as the schedule has, got {got}. "
                "Take both from the same trajectory cache."
            )
        curve = self.decoder_curve
        if curve is not None and (not isinstance(curve, DecoderCurve) or curve.num_steps != self.num_steps):
            got = type(curve).__name__ if not isinstance(curve, DecoderCurve) else f"{curve.num_steps} steps"
            raise ConfigurationError(
                f"`decoder_curve` must be a DecoderCurve of {self.num_steps} steps, as the schedule has, got {got}. "
                "Take both from the same trajectory cache."
            )

    def _check_warm_start(self) -> None:
        if self.warm_start is None:
            return
        if self.warm_start.step >= self.num_steps:
            raise ConfigurationError(
                f"`warm_start.step` must be in 1 … {self.num_steps - 1}, before the last of the schedule's "
                f"{self.num_steps} steps, got {self.warm_start.step}. Leave `warm_start` out to start from noise."
            )
        if self.payload != "latent":
            raise ConfigurationError(
                f"`payload` must be 'latent' with a warm start, got {self.payload!r}: the estimate that belongs to x_m "
                "comes from x_(m+1), which nobody has. Leave `warm_start` or `payload` out."
            )

    @property
    def num_steps(self) -> int:
        """T."""
        return self.schedule.num_steps

    @property
    def first_server_step(self) -> int:
        """m, where generation starts: T, or the step of the warm start."""
        return self.num_steps if self.warm_start is None else self.warm_start.step

    @property
    def first_device_step(self) -> int:
        """t_p of what the device starts with: T, or m where it has the midpoint, too."""
        start = self.warm_start
        return self.num_steps if start is None or not start.shared else start.step

    @property
    def name_bits(self) -> float:
        """Length of the midpoint's name in the first message [bit]; 0 where the device has no midpoint."""
        start = self.warm_start
        return 0.0 if start is None or not start.shared else start.name_bits

    @property
    def name_bytes(self) -> int:
        """Bytes that the midpoint's name takes on the wire."""
        return math.ceil(self.name_bits / 8.0)

    def initial(self, payload: NDArray[np.float16]) -> NDArray[np.float16]:
        """What the device starts with: x_T, or x_m where it has the midpoint, too, or of posterior means 0.

        Args:
            payload: what is sent of a trajectory, indexed by t, (T+1, ...) or (T, ...).
        """
        step = self.first_device_step
        return payload[step] if len(payload) > step else np.zeros_like(payload[0])

    @property
    def num_actions(self) -> int:
        """1 + |𝓑|: WAIT, then TRANSMIT at every bit depth."""
        return 1 + len(self.bit_depths)

    @property
    def symbols_per_slot(self) -> float:
        """ℓ for this latent [symbols per subchannel and slot]; may be fractional."""
        return self.link.symbols_per_slot * self.link.scale(self.latent_dim)

    @property
    def uplink_bits(self) -> float:
        """B_s for this latent [bit]."""
        return self.link.uplink_bits * self.link.scale(self.latent_dim)

    @property
    def snr_range_db(self) -> tuple[float, float]:
        """Lowest and highest SNR [dB]; equal where there is just one."""
        return self.snr_db if isinstance(self.snr_db, tuple) else (self.snr_db, self.snr_db)

    def single_snr_db(self, purpose: str) -> float:
        """The SNR [dB] of a configuration that has just one.

        Args:
            purpose: who asks, for the message.

        Raises:
            ConfigurationError: if the configuration has a range.
        """
        if isinstance(self.snr_db, tuple):
            raise ConfigurationError(
                f"`snr_db` must be one number for {purpose}, got the range {list(self.snr_db)}. "
                "Use a configuration with a single SNR, or an agent that infers it."
            )
        return self.snr_db

    def action_of(self, bits: int) -> int:
        """The action TRANSMIT(b).

        Raises:
            ConfigurationError: if b is not among the bit depths.
        """
        if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or bits not in self.bit_depths:
            raise ConfigurationError(
                f"`bits` must be one of the bit depths {list(self.bit_depths)}, got {shown(bits)}. "
                "Add it to `bit_depths`."
            )
        return self.bit_depths.index(bits) + 1

    @property
    def max_bits_per_dimension(self) -> float:
        """Largest message in bits per dimension: a lossless latent, or whatever is larger."""
        largest = max(self.uplink_bits, float(self.first_message_bits.max()))
        return max(float(LOSSLESS_BITS), largest / self.latent_dim)

    @cached_property
    def message_bits(self) -> NDArray[np.float64]:
        """Size of a message at every bit depth, payload and the coder's side information [bit], shape (|𝓑|,).

        The payload is M·b, or less where indices are entropy-coded.
        """
        coder, dim = self.make_coder(), self.latent_dim
        sizes = np.array([coder.payload_bits(dim, bits) + 8.0 * coder.side_bytes(bits) for bits in self.bit_depths])
        sizes.setflags(write=False)
        return sizes

    @cached_property
    def first_message_bits(self) -> NDArray[np.float64]:
        """The same of an episode's first message, which also carries the name of a shared midpoint, shape (|𝓑|,)."""
        sizes: NDArray[np.float64] = self.message_bits + self.name_bits
        sizes.setflags(write=False)
        return sizes

    @property
    def all_message_bits(self) -> NDArray[np.float64]:
        """:attr:`message_bits`, followed by :attr:`first_message_bits` where these differ, (|𝓑|,) or (2|𝓑|,)."""
        return np.concatenate([self.message_bits, self.first_message_bits]) if self.name_bits else self.message_bits

    @cached_property
    def base_distortion(self) -> NDArray[np.float64]:
        """D_base of every bit depth, shape (|𝓑|,)."""
        values = np.array([base_distortion(bits) for bits in self.bit_depths])
        values.setflags(write=False)
        return values

    @cached_property
    def refinement_model(self) -> RefinementModel:
        """The model by which a policy predicts the distortion after a chain of deliveries."""
        if self.coder == "forward":
            return RefinementModel.paper(self.schedule)
        return RefinementModel.closed_loop(self.second_moments or SecondMoments.forward_process(self.schedule))

    def final_distortion(self, step: Any, device_error: Any) -> Any:
        """Predicted mean squared error per dimension of what the device shows at the deadline; arrays are broadcast.

        That of what it holds, or where it has a decoder, of what that makes of it.

        Args:
            step: t of what it holds.
            device_error: its coding error e.
        """
        model: RefinementModel | DecoderCurve = self.decoder_curve or self.refinement_model
        return model.distortion(step, device_error)

    def total_power(self, snr_db: float) -> float:
        """Σ_j p_j of a slot at that SNR, noise-normalized."""
        return total_power(snr_db, self.link.num_subchannels, self.link.snr_reference)

    @cached_property
    def rate_statistics(self) -> RateStatistics:
        """The paper's γ_0, R̄ and σ_R at the configuration's one SNR.

        Raises:
            ConfigurationError: if the configuration has an SNR range.
        """
        return rate_statistics(*self._rate_arguments("rate statistics"))

    @cached_property
    def rate_law(self) -> RateLaw:
        """The exact law of the bits per slot at the configuration's one SNR.

        Raises:
            ConfigurationError: if the configuration has an SNR range.
        """
        return rate_law(*self._rate_arguments("the rate law"))

    def rate_chain(self, num_levels: int = 8) -> RateChain:
        """The Markov chain of rate levels at the configuration's one SNR, for links whose slots depend on each other.

        Raises:
            ConfigurationError: if the configuration has an SNR range, or the number of levels is out of range.
        """
        return rate_chain(*self._rate_arguments("the rate chain"), num_levels)

    def _rate_arguments(self, purpose: str) -> tuple[float, int, float, str, ChannelModel]:
        """The arguments that are common to the functions of :mod:`refine_env.link` that describe the rate of a slot."""
        link, snr_db = self.link, self.single_snr_db(purpose)
        return snr_db, link.num_subchannels, self.symbols_per_slot, link.snr_reference, link.channel

    @property
    def latency_law(self) -> RateStatistics | RateLaw | RateChain:
        """The law that the configured latency model takes quantiles of (:func:`refine_env.link.latency_quantiles`).

        Raises:
            ConfigurationError: if the configuration has an SNR range.
        """
        return self.rate_statistics if self.latency_model == "paper" else self.exact_latency_law

    @property
    def exact_latency_law(self) -> RateLaw | RateChain:
        """The law of the link as it is, whatever the configured latency model.

        Raises:
            ConfigurationError: if the configuration has an SNR range.
        """
        return self.rate_law if self.link.channel.independent else self.rate_chain()

    def make_coder(self) -> Coder:
        """The configured refinement coder."""
        return make_coder(self, self.schedule, self.bit_depths, self.refinement_model)

    def make_codec(self, initial: NDArray[np.float16], coder: Coder | None = None) -> RefinementCodec:
        """One end of the refinement link.

        Args:
            initial: what both ends begin with, as :meth:`initial` says.
            coder: the configured coder, where it is at hand.
        """
        coder = self.make_coder() if coder is None else coder
        return RefinementCodec(coder, initial, first_step=self.first_device_step, name_bytes=self.name_bytes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; ``decoder_curve`` and ``warm_start`` are in it only where the system has them."""
        optional: dict[str, Any] = {}
        if self.decoder_curve is not None:
            optional["decoder_curve"] = self.decoder_curve.to_dict()
        if self.warm_start is not None:
            optional["warm_start"] = asdict(self.warm_start)
        return {
            "snr_db": list(self.snr_db) if isinstance(self.snr_db, tuple) else self.snr_db,
            "latent_dim": self.latent_dim,
            "schedule": {"alpha_bar": self.schedule.alpha_bar.tolist()},
            "bit_depths": list(self.bit_depths),
            "deadline": self.deadline,
            "latency_quantile": self.latency_quantile,
            "latency_model": self.latency_model,
            "link": asdict(self.link),
            **self.coder_options(),
            "second_moments": None if self.second_moments is None else self.second_moments.values.tolist(),
            **optional,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SystemConfig:
        """The configuration that :meth:`to_dict` wrote.

        Raises:
            ConfigurationError: if a field is missing, unknown or out of range.
        """
        known = {item.name for item in fields(cls)}
        complete = isinstance(values, Mapping) and {*values, "decoder_curve", "warm_start"} == known
        if not complete or not isinstance(values["schedule"], Mapping) or "alpha_bar" not in values["schedule"]:
            raise ConfigurationError(
                f"`values` must be an object with the keys {', '.join(sorted(known))}, and `alpha_bar` in `schedule`, "
                f"got {values!r:.200}. Write it with SystemConfig.to_dict."
            )
        moments, curve = values["second_moments"], values.get("decoder_curve")
        return cls(
            **{
                **values,
                "schedule": NoiseSchedule(values["schedule"]["alpha_bar"]),
                "second_moments": None if moments is None else SecondMoments(moments),
                "decoder_curve": None if curve is None else DecoderCurve.from_dict(curve),
            }
        )
