"""Sequential and progressive on one draw: equal to the evaluation's episodes, and what the deadline cuts off."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from numpy.typing import ArrayLike, NDArray
from typer.testing import CliRunner

import agents
from agents.evaluate import main
from agents.figures import draw_all, draw_timeline
from agents.studies.timeline import SCHEMES, Timeline, play_timeline, read_timelines, write_timelines
from refine_env import ConfigurationError
from refine_env.evaluation import episode_seeds, roll_out

SNR_DB = 6.0


def decoder(latents: ArrayLike) -> NDArray[np.float32]:
    """Stands in for a model's: (N, 4, 8, 8) to images of 8 × 8 pixels."""
    return 1.0 / (1.0 + np.exp(-np.asarray(latents, dtype=np.float32)[:, :3].transpose(0, 2, 3, 1)))


@pytest.fixture(scope="module")
def timelines(gaussian_cache: Path) -> list[Timeline]:
    kwargs = {"cache": str(gaussian_cache), "split": "test"}
    (seed,) = episode_seeds(0, 1)
    return [play_timeline(scheme, SNR_DB, 0, seed, kwargs, decoder) for scheme in SCHEMES]


def test_a_timeline_is_an_episode_of_the_evaluation(gaussian_cache: Path, timelines: list[Timeline]) -> None:
    for scheme, one in zip(SCHEMES, timelines, strict=True):
        kwargs = {"cache": str(gaussian_cache), "snr_db": SNR_DB}
        (row,) = roll_out(partial(agents.make, SCHEMES[scheme]), env_kwargs=kwargs, episodes=1, seed=0, anytime=True)
        assert [slot["slot"] for slot in one.slots] == list(range(61))
        assert {(slot["seed"], slot["trajectory"]) for slot in one.slots} == {(row["seed"], row["trajectory"])}
        assert one.slots[0]["latent_mse"] == row["no_delivery_mse"]
        assert one.slots[-1]["latent_mse"] == row["latent_mse"]
        assert np.mean([slot["latent_mse"] for slot in one.slots[1:]]) == pytest.approx(row["anytime_mse"])
        delivered = [message for message in one.messages if message["bits"] and message["last_slot"]]
        assert len(delivered) == row["num_deliveries"]
        prompt = one.messages[0]
        assert (prompt["bits"], prompt["last_slot"]) == (0, row["uplink_slots"])
        # The bits of a message are those that its slots carried.
        for message in delivered:
            carried = sum(slot["rate"] for slot in one.slots[message["first_slot"] : message["last_slot"] + 1])
            assert message["bits"] <= carried < message["bits"] + one.slots[message["last_slot"]]["rate"]
        assert list(one.images) == [0, *(message["last_slot"] for message in delivered)]


def test_both_schemes_have_one_draw(timelines: list[Timeline]) -> None:
    sequential, progressive = timelines
    for name in ("seed", "trajectory", "slot", "server_step", "rate"):
        assert [row[name] for row in sequential.slots] == [row[name] for row in progressive.slots]
    uplink = sequential.messages[0]["last_slot"]
    steps = [row["server_step"] for row in sequential.slots[1:]]
    assert steps == [min(50, max(0, 50 + uplink + 1 - slot)) for slot in range(1, 61)]


def test_the_deadline_cuts_off_what_comes_late(timelines: list[Timeline]) -> None:
    sequential, progressive = timelines
    late = sequential.messages[-1]
    assert (late["step"], late["bits"], late["last_slot"]) == (0, 16, None)
    rates = [row["rate"] for row in sequential.slots]
    assert late["sent"] == pytest.approx(sum(rates[late["first_slot"] :]) / 16)
    assert progressive.slots[-1]["latent_mse"] < 0.01 < sequential.slots[-1]["latent_mse"]


def test_tables_survive_the_disk(timelines: list[Timeline], tmp_path: Path) -> None:
    written = write_timelines(timelines, tmp_path)
    assert [path.name for path in written] == ["slots.csv", "messages.csv", "timeline.npz"]
    for one, other in zip(timelines, read_timelines(tmp_path), strict=True):
        assert (one.slots, one.messages) == (other.slots, other.messages)
        assert list(one.images) == list(other.images)
        assert all(np.array_equal(one.images[slot], other.images[slot]) for slot in one.images)
    (tmp_path / "timeline.npz").write_text("none")
    with pytest.raises(ConfigurationError, match="`timeline.npz` must hold the images of a timeline, got"):
        read_timelines(tmp_path)
    plain = [one._replace(images={}) for one in timelines]
    assert [path.name for path in write_timelines(plain, tmp_path)] == ["slots.csv", "messages.csv"]
    assert [one.images for one in read_timelines(tmp_path)] == [{}, {}]


def test_no_two_pictures_overlap(timelines: list[Timeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither do the texts of a lane."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.offsetbox import AnnotationBbox

    from agents.figures import timeline as module

    figures: list[Any] = []
    monkeypatch.setattr(module, "save_figure", lambda figure, out, name: figures.append(figure) or [])
    busy = timelines[1]
    variants = [timelines]
    for width in (1, 2, 3, 4):
        starts = range(7, 61 - width, width)
        often = [{**busy.messages[1], "first_slot": slot, "last_slot": slot + width - 1} for slot in starts]
        shown = {0: busy.images[0], **{slot + width - 1: busy.images[0] for slot in starts}}
        variants.append([timelines[0], busy._replace(messages=[busy.messages[0], *often], images=shown)])
    for pair in variants:
        draw_timeline(pair, tmp_path)
        FigureCanvasAgg(figures[-1]).draw()
        for axes in figures[-1].axes:
            boxes = [a.get_window_extent() for a in axes.get_children() if isinstance(a, AnnotationBbox)]
            boxes += [text.get_window_extent() for text in axes.texts if text.get_fontsize() < 8]
            for k, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[k + 1 :])


def test_command(gaussian_cache: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    arguments = ["--study", "fig1", "--cache", str(gaussian_cache), "--snr-db", "6,24", "--episodes", "2"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "No images (no picture: gaussian latents)." in result.output
    assert "sequential at 24 dB" in result.output
    assert len(read_timelines(tmp_path / "out")) == 8
    assert not (tmp_path / "out" / "timeline.npz").exists()
    before = (tmp_path / "out" / "fig1.png").read_bytes()
    assert [path.name for path in draw_all(tmp_path / "out", tmp_path / "again")] == ["fig1.png", "fig1.pdf"]
    assert (tmp_path / "again" / "fig1.png").read_bytes() == before
