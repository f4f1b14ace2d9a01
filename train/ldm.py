"""Train a small text-to-image latent diffusion model on emoji glyphs; save a StableDiffusionPipeline.

One command, ``python -m train.ldm``, goes through the stages

1. glyphs: read the font, hold families out, render the images;
2. VAE (``AutoencoderKL``): pixels to latents;
3. U-Net and text encoder (``UNet2DConditionModel``, ``CLIPTextModel``), jointly, on the VAE's latents;
4. the pipeline's folder: fp16 weights, prompt lists, metrics;
5. the evaluation of what was saved (``train.diffusion.assess``): figures, table, sheet of samples, model card.

Stages 2 and 3 write checkpoints. The same command goes on from the last one, and passes over a finished
stage.

Notation: x_0 is a latent in the diffusion model's units (scaling factor applied), M its number of elements.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import logging
import math
import os
import platform
import shlex
import string
import time
import typing
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refine_env.commands import command, run
from refine_env.errors import ConfigurationError, import_extra
from refine_env.trajectories.generate import sample_seed
from train.diffusion import emoji

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from numpy.typing import NDArray
    from transformers import CLIPTextModel, CLIPTokenizer

log = logging.getLogger("train.ldm")

EXTRA = ("torch", "diffusers", "transformers", "accelerate", "fontTools", "PIL")
LATENT_CHANNELS = 4
TRAIN_TIMESTEPS = 1000
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
END_OF_WORD = "</w>"

# Options that do not change what is trained: a run may be resumed with others.
FREE_OPTIONS = frozenset(
    {
        "out",
        "work",
        "font",
        "emoji_test",
        "sheet",
        "trajectory_prompts",
        "device",
        "threads",
        "log_every",
        "checkpoint_every",
    }
)
# Options that the VAE stage does not depend on (beside the free ones): a finished VAE serves other U-Nets.
UNET_PREFIXES = ("unet_", "text_", "ema_", "snr_", "prompt_", "family_")

OnStep = Callable[[str, int], None]


@dataclass(frozen=True)
class Config:
    """Every option of the command. The defaults made the bundled model."""

    out: Annotated[Path, typer.Option(help="Folder the pipeline is saved in.")] = Path("refine_env/models/emoji")
    work: Annotated[Path, typer.Option(help="Folder of checkpoints.")] = Path("runs/emoji")
    sheet: Annotated[Path, typer.Option(help="File for the sheet of samples.")] = Path("docs/figures/emoji-samples.png")
    trajectory_prompts: Annotated[Path, typer.Option(help="File for the 128 prompts of the cached trajectories.")] = (
        Path("cached_trajectories/default.prompts.txt")
    )
    font: Annotated[
        Path | None,
        typer.Option(help="NotoColorEmoji.ttf with bitmaps; looked for in the font folders if not given."),
    ] = None
    emoji_test: Annotated[
        Path | None,
        typer.Option(help="Unicode's emoji-test.txt, for the groups; looked for in the usual folders if not given."),
    ] = None
    device: Annotated[str, typer.Option(help="Torch device: cpu, cuda, ...")] = "cpu"
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves torch's own choice.", min=0, max=1024)] = 0
    bf16: Annotated[bool, typer.Option(help="Run the networks under bfloat16 autocast.")] = True
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and noise.", min=0)] = 0
    split_seed: Annotated[int, typer.Option(help="Seed of the held-out families and of the prompt choice.", min=0)] = 0
    held_out: Annotated[float, typer.Option(help="Part of the glyphs held out, by family.", min=0, max=0.5)] = 0.05
    resolution: Annotated[
        int, typer.Option(help="Image side in pixels; the latents' side is a quarter of it.", min=8, max=1024)
    ] = 64
    log_every: Annotated[int, typer.Option(help="Steps between log lines with held-out figures.", min=1)] = 500
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 250

    vae_channels: Annotated[str, typer.Option(help="VAE channels, one number a level.")] = "16,32,64"
    vae_attention: Annotated[bool, typer.Option(help="Attention in the middle of the VAE's encoder and decoder.")] = (
        False
    )
    vae_augment: Annotated[
        bool, typer.Option(help="Mirror, shift and recolor the VAE's training images at random.")
    ] = True
    vae_steps: Annotated[int, typer.Option(help="VAE steps.", min=0)] = 4000
    vae_batch: Annotated[int, typer.Option(help="VAE images a step.", min=1, max=65536)] = 16
    vae_lr: Annotated[float, typer.Option(help="VAE peak learning rate (cosine decay to 0).", min=0, max=1)] = 2.5e-3
    vae_kl: Annotated[float, typer.Option(help="Weight of the KL term, summed over a latent.", min=0, max=1e6)] = 1e-6

    unet_channels: Annotated[str, typer.Option(help="U-Net channels, one number a level.")] = "64,112,144"
    unet_layers: Annotated[int, typer.Option(help="Residual layers a level.", min=1, max=65536)] = 1
    unet_heads: Annotated[int, typer.Option(help="Attention heads.", min=1, max=65536)] = 3
    unet_steps: Annotated[int, typer.Option(help="U-Net steps.", min=0)] = 7000
    unet_batch: Annotated[int, typer.Option(help="U-Net samples a step.", min=1, max=65536)] = 32
    unet_lr: Annotated[float, typer.Option(help="U-Net peak learning rate (cosine decay to 0).", min=0, max=1)] = 1e-3
    unet_warmup: Annotated[int, typer.Option(help="Warm-up steps of the learning rate.", min=0)] = 300
    text_vocab: Annotated[int, typer.Option(help="Largest vocabulary of the tokenizer.", min=1, max=65536)] = 1536
    text_length: Annotated[int, typer.Option(help="Tokens a prompt is padded or cut to.", min=4, max=65536)] = 32
    text_width: Annotated[int, typer.Option(help="Width of the text encoder.", min=1, max=65536)] = 128
    text_layers: Annotated[int, typer.Option(help="Layers of the text encoder.", min=1, max=65536)] = 2
    text_heads: Annotated[int, typer.Option(help="Attention heads of the text encoder.", min=1, max=65536)] = 4
    ema_decay: Annotated[float, typer.Option(help="Largest decay of the weights' moving average.", min=0, max=1)] = (
        0.999
    )
    snr_gamma: Annotated[float, typer.Option(help="Min-SNR loss weight's bound; 0 for no bound.", min=0, max=1e12)] = (
        5.0
    )
    snr_power: Annotated[
        float,
        typer.Option(help="The error of x_0 weighs as the bounded SNR to this power; 1 is Min-SNR.", min=0, max=1),
    ] = 0.25
    prompt_dropout: Annotated[float, typer.Option(help="Part of the prompts emptied, for guidance.", min=0, max=1)] = (
        0.1
    )
    prompt_signs: Annotated[
        float,
        typer.Option(help="Weight with which a flag, sign or letter is drawn, a picture's being 1.", min=0, max=1e6),
    ] = 0.25
    family_power: Annotated[
        float,
        typer.Option(
            help="A glyph is drawn with weight (family size)^-power: variants do not crowd out the rest.",
            min=-10,
            max=10,
        ),
    ] = 1.0

    @property
    def latent_side(self) -> int:
        """Side of the latents in elements."""
        return self.resolution >> len(channels(self.vae_channels)) - 1

    def trained_with(self, stage: str) -> dict[str, Any]:
        """Return the options that the weights of a stage ("vae" or "unet") depend on."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in FREE_OPTIONS and not (stage == "vae" and name.startswith(UNET_PREFIXES))
        }

    def command(self) -> str:
        """Return the command line of this run, without the options that do not change what is trained."""
        words = ["python", "-m", "train.ldm"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in FREE_OPTIONS or value == field.default:
                continue
            option = "--" + field.name.replace("_", "-")
            words += [option if value else "--no-" + option[2:]] if isinstance(value, bool) else [option, str(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class Dataset:
    """The glyphs of both parts with their images, (N, 3, R, R), uint8."""

    train: list[emoji.Glyph]
    held: list[emoji.Glyph]
    train_images: torch.Tensor
    held_images: torch.Tensor


def channels(text: str) -> tuple[int, ...]:
    """Read a list of channel numbers such as "16,32,64".

    Raises
    ------
    ConfigurationError
        If it is no list of positive integers.
    """
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ConfigurationError(
            f"channels must be positive integers with commas between, got {text!r}. Use e.g. 16,32,64."
        )
    return numbers


def norm_groups(widths: Sequence[int]) -> int:
    """Return the largest number of normalization groups, at most 32, each of two channels or more."""
    common = math.gcd(*widths)
    return max(groups for groups in range(1, 33) if common % groups == 0 and (common // groups > 1 or groups == 1))


def require_extra() -> None:
    """Raise MissingExtraError unless every package of the ``ldm`` extra can be imported."""
    for module in EXTRA:
        import_extra(module, "ldm")


# --- The parts of the pipeline --------------------------------------------------------------------


def build_scheduler() -> DDPMScheduler:
    """Return Stable Diffusion v1-5's noise schedule, sampled by DDPM with the posterior variance."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        variance_type="fixed_small",
        clip_sample=False,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def build_tokenizer(prompts: Iterable[str], config: Config) -> CLIPTokenizer:
    """Train a CLIP tokenizer (byte-pair encoding) on prompts: the same one for the same prompts, in any order.

    The library's own trainer numbers the end-of-word characters by the order of a hash map, which is another
    one in every process: an interrupted run would go on with other token ids. Hence the few lines here.
    """
    from transformers import CLIPTokenizer

    blank = CLIPTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for prompt in prompts:
        normal = blank.normalizer.normalize_str(prompt)
        words.update(piece for piece, _ in blank.pre_tokenizer.pre_tokenize_str(normal))
    alphabet = sorted(set(string.printable[:94]).union(*words))
    vocabulary = [*SPECIAL_TOKENS, *alphabet, *(character + END_OF_WORD for character in alphabet)]
    merges = byte_pair_merges(words, config.text_vocab - len(vocabulary))
    vocabulary += [first + second for first, second in merges]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=merges,
        model_max_length=config.text_length,
    )


def byte_pair_merges(words: Mapping[str, int], count: int) -> list[tuple[str, str]]:
    """Return up to ``count`` merges: each time of the most frequent pair, the alphabetically first among equals.

    ``words`` holds the number of times that each word occurs; a pair that occurs once is not merged.
    """
    spelled = {word: [*word[:-1], word[-1] + END_OF_WORD] for word in sorted(words)}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        for parts in spelled.values():
            position = 0
            while position < len(parts) - 1:
                if (parts[position], parts[position + 1]) == best:
                    parts[position : position + 2] = [best[0] + best[1]]
                position += 1
    return merges


def build_vae(config: Config) -> AutoencoderKL:
    """Return an untrained VAE; each level but the last halves the side."""
    from diffusers import AutoencoderKL

    widths = channels(config.vae_channels)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=norm_groups(widths),
        mid_block_add_attention=config.vae_attention,
        sample_size=config.resolution,
    )


def build_unet(config: Config) -> UNet2DConditionModel:
    """Return an untrained U-Net.

    Attention at the coarsest level alone: at the finer ones it would cost half the time. The prompt reaches those
    through the time embedding, to which a pooled text embedding is added.
    """
    from diffusers import UNet2DConditionModel

    widths = channels(config.unet_channels)
    finer = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=config.latent_side,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=widths,
        layers_per_block=config.unet_layers,
        down_block_types=("DownBlock2D",) * finer + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * finer,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.unet_heads,  # diffusers' historical name: the number of heads
        norm_num_groups=norm_groups(widths),
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=config.text_heads,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, config: Config) -> CLIPTextModel:
    """Return an untrained text encoder for a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=config.text_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """Return token ids (N, L), padded as StableDiffusionPipeline pads them."""
    encoded = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return typing.cast("torch.Tensor", encoded.input_ids)


# --- Checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; a kill at any moment leaves the old one or the new one, whole."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_checkpoint(path: Path, options: dict[str, Any], device: str) -> dict[str, Any] | None:
    """Read a checkpoint, None if there is none.

    Raises
    ------
    ConfigurationError
        If it was made with other options.
    """
    import torch

    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    made_with = state["options"]
    changed = [name for name in options.keys() | made_with.keys() if options.get(name) != made_with.get(name)]
    if changed:
        listed = ", ".join(f"{name} {made_with.get(name)} (now {options.get(name)})" for name in sorted(changed))
        raise ConfigurationError(
            f"options must be those of the checkpoint {path}, which has {listed}. "
            "Use the same options or another --work."
        )
    return state


def digest(*tensors: torch.Tensor) -> str:
    """Return a digest of the values of tensors."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.cpu().numpy().tobytes())
    return state.hexdigest()[:16]


class Stage(ABC):
    """The loop of one training stage: steps, checkpoints, progress. Subclasses say what a step is.

    All random draws come from ``self.generator``, a CPU generator whose state is in the checkpoint: the same
    options give the same weights on one machine with one number of threads, interrupted or not.
    """

    name: str
    steps: int
    batch: int

    def __init__(self, config: Config, on_step: OnStep | None) -> None:
        import torch

        self.config = config
        self.on_step = on_step
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.data_digest = ""
        self.modules: dict[str, torch.nn.Module] = {}
        self.optimizer: torch.optim.Optimizer
        self.schedule: torch.optim.lr_scheduler.LRScheduler

    @abstractmethod
    def loss(self) -> torch.Tensor:
        """Draw a batch and return its loss."""

    def after_update(self) -> None:  # noqa: B027 - most stages need nothing
        """Do what follows an optimizer step."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return the figures for the log."""

    def extra_state(self) -> dict[str, Any]:
        """Return further state for the checkpoint."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - as above
        """Restore what ``extra_state`` returned."""

    def autocast(self) -> torch.autocast:
        """Return the precision context of the networks."""
        import torch

        return torch.autocast(torch.device(self.config.device).type, dtype=torch.bfloat16, enabled=self.config.bf16)

    def options(self) -> dict[str, Any]:
        """Return what the stage's weights depend on: options, images, token ids."""
        return {**self.config.trained_with(self.name), "data": self.data_digest}

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters of all modules."""
        return [parameter for module in self.modules.values() for parameter in module.parameters()]

    def use_optimizer(self, lr: float, warmup: int) -> None:
        """Set AdamW with warm-up and cosine decay to 0 at the last step."""
        import torch
        from diffusers.optimization import get_cosine_schedule_with_warmup

        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=1e-2, fused=True)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, self.steps)

    def run(self) -> None:
        """Train to the last step, from the checkpoint if there is one."""
        from tqdm import tqdm

        path = self.config.work / f"{self.name}.pt"
        state = load_checkpoint(path, self.options(), self.config.device)
        if state is not None:
            self._load(state)
            log.info("%s: goes on from step %d of %d", self.name, self.step, self.steps)
        started, seconds_before, first_step = time.perf_counter(), self.seconds, self.step
        running = None
        with tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=10) as bar:
            while self.step < self.steps:
                value = self._update()
                running = value if running is None else 0.98 * running + 0.02 * value
                bar.update()
                self.seconds = seconds_before + time.perf_counter() - started
                last = self.step == self.steps
                if last or self.step % self.config.log_every == 0:
                    speed = (self.step - first_step) * self.batch / (time.perf_counter() - started)
                    figures = {
                        "step": self.step,
                        "loss": float(running),
                        "images_per_s": speed,
                        **self.evaluate(),
                    }
                    self.history.append(figures)
                    log.info(
                        "%s: %s",
                        self.name,
                        ", ".join(f"{key} {number:.5g}" for key, number in figures.items()),
                    )
                if last or self.step % self.config.checkpoint_every == 0:
                    save_checkpoint(path, self._state())
                if self.on_step is not None:
                    self.on_step(self.name, self.step)

    def _update(self) -> torch.Tensor:
        import torch

        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.after_update()
        return loss.detach()

    def _state(self) -> dict[str, Any]:
        return {
            "options": self.options(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "generator": self.generator.get_state(),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "extra": self.extra_state(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.generator.set_state(state["generator"].cpu())
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.load_extra_state(state["extra"])


# --- VAE ------------------------------------------------------------------------------------------


def to_signal(images: torch.Tensor, device: str) -> torch.Tensor:
    """Map uint8 pixels to float32 in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def to_pixels(signal: torch.Tensor) -> torch.Tensor:
    """Map [-1, 1] to whole numbers 0 - 255, as float32: the inverse of ``to_signal``."""
    return ((signal.clamp(-1, 1) + 1) * 127.5).round()


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return images (B, 3, R, R) changed at random; no prompt is involved, so anything a glyph could be will do.

    Half of them are mirrored, all are shifted by up to R/8 pixels each way (the border is repeated), and in a
    quarter of them the color channels change places.
    """
    import torch

    count, _, side, _ = images.shape
    reach = side // 8
    columns = torch.arange(side).expand(count, side)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    down, right = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(side) + down).clamp(0, side - 1)
    columns = columns.gather(1, (torch.arange(side) + right).clamp(0, side - 1))
    order = torch.rand(count, 3, generator=generator).argsort(1)
    recolored = torch.rand(count, 1, generator=generator) < 0.25
    order = torch.where(recolored, order, torch.arange(3))
    image = torch.arange(count)
    return images[image[:, None, None, None], order[:, :, None, None], rows[:, None, :, None], columns[:, None, None]]


class VaeStage(Stage):
    """Mean squared error plus a little KL, on augmented images."""

    name = "vae"

    def __init__(self, config: Config, data: Dataset, on_step: OnStep | None) -> None:
        import torch

        super().__init__(config, on_step)
        self.steps, self.batch = config.vae_steps, config.vae_batch
        self.data = data
        self.data_digest = digest(data.train_images)
        torch.manual_seed(config.seed)
        self.vae = build_vae(config).to(config.device)
        self.modules = {"vae": self.vae}
        self.use_optimizer(config.vae_lr, warmup=min(100, config.vae_steps // 10))

    def loss(self) -> torch.Tensor:
        """Draw a batch and return its loss."""
        import torch

        index = torch.randint(len(self.data.train_images), (self.batch,), generator=self.generator)
        noise = torch.randn(self._latent_shape(), generator=self.generator).to(self.config.device)
        images = self.data.train_images[index]
        if self.config.vae_augment:
            images = augmented(images, self.generator)
        signal = to_signal(images, self.config.device)
        with self.autocast():
            posterior = self.vae.encode(signal).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            decoded = self.vae.decode(mean + std * noise).sample.float()
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum(dim=(1, 2, 3)).mean()
        error: torch.Tensor = torch.nn.functional.mse_loss(decoded, signal)
        return error + self.config.vae_kl * typing.cast("torch.Tensor", kl)

    def _latent_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, LATENT_CHANNELS, self.config.latent_side, self.config.latent_side)

    def evaluate(self) -> dict[str, float]:
        """Return the figures for the log."""
        return {"held_psnr_db": psnr_db(self.vae, self.data.held_images, self.config.device)}


def batches(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Yield a tensor in pieces of at most ``size`` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def psnr_db(vae: AutoencoderKL, images: torch.Tensor, device: str) -> float:
    """Return 10 log10(255² / MSE), images decoded from the posterior mean, the MSE over all of them."""
    import torch

    total = 0.0
    with torch.no_grad():
        for part in batches(images, 256):
            decoded = vae.decode(vae.encode(to_signal(part, device)).latent_dist.mode()).sample
            total += float(((to_pixels(decoded) - part.to(device).float()) ** 2).sum())
    return 10 * math.log10(255**2 / max(total / images.numel(), 1e-12)) if len(images) else math.nan


def latent_moments(vae: AutoencoderKL, images: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and standard deviation of the posterior of every image, (N, 4, S, S) each, unscaled."""
    import torch

    means, stds = [], []
    with torch.no_grad():
        for part in batches(images, 256):
            posterior = vae.encode(to_signal(part, device)).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


def standardize(vae: AutoencoderKL, images: torch.Tensor, device: str) -> None:
    """Give the latents of the images zero mean in every channel, and E‖x_0‖²/M = 1 by the scaling factor.

    The shift goes into the biases of the two 1x1 convolutions at the latent, so what the VAE reconstructs
    does not change. Without it the white background is a constant in x_0 that x_T does not hold, and samples
    come out grey.
    """
    import torch

    mean, std = latent_moments(vae, images, device)
    shift = mean.mean(dim=(0, 2, 3))
    scale = float(((mean - shift[:, None, None]) ** 2 + std**2).mean()) ** 0.5
    with torch.no_grad():
        vae.quant_conv.bias[:LATENT_CHANNELS] -= shift
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
    vae.register_to_config(scaling_factor=1 / scale)


# --- U-Net and text encoder -----------------------------------------------------------------------


def spread_timesteps(share: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw timesteps (count,) by their shares (T,), which sum to 1: one from each of ``count`` equal parts of the mass.

    They are in random order, and each by itself has the distribution of the shares; together they are spread, so
    that the loss of a batch varies less.
    """
    import torch

    place = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.searchsorted(share.double().cumsum(0), place / count, right=True).clamp(max=len(share) - 1)


def noise_loss_weight(snr: torch.Tensor, gamma: float, power: float) -> torch.Tensor:
    """Return the weight of the noise prediction error, min(SNR, gamma)^power / SNR, by timestep.

    An error of the noise is sqrt(SNR) times one of x_0, so the error of x_0 weighs min(SNR, gamma)^power. Power 1
    is Min-SNR. What a picture shows is settled at high noise: glyphs that lie d apart are told apart from about
    SNR = 8 log(number) / d² on, here 0.04. With power 1 the steps before, where the prompt alone can say it, hardly
    count, and the more elements a latent has, the less; a smaller power lets them count.
    """
    bounded = snr.clamp(max=gamma) if gamma else snr
    return bounded**power / snr


class UnetStage(Stage):
    """Noise prediction, Min-SNR weighted; evaluated and saved is the moving average of the weights."""

    name = "unet"

    def __init__(
        self,
        config: Config,
        data: Dataset,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        on_step: OnStep | None,
    ) -> None:
        import torch
        from diffusers.training_utils import EMAModel, compute_snr

        super().__init__(config, on_step)
        self.steps, self.batch = config.unet_steps, config.unet_batch
        device, scale = config.device, vae.config.scaling_factor
        self.mean, self.std = (scale * moment for moment in latent_moments(vae, data.train_images, device))
        self.held_mean = scale * latent_moments(vae, data.held_images, device)[0] if data.held else self.mean[:0]
        self.ids = tokens(tokenizer, [glyph.prompt for glyph in data.train]).to(device)
        self.data_digest = digest(data.train_images, self.ids)
        self.held_ids = tokens(tokenizer, [glyph.prompt for glyph in data.held] or [""]).to(device)
        self.no_prompt = tokens(tokenizer, [""]).to(device)
        families = [glyph.family for glyph in data.train]
        size = {family: families.count(family) for family in set(families)}
        self.draw_weight = torch.tensor(
            [
                size[glyph.family] ** -config.family_power
                * (1 if emoji.is_picture(glyph.prompt) else config.prompt_signs)
                for glyph in data.train
            ]
        )
        torch.manual_seed(config.seed)
        self.unet = build_unet(config).to(device)
        self.text_encoder = build_text_encoder(tokenizer, config).to(device)
        self.modules = {"unet": self.unet, "text_encoder": self.text_encoder}
        self.use_optimizer(config.unet_lr, config.unet_warmup)
        self.ema = EMAModel(self.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.noising = build_scheduler()
        snr = compute_snr(self.noising, torch.arange(TRAIN_TIMESTEPS))
        weight = noise_loss_weight(snr, config.snr_gamma, config.snr_power)
        # Half of the weight, on the log scale, is in how often a timestep is drawn: less noise in the gradient.
        self.timestep_share = weight.sqrt() / weight.sqrt().sum()
        self.loss_weight = (weight / (self.timestep_share * TRAIN_TIMESTEPS)).to(device)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the predicted noise of latents x_t (B, 4, S, S) at timesteps t (B,) under prompts (B, L)."""
        with self.autocast():
            embedded = self.text_encoder(ids).last_hidden_state
            return typing.cast("torch.Tensor", self.unet(x_t, t, embedded).sample.float())

    def loss(self) -> torch.Tensor:
        """Draw a batch and return its loss."""
        import torch

        device, draw = self.config.device, self.generator
        index = torch.multinomial(self.draw_weight, self.batch, replacement=True, generator=draw)
        t = spread_timesteps(self.timestep_share, self.batch, draw).to(device)
        latent_noise, noise = (
            torch.randn(self.batch, *self.mean.shape[1:], generator=draw).to(device) for _ in range(2)
        )
        emptied = (torch.rand(self.batch, generator=draw) < self.config.prompt_dropout).to(device)
        index = index.to(device)
        x_0 = self.mean[index] + self.std[index] * latent_noise
        ids = torch.where(emptied[:, None], self.no_prompt, self.ids[index])
        predicted = self.predict(self.noising.add_noise(x_0, noise, t), t, ids)
        return (self.loss_weight[t] * ((predicted - noise) ** 2).mean(dim=(1, 2, 3))).mean()

    def after_update(self) -> None:
        """Do what follows an optimizer step."""
        self.ema.step(self.parameters())

    def evaluate(self) -> dict[str, float]:
        """Return the figures for the log."""
        self.ema.store(self.parameters())
        self.ema.copy_to(self.parameters())
        count = max(1, len(self.held_mean))
        stride = max(1, len(self.mean) // count)
        figures = {
            "train_noise_mse": self._noise_mse(self.mean[::stride][:count], self.ids[::stride][:count]),
            "held_noise_mse": self._noise_mse(self.held_mean, self.held_ids),
        }
        self.ema.restore(self.parameters())
        return figures

    def _noise_mse(self, x_0: torch.Tensor, ids: torch.Tensor, timesteps_each: int = 4) -> float:
        """Return the unweighted noise prediction error: the same noise at every call, t evenly spread."""
        import torch

        if not len(x_0):
            return math.nan
        draw = torch.Generator().manual_seed(self.config.seed + 1)
        offsets = torch.randperm(len(x_0), generator=draw).float() / len(x_0)
        errors = []
        with torch.no_grad():
            for k in range(timesteps_each):
                t_all = ((k + offsets) * TRAIN_TIMESTEPS / timesteps_each).long()
                noise_all = torch.randn(x_0.shape, generator=draw)
                for rows in batches(torch.arange(len(x_0)), self.batch):
                    t, noise = t_all[rows].to(x_0.device), noise_all[rows].to(x_0.device)
                    predicted = self.predict(self.noising.add_noise(x_0[rows], noise, t), t, ids[rows])
                    errors.append(((predicted - noise) ** 2).mean(dim=(1, 2, 3)))
        return float(torch.cat(errors).mean())

    def extra_state(self) -> dict[str, Any]:
        """Return further state for the checkpoint."""
        return {"ema": self.ema.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what ``extra_state`` returned."""
        self.ema.load_state_dict(state["ema"])


# --- The result -----------------------------------------------------------------------------------


def load_pipeline(folder: Path, device: str = "cpu") -> StableDiffusionPipeline:
    """Load a saved pipeline for sampling: float32, offline, with no progress bar."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    guidance_scale: float,
    steps: int = 50,
    batch: int = 32,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Sample one image a prompt; prompt k starts from the seed of sample k of a trajectory cache.

    Returns
    -------
    images
        uint8 array (N, 3, R, R).
    latents
        x_0, float32 array (N, 4, S, S).
    """
    import torch

    seeds = [sample_seed(0, k) for k in range(len(prompts))]
    images, latents = [], []
    with torch.no_grad():
        for rows in batches(torch.arange(len(prompts)), batch):
            x_0 = pipeline(
                [prompts[k] for k in rows],
                guidance_scale=guidance_scale,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seeds[k]) for k in rows],
                output_type="latent",
            ).images
            decoded = pipeline.vae.decode(x_0 / pipeline.vae.config.scaling_factor).sample
            images.append(to_pixels(decoded).to(torch.uint8).cpu())
            latents.append(x_0.float().cpu())
    return torch.cat(images).numpy(), torch.cat(latents).numpy()


def save_pipeline(folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, stage: UnetStage) -> None:
    """Save a StableDiffusionPipeline: fp16 safetensors, the moving average of the trained weights."""
    import torch
    from diffusers import StableDiffusionPipeline

    stage.ema.copy_to(stage.parameters())
    StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=stage.text_encoder.eval(),
        tokenizer=tokenizer,
        unet=stage.unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder, safe_serialization=True)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape the weights."""
    from importlib.metadata import version

    names = ("torch", "diffusers", "transformers", "tokenizers", "fonttools", "pillow", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def load_data(config: Config, glyphs: Sequence[emoji.Glyph] | None) -> Dataset:
    """Return the data set: of the font, or of the glyphs given.

    Raises
    ------
    ConfigurationError
        If the resolution does not fit the VAE and the U-Net.
    """
    import torch

    step = 2 ** (len(channels(config.vae_channels)) + len(channels(config.unet_channels)) - 2)
    if config.resolution < step or config.resolution % step:
        raise ConfigurationError(f"resolution must be a multiple of {step}, got {config.resolution}. Use 32 or 64.")
    if glyphs is None:
        glyphs = emoji.read_glyphs(emoji.find_font(config.font))
    train, held = emoji.split(glyphs, config.held_out, config.split_seed)
    return Dataset(
        train,
        held,
        torch.from_numpy(emoji.pixels(train, config.resolution)),
        torch.from_numpy(emoji.pixels(held, config.resolution)),
    )


def write_prompts(config: Config, data: Dataset) -> None:
    """Write the two prompt lists of the model folder and the 64 + 64 prompts of the cached trajectories."""
    config.out.mkdir(parents=True, exist_ok=True)
    config.trajectory_prompts.parent.mkdir(parents=True, exist_ok=True)
    half = 64
    chosen = [
        *emoji.diverse_prompts(data.train, half, config.split_seed),
        *emoji.diverse_prompts(data.held, half, config.split_seed),
    ]
    for path, prompts in (
        (config.out / "prompts_train.txt", [glyph.prompt for glyph in data.train]),
        (config.out / "prompts_heldout.txt", [glyph.prompt for glyph in data.held]),
        (config.trajectory_prompts, chosen),
    ):
        path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


def train(config: Config, glyphs: Sequence[emoji.Glyph] | None = None, on_step: OnStep | None = None) -> Path:
    """Train, or go on training, and save the model and its training figures. Returns the model folder.

    Parameters
    ----------
    config
        The options.
    glyphs
        The data set; the font's glyphs if not given.
    on_step
        Called with the stage's name and the number of steps done, after every step and its checkpoint.

    Raises
    ------
    MissingExtraError
        If a package of the ``ldm`` extra is not installed.
    FileNotFoundError
        If the font is not there.
    ConfigurationError
        If an option cannot be used or differs from the checkpoint's.
    """
    require_extra()
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    data = load_data(config, glyphs)
    log.info("%d glyphs for training, %d held out", len(data.train), len(data.held))
    write_prompts(config, data)

    vae_stage = VaeStage(config, data, on_step)
    vae_stage.run()
    vae = vae_stage.vae.eval().requires_grad_(False)
    standardize(vae, data.train_images, config.device)

    tokenizer = build_tokenizer([glyph.prompt for glyph in data.train], config)
    unet_stage = UnetStage(config, data, vae, tokenizer, on_step)
    unet_stage.run()

    save_pipeline(config.out, vae, tokenizer, unet_stage)
    metrics = {
        "command": config.command(),
        "resolution": config.resolution,
        "latent_side": config.latent_side,
        "seeds": {"seed": config.seed, "split_seed": config.split_seed},
        "glyphs": len(data.train) + len(data.held),
        "families": len({glyph.family for glyph in itertools.chain(data.train, data.held)}),
        "glyphs_train": len(data.train),
        "glyphs_held_out": len(data.held),
        "parameters": {
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in (("vae", vae), *unet_stage.modules.items())
        },
        "vae": {
            "scaling_factor": vae.config.scaling_factor,
            "images_seen": vae_stage.step * vae_stage.batch,
            "seconds": round(vae_stage.seconds, 1),
            **vae_stage.history[-1],
        },
        "unet": {
            "images_seen": unet_stage.step * unet_stage.batch,
            "seconds": round(unet_stage.seconds, 1),
            **unet_stage.history[-1],
        },
        "history": {"vae": vae_stage.history, "unet": unet_stage.history},
        "versions": versions(),
    }
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    log.info("saved to %s", config.out)
    return config.out


@command
def main(**options: Any) -> None:
    """Train and evaluate the emoji model, or go on where an interrupted run with the same options stopped."""
    from train.diffusion import assess as evaluate

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = Config(**options)
    require_extra()
    glyphs, groups = evaluate.sources(config.font, config.emoji_test)  # what is missing is said before the training
    folder = train(config, glyphs)
    evaluate.evaluate(folder, config.trajectory_prompts, config.sheet, glyphs, groups, device=config.device)


# Typer reads the options off the signature: here they are the fields of Config, so that each is written once.
_hints = typing.get_type_hints(Config, include_extras=True)
main.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_hints[field.name]
        )
        for field in dataclasses.fields(Config)
    ]
)
main.__annotations__ = {field.name: _hints[field.name] for field in dataclasses.fields(Config)}

if __name__ == "__main__":
    run(main)
