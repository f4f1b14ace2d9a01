"""Pipelines small enough to build in a second, with random weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .models import TINY_LATENT_SHAPE, save_conditioned, save_sd15, save_tiny

LATENT_SHAPE = TINY_LATENT_SHAPE


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write thousands of small files; one test sees to it that they are synced."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def torch_on_one_thread() -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(torch_on_one_thread: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved StableDiffusionPipeline; its own scheduler is PNDM, as Stable Diffusion v1-5's is."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    return save_tiny(tmp_path_factory.mktemp("tiny")).rename(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def conditioned_model(torch_on_one_thread: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a StableDiffusionUpscalePipeline, whose network sees an image beside the latent."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    return save_conditioned(tmp_path_factory.mktemp("conditioned"))


@pytest.fixture(scope="session")
def sd15_model(torch_on_one_thread: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of Stable Diffusion v1-5's architecture, narrow."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    return save_sd15(tmp_path_factory.mktemp("sd15"))
