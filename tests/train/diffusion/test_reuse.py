"""The study of midpoint reuse: its pairs, its tables by hand, and a small one, interrupted, from prompts to figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from refine_env import ConfigurationError, NoiseSchedule
from refine_env.evaluation import read_table
from refine_env.metrics import gallery_path
from train.diffusion import reuse
from train.diffusion.reuse import KINDS, Study, Variant, choose_blocks, summarize, tabulate_adaptive

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TONE = "emoji modifier fitzpatrick type-4"


@pytest.fixture
def prompts(bundled: Path) -> list[str]:
    return (bundled / "prompts_train.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("prompt", "family", "tone", "gender"),
    [
        (f"woman {TONE} rocket", "adult rocket", f" {TONE}", "woman"),
        (f"surfer {TONE} male sign", "surfer", f" {TONE}", "male sign"),
        ("man in tuxedo", "adult in tuxedo", "", "man"),
        ("mango", "mango", "", ""),
        (f"adult {TONE} handshake adult {TONE}", f"adult {TONE} handshake adult {TONE}", "", ""),
    ],
)
def test_prompts_are_taken_apart(prompt: str, family: str, tone: str, gender: str) -> None:
    assert Variant.of(prompt) == Variant(prompt, family, tone, gender)


class TestPairs:
    def test_kinds(self, prompts: list[str]) -> None:
        blocks = choose_blocks(prompts, 3, 4, 0)
        families = []
        for block in blocks:
            assert len(block.sources) == 4
            assert len(block.pairs) == 24
            assert set(block.prompts) <= set(prompts)
            families += [Variant.of(source).family for source in block.sources]
            own = {Variant.of(source).family for source in block.sources}
            for pair in block.pairs:
                source, target = Variant.of(pair.source), Variant.of(pair.target)
                changed = (source.family != target.family, source.tone != target.tone, source.gender != target.gender)
                assert source.tone
                if pair.kind == "tone":
                    assert changed == (False, True, False)
                    assert pair.static == pair.target.replace(target.tone, "")
                elif pair.kind == "role":
                    assert not changed[1]
                    assert changed[0] or changed[2]
                    assert target.family in own
                    assert pair.static == "adult" + source.tone
                else:
                    assert changed[0]
                    assert not target.tone
                    assert pair.static == ""
            for kind in KINDS:
                assert sum(pair.kind == kind for pair in block.pairs) == 8
        assert len(set(families)) == 12  # no block has a family of another

    def test_a_block_is_the_same_whatever_their_number(self, prompts: list[str]) -> None:
        assert choose_blocks(prompts, 2, 4, 0) == choose_blocks(prompts, 3, 4, 0)[:2]
        assert choose_blocks(prompts, 1, 4, 0) != choose_blocks(prompts, 1, 4, 1)

    def test_too_few_families(self, prompts: list[str]) -> None:
        with pytest.raises(ConfigurationError, match=r"`families` must be .* 73 families .* got 37\. Choose fewer"):
            choose_blocks(prompts, 2, 37, 0)


def test_summary_by_hand() -> None:
    rows = [
        {"kind": "tone", "mode": mode, "ratio": 0.5, "step": 25, "nmse": nmse, "psnr_db": 20.0, "ssim": 0.5,
         "family_kept": kept, "glyph_kept": 0.0}
        for mode, nmse, kept in (("switch", 0.1, 1.0), ("switch", 0.3, 0.0), ("mean", 0.5, 1.0))
    ]  # fmt: skip
    first, second = summarize(rows)
    assert (first["mode"], first["pairs"], first["nmse"], first["family_kept"]) == ("switch", 2, 0.2, 0.5)
    assert 0.1 <= first["nmse_low"] < 0.2 < first["nmse_high"] <= 0.3
    assert (second["mode"], second["pairs"], second["nmse"]) == ("mean", 1, 0.5)
    assert second["nmse_low"] == second["nmse_high"] == 0.5


class TestAdaptive:
    """Errors that are a multiple of the distances: R* is nearly what it would be if they were known."""

    STEPS = (35, 15, 5)

    def tables(self, blocks: int, noise: float) -> tuple[Any, Any]:
        rng = np.random.default_rng(0)
        rows, distances = [], []
        for block in range(blocks):
            for k in range(60):
                pair = {"block": block, "source": "a", "target": str(k), "mode": "switch"}
                reach, factor = rng.uniform(0.001, 0.1), rng.uniform(1.0 - noise, 1.0)
                for step, error in zip(self.STEPS, (0.05, 0.3, 1.0), strict=True):
                    distances.append({**pair, "kind": "tone", "step": step, "distance": reach, "power": 1.0})
                    rows.append({**pair, "step": step, "nmse": error * reach * factor * 10})
        return rows, distances

    def test_errors_that_are_known(self) -> None:
        rows, distances = self.tables(2, 0.0)
        found = tabulate_adaptive(rows, distances, NoiseSchedule.stable_diffusion(50))
        assert [row["tolerance"] for row in found] == list(reuse.TOLERANCES)
        for row in found:
            assert (row["tuning_pairs"], row["pairs"]) == (60, 60)
            assert row["coverage"] >= 0.9 - 0.05  # of 60 pairs
            assert row["fixed_coverage"] >= row["coverage"]
            assert row["fixed_ratio"] < row["ratio"] < row["oracle_ratio"] + 0.1  # a tenth of the pairs may err more
            assert row["evaluations"] == pytest.approx(50 * (1 - row["ratio"]))
            assert 1 <= row["asked"] <= 3
        assert any(row["ratio"] > row["fixed_ratio"] + 0.05 for row in found)

    def test_other_pairs_are_tuned_on(self) -> None:
        """Ten times the errors on the test pairs alone: the choice is the same, and no longer covers."""
        rows, distances = self.tables(2, 0.3)
        worse = [{**row, "nmse": row["nmse"] * (10 if row["block"] == 1 else 1)} for row in rows]
        found, other = (tabulate_adaptive(own, distances, NoiseSchedule.stable_diffusion(50)) for own in (rows, worse))
        assert [row["ratio"] for row in found] == [row["ratio"] for row in other]
        assert min(row["coverage"] for row in other) < 0.5
        assert tabulate_adaptive(*self.tables(1, 0.3), NoiseSchedule.stable_diffusion(50)) == []


SMALL = {
    "ratios": "0.5",
    "modes": "vanilla,two-stage,mean",
    "blocks": 1,
    "families": 2,
    "num_steps": 2,
    "batch_size": 7,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables and figures of a study at one go."""
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("study")
    run(folder / "out", folder / "work")
    return folder


