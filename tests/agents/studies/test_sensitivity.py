"""Which conclusion depends on which parameter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agents.evaluate import main
from agents.figures import draw_all
from agents.studies import sensitivity
from agents.studies.sensitivity import KNOBS, POLICIES, conclude, read_sensitivity
from refine_env.dynamics.settings import EnvSettings
from refine_env.evaluation import EPISODE_COLUMNS, read_table
from tests.processes import run


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_moves_what_it_names_and_nothing_else(name: str) -> None:
    knob = KNOBS[name]
    assert knob.paper in knob.values
    settings = EnvSettings.from_kwargs({"snr_db": 6.0})
    cache = settings.open_cache()
    usual = settings.config_for(cache)
    assert EnvSettings.from_kwargs({"snr_db": 6.0, **knob.env_kwargs(knob.paper)}).config_for(cache) == usual
    for value in knob.values:
        config = EnvSettings.from_kwargs({"snr_db": 6.0, **knob.env_kwargs(value)}).config_for(cache)
        moved = {**config.to_dict(), **config.to_dict().pop("link")}
        same = {**usual.to_dict(), **usual.to_dict().pop("link")}
        changed = {key for key in moved if moved[key] != same[key]} - {"link"}
        assert changed <= {name, "symbols_per_slot"}
        assert moved[name] == value
        symbols = config.link.num_subchannels * config.link.symbols_per_slot
        assert symbols == pytest.approx(4200.0)


def test_a_conclusion_holds_fails_or_stays_open() -> None:
    rng = np.random.default_rng(0)
    spread = 1.0 + 0.01 * rng.standard_normal(500)
    means = {"lookahead": spread, "a": 2.0 * spread, "b": 1.5 * spread}
    found = conclude(means)
    assert (found["against"], found["holds"]) == ("b", "yes")
    assert found["ratio"] == pytest.approx(1.5)
    assert conclude({**means, "b": 0.5 * spread})["holds"] == "no"
    assert conclude({"lookahead": spread, "a": np.flip(spread)})["holds"] == "open"


def test_command(gaussian_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    short = {name: knob._replace(values=(knob.values[0], knob.paper)) for name, knob in KNOBS.items()}
    monkeypatch.setattr(sensitivity, "KNOBS", short)
    out = tmp_path / "out"
    run(
        main,
        *("--study", "sensitivity", "--cache", gaussian_cache, "--split", "all", "--episodes", "4"),
        *("--snr-db", "9", "--out", out, "--workers", "1"),
    )
    cells, conclusions = read_sensitivity(out)
    assert {(row["knob"], row["value"], row["agent"]) for row in cells} == {
        (name, value, policy) for name, knob in short.items() for value in knob.values for policy in POLICIES
    }
    assert len(conclusions) == len(sensitivity.CONCLUSIONS) * 2 * len(short)
    # At the paper's value every knob plays the same episodes.
    played = read_table(out / "episodes.csv", {"knob": str, "value": float, **EPISODE_COLUMNS})
    for agent in POLICIES:
        scores = {
            tuple(
                row["latent_mse"] for row in played if (row["knob"], row["value"], row["agent"]) == (n, k.paper, agent)
            )
            for n, k in short.items()
        }
        assert len(scores) == 1, agent
    drawn = draw_all(out, tmp_path / "again")
    assert [path.suffix for path in drawn] == [".png", ".pdf"] * len(KNOBS)
