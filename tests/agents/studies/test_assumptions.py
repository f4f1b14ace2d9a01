"""Which assumption of the paper holds how well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agents.evaluate import main
from agents.figures import draw_all
from agents.studies import assumptions, few_steps
from agents.studies.assumptions import QUANTILES, read_assumptions, tabulate_chains, tabulate_coverage
from refine_env.coding import CODERS, LloydMax, Transmission
from refine_env.trajectories import generate_diffusers, generate_gaussian
from tests.processes import run


@pytest.mark.parametrize("coder", CODERS)
def test_a_single_message_on_ideal_trajectories_has_the_predicted_error(coder: str, tmp_path: Path) -> None:
    """E[η] = s² D(b), and the error of a centroid quantizer leans against what is quantized, not against x_0."""
    cache = generate_gaussian(tmp_path / "ideal", 24, (4, 16, 16), num_steps=20, seed=3)
    table = tabulate_chains(cache, range(24), coder, lengths=(1, 3), last_steps=(0, 8))
    assert len(table) == 2 * 4 * 2
    for row in table:
        if row["length"] == 1:
            assert row["ratio"] == pytest.approx(1.0, abs=0.05)
            assert row["ratio_low"] < row["ratio"] < row["ratio_high"]
        assert (row["correlation"] is None) == (row["last_step"] == 0)
    if coder == "closed_loop":
        first = next(row for row in table if (row["bits"], row["length"], row["last_step"]) == (3, 1, 8))
        ab = cache.schedule.alpha_bar
        assert first["predicted"] == pytest.approx((1.0 - ab[20] / ab[8]) * LloydMax(3).distortion)


def test_realized_errors_are_those_of_the_devices(tmp_path: Path) -> None:
    """Against the coder's own deliveries, one by one."""
    from refine_env import SystemConfig

    cache = generate_gaussian(tmp_path / "ideal", 2, (4, 8, 8), num_steps=20, seed=3)
    (row,) = tabulate_chains(cache, [1], "closed_loop", bit_depths=(4,), lengths=(3,), last_steps=(8,))
    config = SystemConfig(snr_db=6.0, latent_dim=256, schedule=cache.schedule, bit_depths=(4,), coder="closed_loop")
    coder, latents = config.make_coder(), np.ascontiguousarray(cache.latents(1)).reshape(21, -1)
    device, held, error = latents[20].astype(np.float32), 20, 0.0
    for number, step in enumerate((18, 13, 8)):
        error = coder.deliver(latents.view(np.uint16), device, Transmission(step, held, 4, error, number))
        held = step
    coding = device - latents[8].astype(np.float64)
    missing = latents[8].astype(np.float64) - latents[0]
    assert row["realized"] == pytest.approx(np.square(coding).mean(), rel=1e-6)
    ab, planned = cache.schedule.alpha_bar, 0.0
    for earlier, later in ((20, 18), (18, 13), (13, 8)):
        rho2 = ab[earlier] / ab[later]
        planned = (1.0 - rho2 + rho2 * planned) * LloydMax(4).distortion
    assert row["predicted"] == pytest.approx(planned)
    assert row["predicted"] == pytest.approx(error, rel=0.25)  # which follows the scales that were sent
    assert row["correlation"] == pytest.approx(np.corrcoef(coding, missing)[0, 1], abs=0.03)


def test_coverage_of_the_exact_law_is_at_least_q_and_simulation_agrees() -> None:
    table = tabulate_coverage([0.0, 9.0, 24.0], 1024, 0)
    assert len(table) == 3 * 5 * len(QUANTILES) * 2
    for row in table:
        assert row["simulated"] == pytest.approx(row["coverage"], abs=0.03)
        if row["law"] == "exact":
            assert row["coverage"] >= row["quantile"] - 1e-9
    # The exact law promises no slot more than it needs; the paper's does.
    by_case = {(row["snr_db"], row["bits"], row["quantile"], row["law"]): row for row in table}
    spare = [by_case[(*key[:3], "paper")]["slots"] - row["slots"] for key, row in by_case.items() if key[3] == "exact"]
    assert max(spare) >= 1


@pytest.mark.extras
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_steps, "FOLDER", tmp_path)
    monkeypatch.setattr(assumptions, "GUIDANCE_SCALES", (2.0, 6.0))
    prompts = ["red apple", "blue bird", "mobile phone"]
    generate_diffusers(
        tmp_path / "small", "emoji", prompts, num_steps=20, guidance_scale=2.0, batch_size=3, num_train=1
    )
    out = tmp_path / "out"
    run(
        main,
        *("--study", "assumptions", "--cache", tmp_path / "small", "--episodes", "3", "--snr-db", "6,24"),
        *("--out", out, "--workers", "1"),
    )
    tables = read_assumptions(out)
    assert {row["coder"] for row in tables["chains.csv"]} == set(CODERS)
    assert {row["guidance_scale"] for row in tables["guidance.csv"]} == {2.0, 6.0}
    power = {row["guidance_scale"]: row["power"] for row in tables["guidance.csv"]}
    assert power[6.0] > power[2.0]
    assert len(tables["guided.csv"]) == 2 * 2 * 2
    before = (out / "assumptions.png").read_bytes()
    draw_all(out, tmp_path / "again")
    assert (tmp_path / "again" / "assumptions.png").read_bytes() == before