def run(out: Path, work: Path, **changes: Any) -> None:
    bundled = reuse.MODEL
    options = {"model": "emoji", "prompts": bundled / "prompts_train.txt", "gallery": gallery_path(bundled), "seed": 0,
               "guidance_scale": 2.0, "batch_size": 7, **SMALL, **changes}  # fmt: skip
    reuse.main(out=out, figures=out, work=work, **options)


class TestStudy:
    def test_tables(self, finished: Path) -> None:
        rows = read_table(finished / "out" / "reuse-pairs.csv", reuse.PAIR_COLUMNS, optional=("static",))
        assert len(rows) == 3 * 2 * 12
        for row in rows:
            assert row["step"] == (1 if row["ratio"] else 2)
            if row["ratio"] == 0.0:
                assert (row["nmse"], row["psnr_db"], row["ssim"], row["glyph_kept"]) == (0.0, 100.0, 1.0, 1.0)
            else:
                assert row["nmse"] > 0.0
        summary = read_table(finished / "out" / "reuse.csv", reuse.SUMMARY_COLUMNS)
        assert len(summary) == 3 * 2 * 3
        times = read_table(finished / "out" / "reuse-times.csv", reuse.TIME_COLUMNS)
        assert [row["mode"] for row in times] == ["full", "vanilla", "two-stage", "mean"]
        assert len(read_table(finished / "out" / "reuse-similarity.csv", reuse.SIMILARITY_COLUMNS)) == 3 * 2
        distances = read_table(finished / "out" / "reuse-distances.csv", reuse.DISTANCE_COLUMNS)
        assert len(distances) == 2 * 12
        assert (finished / "out" / "reuse-adaptive.csv").is_file()  # of one block it has no rows
        for name in ("quality", "strip", "similarity"):
            assert (finished / "out" / f"reuse-{name}.png").stat().st_size > 10_000

    def test_interrupted_it_goes_on_and_ends_in_the_same(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count = 0
        scores = Study.scores

        def interrupted(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == 4:
                raise KeyboardInterrupt
            return scores(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Study, "scores", interrupted)
            with pytest.raises(typer.Exit, match="130"):
                run(tmp_path / "out", tmp_path / "work")
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "block-0").glob("*.csv")}
        assert len(made) == 3
        run(tmp_path / "out", tmp_path / "work")
        assert {path: path.stat().st_mtime_ns for path in made} == made  # what was there was not made again
        for path in (finished / "out").iterdir():
            if path.name != "reuse-times.csv":
                assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name

    def test_bad_input(self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def refused(code: str, **options: Any) -> str:
            with pytest.raises(typer.Exit, match=code):
                run(tmp_path / "out", finished / "work", **options)
            return " ".join(capsys.readouterr().err.split())

        assert "`ratios` must be numbers in [0, 1), none twice, got '0.5,1'" in refused("2", ratios="0.5,1")
        assert "`modes` must be some of vanilla, switch, " in refused("2", modes="vanilla,other")
        assert "`--prompts` must be a file of prompts" in refused("2", prompts=tmp_path / "none.txt")
        assert "`families` must be at least 2, and 2 blocks" in refused("2", blocks=2, families=40)
        assert "`reuse_ratio` must leave m" in refused("2", ratios="0.9")
        assert "differs from the finished cache there" in refused("3", guidance_scale=3.0)
        assert json.loads((finished / "work" / "block-0" / "full.time.json").read_text())["seconds"] > 0.0
        assert not (tmp_path / "out").exists()
