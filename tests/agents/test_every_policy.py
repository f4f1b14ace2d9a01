"""Whatever takes a policy takes every policy: evaluation, page, figures, recording, socket."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agents
from agents import evaluate, figures, record, report, send
from agents.figures.style import DASHES, MARKERS, rows_by_policy, styles_by_policy
from agents.policies.learned import SHIPPED
from agents.report.player import make_player
from refine_env.evaluation import EPISODE_COLUMNS, SUMMARY_COLUMNS, read_table
from refine_env.transport import Receiver, Reception
from tests.processes import run

NAMES = [*agents.names(), "learned", "learned:mine"]
"""All that can be registered, played on the default cache, the one that the shipped policy is trained for."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a learned policy of one's own in it."""
    folder = tmp_path_factory.mktemp("every-policy")
    shutil.copytree(SHIPPED, folder / "mine")
    return folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture
def evaluated(here: Path) -> Path:
    """Tables of all policies at one SNR, made once."""
    folder = here / "results"
    if not folder.exists():
        common = ("--snr-db", "12", "--episodes", "2", "--no-figures", "--out", str(folder))
        run(evaluate.main, "--agents", ",".join(NAMES), *common)
    return folder


def test_page(evaluated: Path) -> None:
    pytest.importorskip("plotly")
    run(report.main, str(evaluated))
    text = (evaluated / report.REPORT_FILE).read_text(encoding="utf-8")
    summary = read_table(evaluated / "summary.csv", SUMMARY_COLUMNS)
    assert [row["agent"] for row in summary] == NAMES
    for style in styles_by_policy(rows_by_policy(summary)).values():
        assert json.dumps(style["label"]) in text or style["label"] in text
    player, notes = make_player(
        read_table(evaluated / "episodes.csv", EPISODE_COLUMNS), report.read_run(evaluated), 1, None
    )
    assert player is not None
    assert list(player["choices"]["agent"]) == [i for i, name in enumerate(NAMES) if name != "random"]
    assert [note.split(" is not here")[0] for note in notes] == ["Random (forward)"]  # draws numbers of its own


def test_figures(evaluated: Path) -> None:
    pytest.importorskip("matplotlib")
    run(figures.main, str(evaluated))
    assert (evaluated / "fig3a.png").stat().st_size > 10_000


def test_styles_differ() -> None:
    """Also those of names that nobody has thought of."""
    strangers = ["mine", "learned:a", "learned:b", "persistent-q1"]
    rows = [{"agent": name, "coder": "forward", "payload": "latent"} for name in [*NAMES, *strangers]]
    styles = styles_by_policy(rows_by_policy(rows))
    assert {style["marker"] for style in styles.values()} <= set(MARKERS)
    assert {style.get("linestyle", "-") for style in styles.values()} <= set(DASHES)
    assert len({style["label"] for style in styles.values()}) == len(styles)
    looks = {(style["color"], style["marker"], style.get("linestyle", "-")) for style in styles.values()}
    assert len(looks) == len(styles)


@pytest.mark.parametrize("name", NAMES)
def test_recording(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slot is played and asked for its frame; one of them is drawn, the others are the same picture."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL.Image")
    drawn: list[Any] = []
    render = record.LatentRefinementEnv.render

    def draw_once(env: Any) -> Any:
        drawn.append(render(env) if not drawn else drawn[0])
        return drawn[0]

    monkeypatch.setattr(record.LatentRefinementEnv, "render", draw_once)
    run(record.main, "--agent", name, "--snr-db", "12", "--decoder", "none", "--out", f"{name[-8:]}.png")
    assert len(drawn) == 61
    assert (here / f"{name[-8:]}.png").stat().st_size > 1_000


@pytest.mark.parametrize("name", NAMES)
def test_socket(name: str, here: Path) -> None:
    received: list[Reception] = []
    with Receiver(timeout=60.0) as receiver:
        device = threading.Thread(target=lambda: received.append(receiver.receive()))
        device.start()
        port = str(receiver.address[1])
        told = run(send.main, "--agent", name, "--snr-db", "12", "--port", port, "--timeout", "60")
        device.join(60.0)
    (reception,) = received
    assert reception.latent.shape == (1024,)
    assert np.isfinite(reception.latent).all()
    assert f"the device holds x_{reception.device_step}" in told
