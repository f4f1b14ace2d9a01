"""The loop of a training stage, with checkpoints from which it goes on to the same weights."""

from __future__ import annotations

import hashlib
import logging
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from tqdm import tqdm

from refine_env._files import replacing
from refine_env.errors import ConfigurationError, describe_error
from train.diffusion.config import OnStep, StageConfig
from train.options import unreadable_checkpoint

log = logging.getLogger("train.ldm")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; a kill at any moment leaves the old one or the new one, whole."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def load_checkpoint(path: Path, options: dict[str, Any], device: str) -> dict[str, Any] | None:
    """Read a checkpoint.

    Args:
        path: the file.
        options: what the stage's weights depend on, by name.
        device: the torch device that the weights go to.

    Returns:
        The state that :func:`save_checkpoint` was given; None if there is no file.

    Raises:
        ConfigurationError: if the file cannot be read, or was made with other options.
    """
    for left in path.parent.glob(f"{path.name}*.tmp"):  # by a run that was killed while it wrote
        left.unlink()
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        made_with = dict(state["options"])
    except Exception as error:  # torch has no one error for a file that is damaged
        raise unreadable_checkpoint("--work", path, describe_error(error)) from None
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

    def __init__(self, config: StageConfig, on_step: OnStep | None) -> None:
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
        return torch.autocast(torch.device(self.config.device).type, dtype=torch.bfloat16, enabled=self.config.bf16)

    def options(self) -> dict[str, Any]:
        """Return what the stage's weights depend on: options, images, token ids."""
        return {**self.config.trained_stage_with(self.name), "data": self.data_digest}

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters of all modules."""
        return [parameter for module in self.modules.values() for parameter in module.parameters()]

    def use_optimizer(self, lr: float, warmup: int) -> None:
        """Set AdamW with warm-up and cosine decay to 0 at the last step."""
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=1e-2, fused=True)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, self.steps)

    def run(self) -> None:
        """Train to the last step, from the checkpoint if there is one."""
        path = self.config.work / f"{self.name}.pt"
        state = load_checkpoint(path, self.options(), self.config.device)
        if state is not None:
            try:
                self._load(state)
            except Exception as error:  # a whole file, but of another version, or made by hand
                raise unreadable_checkpoint("--work", path, describe_error(error)) from None
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
