"""Figures as functions of tables: what is drawn, what is left out, and the same bytes for the same table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from agents.evaluate import print_table
from agents.figures import (
    curves,
    distortion,
    draw_fig2a,
    draw_fig2b,
    draw_fig3a,
    draw_fig3b,
    draw_strip,
    images,
    main,
    rows_by_policy,
    styles_by_policy,
)
from agents.studies.distortion import (
    DIFFUSION_COLUMNS,
    QUANTIZATION_COLUMNS,
    tabulate_diffusion,
    tabulate_quantization,
)
from refine_env import ConfigurationError, TrajectoryCache
from refine_env.evaluation import SUMMARY_COLUMNS, Table, write_table
from refine_env.metrics import MAX_PSNR_DB

pytest.importorskip("matplotlib")


def summary_row(agent: str, snr_db: float, **columns: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(SUMMARY_COLUMNS)
    row |= {name: 0.0 for name, kind in SUMMARY_COLUMNS.items() if kind is float and row[name] is None}
    row |= {name: None for name in row if name.startswith(("psnr", "ssim", "lpips"))}
    row |= {"agent": agent, "snr_db": snr_db, "coder": "forward", "payload": "latent", "episodes": 2}
    row |= {"latent_mse": 0.1, "ci_low": 0.09, "ci_high": 0.11, "no_delivery_mse": 1.8, "scored_episodes": 0}
    return row | columns


def scored(agent: str, snr_db: float, psnr_db: float, **columns: Any) -> dict[str, Any]:
    quality = {"psnr_db": psnr_db, "psnr_db_low": psnr_db - 1, "psnr_db_high": psnr_db + 1, "scored_episodes": 2}
    return summary_row(agent, snr_db, **quality, ssim=0.5, ssim_low=0.4, ssim_high=0.6, **columns)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn, instead of files."""
    figures: list[Any] = []

    def keep(figure: Any, out: Path, name: str) -> list[Path]:
        figures.append(figure)
        return [out / name]

    for module in (curves, distortion, images):
        monkeypatch.setattr(module, "save_figure", keep)
    return figures


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """The labeled lines of a panel, error bars included."""
    handles, labels = axes.get_legend_handles_labels()
    found = {}
    for handle, label in zip(handles, labels, strict=True):
        line = handle[0] if isinstance(handle, tuple) else handle
        found[label] = (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
    return found


class TestPolicies:
    def test_one_coder_needs_no_mention(self) -> None:
        rows = [summary_row("lookahead", 0.0), summary_row("final-only", 0.0)]
        assert list(rows_by_policy(rows)) == ["lookahead", "final-only"]

    def test_coder_and_payload_are_named_wherever_rows_differ_in_them(self) -> None:
        rows = [summary_row("lookahead", 0.0), summary_row("dp", 0.0, coder="closed_loop")]
        assert list(rows_by_policy(rows)) == ["lookahead (forward)", "dp (closed_loop)"]
        rows.append(summary_row("clairvoyant", 0.0, coder="closed_loop", payload="posterior_mean"))
        assert list(rows_by_policy(rows)) == [
            "lookahead (forward, latent)",
            "dp (closed_loop, latent)",
            "clairvoyant (closed_loop, posterior_mean)",
        ]

    def test_one_agent_under_two_coders_or_payloads_is_two_policies(self) -> None:
        rows = [
            summary_row("lookahead", snr_db, coder=coder)
            for snr_db in (0.0, 3.0)
            for coder in ("forward", "closed_loop")
        ]
        policies = rows_by_policy(rows)
        assert list(policies) == ["lookahead (forward)", "lookahead (closed_loop)"]
        assert [row["coder"] for row in policies["lookahead (closed_loop)"]] == ["closed_loop"] * 2
        both = [
            summary_row("a", 0.0, coder=coder, payload=payload)
            for coder, payload in (("forward", "latent"), ("closed_loop", "posterior_mean"))
        ]
        assert list(rows_by_policy(both)) == ["a (forward, latent)", "a (closed_loop, posterior_mean)"]

    def test_they_share_a_color_and_differ_otherwise(self) -> None:
        rows = [summary_row("lookahead", 0.0, coder=coder) for coder in ("forward", "closed_loop")]
        styles = styles_by_policy(rows_by_policy(rows))
        first, second = styles["lookahead (forward)"], styles["lookahead (closed_loop)"]
        assert first["label"] == "Look-ahead (forward)"
        assert second["label"] == "Look-ahead (closed_loop)"
        assert first["color"] == second["color"]
        assert (second["linestyle"], second["markerfacecolor"]) == ("--", "white")

    def test_both_are_drawn_and_tabled(self, drawn: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
        rows = [
            summary_row("lookahead", snr_db, coder=coder, latent_mse=mse, ci_low=mse, ci_high=mse)
            for snr_db, coder, mse in ((0.0, "forward", 0.2), (0.0, "closed_loop", 0.1), (3.0, "forward", 0.02))
        ]
        draw_fig3a(rows, Path())
        assert lines(drawn[0].axes[0]) == {
            "Look-ahead (forward)": ([0.0, 3.0], [0.2, 0.02]),
            "Look-ahead (closed_loop)": ([0.0], [0.1]),
        }
        print_table(rows)
        text = capsys.readouterr().out
        assert all(value in text for value in ("(forward)", "(closed", "loop)", "2.00e-1", "1.00e-1", "2.00e-2", "–"))


class TestFig3b:
    def test_a_panel_for_each_metric(self, drawn: list[Any]) -> None:
        rows = [
            scored("lookahead", snr_db, psnr_db, lpips=0.3, lpips_low=0.2, lpips_high=0.4)
            for snr_db, psnr_db in ((3.0, 40.0), (0.0, 20.0))
        ]
        draw_fig3b(rows, Path())
        panels = drawn[0].axes
        assert [axes.get_ylabel().split()[0] for axes in panels] == ["LPIPS", "PSNR", "SSIM"]
        assert lines(panels[1])["Look-ahead"] == ([0.0, 3.0], [20.0, 40.0])  # in the order of the SNR
        assert lines(panels[0])["Look-ahead"] == ([0.0, 3.0], [0.3, 0.3])
        assert panels[1].get_ylim()[1] > MAX_PSNR_DB

    def test_without_lpips(self, drawn: list[Any]) -> None:
        draw_fig3b([scored("lookahead", 0.0, 20.0), summary_row("final-only", 0.0)], Path())
        assert [axes.get_ylabel().split()[0] for axes in drawn[0].axes] == ["PSNR", "SSIM"]

    def test_without_any(self, drawn: list[Any]) -> None:
        with pytest.raises(ConfigurationError, match="`summary` must have image metrics for Fig. 3b, got none"):
            draw_fig3b([summary_row("lookahead", 0.0)], Path())


def tiles() -> tuple[Table, np.ndarray[Any, Any], str]:
    rows = [
        {"agent": agent, "snr_db": snr, "coder": "forward", "payload": "latent", "episode": 0, "image": image}
        for agent, snr, image in (
            ("final-only", 6.0, np.full((8, 8, 3), 60, np.uint8)),
            ("final-only", 0.0, np.full((8, 8, 3), 50, np.uint8)),
            ("lookahead", 0.0, np.full((8, 8, 3), 10, np.uint8)),
        )
    ]
    return rows, np.full((8, 8, 3), 200, np.uint8), "a cat"


def test_strip_has_a_row_for_each_policy_and_a_column_for_each_snr(drawn: list[Any]) -> None:
    draw_strip(*tiles(), Path())
    figure = drawn[0]
    shown = [int(axes.images[0].get_array()[0, 0, 0]) if axes.images else None for axes in figure.axes]
    assert shown == [50, 60, None, 200, 10, None, None, 200]
    assert [axes.get_title() for axes in figure.axes[:4]] == ["0 dB", "6 dB", "", "$x_0$"]
    assert [figure.axes[k].get_ylabel() for k in (0, 4)] == ["Final-Only", "Look-ahead"]
    assert figure.get_suptitle() == "“a cat”"


@pytest.fixture(scope="module")
def diffusion(gaussian_cache: Path) -> Table:
    def decoder(latents: Any) -> Any:
        return np.clip(0.5 + 0.1 * np.asarray(latents, dtype=np.float32)[:, :3].transpose(0, 2, 3, 1), 0, 1)

    return tabulate_diffusion(TrajectoryCache.open(gaussian_cache), range(4), decoder)


@pytest.fixture(scope="module")
def quantization(gaussian_cache: Path) -> Table:
    return tabulate_quantization(TrajectoryCache.open(gaussian_cache), range(2), (2, 4, 8))


class TestFig2:
    def test_2a_shows_model_simulation_image_and_offset(self, drawn: list[Any], diffusion: Table) -> None:
        draw_fig2a(diffusion, Path())
        axes, below, twin = drawn[0].axes
        steps = list(range(1, 51))
        assert lines(axes)["model, Eq. (9)"] == (steps, [row["model"] for row in diffusion[1:]])
        assert lines(axes)["simulated"] == (steps, [row["simulated"] for row in diffusion[1:]])
        assert lines(twin)["1/PSNR of the decoded image"] == (steps, [row["image_mse"] for row in diffusion[1:]])
        offsets = [list(map(float, line.get_ydata())) for line in below.lines]
        assert [row["offset_db"] for row in diffusion[1:]] in offsets
        left, right = axes.get_ylim(), twin.get_ylim()
        assert right[0] / left[0] == pytest.approx(right[1] / left[1])
        ratios = [row["image_mse"] / row["simulated"] for row in diffusion[1:]]
        assert right[0] / left[0] == pytest.approx(np.exp(np.mean(np.log(ratios))))

    def test_2a_without_images_has_no_right_axis(self, drawn: list[Any], diffusion: Table) -> None:
        draw_fig2a(
            [{**row, **dict.fromkeys(("image_mse", "image_mse_low", "image_mse_high"))} for row in diffusion], Path()
        )
        assert len(drawn[0].axes) == 2

    def test_2b_shows_every_transmission_by_bit_depth(self, drawn: list[Any], quantization: Table) -> None:
        draw_fig2b(quantization, Path())
        (axes,) = drawn[0].axes
        shown = lines(axes)
        assert list(shown) == [
            "$x_{0}$, first transmission",
            "$x_{30}$ to a device with $x_{40}$",
            "$x_{0}$ to a device with $x_{10}$",
            "$x_{0}$ to a device with $x_{1}$",
        ]
        assert shown["$x_{30}$ to a device with $x_{40}$"] == (
            [2, 4, 8],
            [row["simulated"] for row in quantization if row["device_step"] == 40],
        )
        dashed = [
            list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata())
        ]
        assert dashed == [
            [row["model"] for row in quantization if row["device_step"] == step] for step in (50, 40, 10, 1)
        ]
        assert axes.get_legend().get_texts()[-1].get_text() == "model, Eq. (10)"


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path: Path, diffusion: Table, quantization: Table) -> Path:
        write_table(tmp_path / "fig2a.csv", diffusion, DIFFUSION_COLUMNS)
        write_table(tmp_path / "fig2b.csv", quantization, QUANTIZATION_COLUMNS)
        return tmp_path

    def test_whatever_a_folder_has_is_drawn(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def figures(out: str) -> set[str]:
            main(folder, folder / out)
            return {path.name for path in (folder / out).iterdir()}

        second = {f"fig2{letter}.{suffix}" for letter in "ab" for suffix in ("png", "pdf")}
        assert figures("a") == second
        write_table(folder / "summary.csv", [summary_row("lookahead", 0.0)], SUMMARY_COLUMNS)
        assert figures("b") == second | {"fig3a.png", "fig3a.pdf"}
        write_table(folder / "summary.csv", [scored("lookahead", 0.0, 30.0)], SUMMARY_COLUMNS)
        capsys.readouterr()
        assert figures("c") == second | {f"fig3{letter}.{suffix}" for letter in "ab" for suffix in ("png", "pdf")}
        assert "fig3b has no panel for LPIPS" in capsys.readouterr().out

    def test_the_same_tables_give_the_same_bytes(self, tmp_path: Path, diffusion: Table, quantization: Table) -> None:
        summary = [scored("lookahead", 0.0, 30.0), scored("final-only", 0.0, 20.0)]
        for out in (tmp_path / "a", tmp_path / "b"):
            draw_fig2a(diffusion, out)
            draw_fig2b(quantization, out)
            draw_fig3b(summary, out)
            draw_strip(*tiles(), out)
        names = sorted(path.name for path in (tmp_path / "a").iterdir())
        assert len(names) == 8
        for name in names:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_no_table_at_all(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(typer.Exit, match="2") as caught:
            main(tmp_path)
        assert caught.value.exit_code == 2
        assert capsys.readouterr().err.startswith("error: `summary.csv` must be a table of an evaluation, got no file")

    def test_a_bad_table_of_distortions_names_its_command(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder / "fig2b.csv").write_text("bits\n3\n")
        with pytest.raises(typer.Exit, match="2") as caught:
            main(folder)
        assert caught.value.exit_code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: `fig2b.csv` must have the columns")
        assert "python -m agents.distortion" in message

    def test_an_episode_that_was_not_kept(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_table(folder / "summary.csv", [summary_row("lookahead", 0.0)], SUMMARY_COLUMNS)
        (folder / "images.npz").write_bytes(b"")
        with pytest.raises(typer.Exit, match="2") as caught:
            main(folder)
        assert caught.value.exit_code == 2
        assert "`images.npz` must hold the images of an evaluation" in capsys.readouterr().err
