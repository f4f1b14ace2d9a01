"""The page of an evaluation: its structure always, and its behavior in a browser where there is one."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from agents import evaluate as evaluate_module
from agents.evaluate import DEFAULT_AGENTS, DEFAULT_SNRS_DB, describe_run, evaluate
from agents.figures.series import format_mean
from agents.report import REPORT_FILE, read_run, replay_row, write_report
from agents.report import player as player_module
from agents.report.player import choose_episodes
from refine_env import ConfigurationError, MissingExtraError, TrajectoryCache
from refine_env.evaluation import (
    EPISODE_COLUMNS,
    SUMMARY_COLUMNS,
    Table,
    read_table,
    summarize,
    write_table,
)
from tests.browser import wait_until
from tests.processes import run_module

pytest.importorskip("plotly", reason="needs plotly")

ROOT = Path(__file__).parents[3]
AGENTS = ("lookahead", "persistent-q3", "final-only", "random")
SNRS_DB = (0.0, 6.0, 30.0)
VOID = {"meta", "img", "br", "hr", "input", "link"}


def write_tables(folder: Path, rows: Table, run: dict[str, Any] | None) -> Path:
    write_table(folder / "episodes.csv", rows, EPISODE_COLUMNS)
    write_table(folder / "summary.csv", summarize(rows), SUMMARY_COLUMNS)
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture(scope="module")
def evaluated(gaussian_cache: Path) -> tuple[Table, dict[str, Any]]:
    kwargs = {"cache": str(gaussian_cache), "split": "test", "bit_depths": [3, 4, 8, 10, 16], "deadline": 60}
    rows = evaluate(AGENTS, SNRS_DB, episodes=9, seed=1, env_kwargs=kwargs)
    return rows, json.loads(json.dumps(describe_run(AGENTS, SNRS_DB, 9, 1, kwargs)))


@pytest.fixture(scope="module")
def folder(evaluated: tuple[Table, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tables(tmp_path_factory.mktemp("report"), *evaluated)
    write_report(folder, player_episodes=2, decoder=fake_decoder)
    return folder


def fake_decoder(latents: Any) -> Any:
    """Four pixels a latent value, of its sign and size."""
    values = np.tanh(np.asarray(latents, dtype=np.float32)[:, :3]) / 2 + 0.5
    return values.transpose(0, 2, 3, 1).repeat(2, axis=1).repeat(2, axis=2)


class Page(HTMLParser):
    """What a page holds; refuses elements that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        else:
            self.texts.append(data)

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    def data(self, name: str) -> Any:
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return json.loads(text)

    @property
    def code(self) -> list[str]:
        """The scripts that run: plotly.js, and the page's own."""
        return [text for attributes, text in self.scripts if "type" not in attributes]


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / REPORT_FILE).read_text(encoding="utf-8"))


def table_cells(text: str, name: str) -> list[list[str]]:
    body = re.search(rf'<table id="{name}">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    assert body is not None
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body[1].split("</tr>")[:-1]]


class TestStructure:
    def test_it_is_an_accessible_document(self, page: Page) -> None:
        assert page.all("html") == [{"lang": "en"}]
        assert len(page.all("title")) == len(page.all("h1")) == len(page.all("main")) == 1
        assert any("4 policies at 3 SNRs" in text for text in page.texts)
        assert all("alt" in image for image in page.all("img"))
        assert len(page.all("img")) == 2
        figures = [attributes for attributes in page.all("div") if attributes.get("role") == "img"]
        assert [figure["id"] for figure in figures] == ["fig3a", "distribution", "player"]
        assert all(figure["aria-label"] for figure in figures)
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(set(ids)) == len(ids)
        tags = [tag for tag, _ in page.elements]
        assert all(tags[i - 1] == "label" for i, tag in enumerate(tags) if tag == "select")

    def test_nothing_is_loaded(self, page: Page, folder: Path) -> None:
        for _, attributes in page.elements:
            assert not {"href", "srcset", "action", "style"} & set(attributes)
            assert (attributes.get("src") or "data:,") == "data:,"
            assert not any(name.startswith("on") for name in attributes)
        text = (folder / REPORT_FILE).read_text(encoding="utf-8")
        plotly_js = page.code[0]
        assert text.count(plotly_js) == 1
        rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text.replace(plotly_js, ""))
        assert not re.search(r"https?:|//[a-z]|@import|url\(", rest)
        assert len(plotly_js) > 1_000_000

    def test_the_browser_is_told_to_load_nothing_and_to_run_two_scripts(self, page: Page) -> None:
        (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
        assert policy is not None
        assert len(page.code) == 2
        hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in page.code]
        assert policy == (
            f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; "
            "style-src 'unsafe-inline'; img-src data: blob:"
        )

    def test_no_button_sends_the_figure_elsewhere(self, page: Page) -> None:
        config = page.data("config")
        assert config["displaylogo"] is False
        assert config["plotlyServerURL"] == ""
        assert config["modeBarButtons"] == [["toImage", "zoom2d", "pan2d", "resetScale2d"]]

    def test_fig3a_is_the_summary(self, page: Page, folder: Path) -> None:
        summary = read_table(folder / "summary.csv", SUMMARY_COLUMNS)
        figure = page.data("fig3a-data")
        assert figure["layout"]["yaxis"]["type"] == "log"
        assert [trace["name"] for trace in figure["data"]] == [
            "Look-ahead",
            "Persistent-Q (3 bit)",
            "Final-Only",
            "Random",
        ]
        zeros = 0
        for agent, trace in zip(AGENTS, figure["data"], strict=True):
            rows = [row for row in summary if row["agent"] == agent]
            assert trace["x"] == list(SNRS_DB)
            for row, y, numbers, up, down, symbol in zip(
                rows,
                trace["y"],
                trace["customdata"],
                trace["error_y"]["array"],
                trace["error_y"]["arrayminus"],
                trace["marker"]["symbol"],
                strict=True,
            ):
                assert numbers == [row["latent_mse"], row["ci_low"], row["ci_high"], 9]
                if row["latent_mse"] == 0.0:
                    zeros += 1
                    assert 0.0 < y < min(row["latent_mse"] for row in summary if row["latent_mse"])
                    assert symbol.endswith("-open")
                else:
                    assert y == row["latent_mse"]
                    assert y + up == pytest.approx(row["ci_high"])
                    assert y - down == pytest.approx(max(row["ci_low"], y - down))
        assert zeros >= 1

    def test_the_table_is_the_summary_with_the_lowest_marked(self, folder: Path) -> None:
        summary = {(row["snr_db"], row["agent"]): row for row in read_table(folder / "summary.csv", SUMMARY_COLUMNS)}
        text = (folder / REPORT_FILE).read_text(encoding="utf-8")
        cells = table_cells(text, "summary")
        assert [row[0] for row in cells] == ["0", "6", "30"]
        for snr_db, row in zip(SNRS_DB, cells, strict=True):
            for agent, cell in zip(AGENTS, row[1:], strict=True):
                entry = summary[snr_db, agent]
                mean, interval = format_mean(entry["latent_mse"], entry["ci_low"], entry["ci_high"])
                assert cell == f"{mean}<small>{interval}</small>"
        lowest = min(summary[6.0, agent]["latent_mse"] for agent in AGENTS)
        marked = re.findall(r'<td class="lowest">([^<]*)', text.split('<th scope="row">6</th>')[1].split("</tr>")[0])
        assert marked == [format_mean(lowest, lowest, lowest)[0]]
        assert len(table_cells(text, "columns")) == 12

    def test_distributions_are_those_of_the_episodes(self, page: Page, folder: Path) -> None:
        episodes = read_table(folder / "episodes.csv", EPISODE_COLUMNS)
        figure = page.data("distribution-data")
        groups = [(snr_db, agent) for snr_db in SNRS_DB for agent in AGENTS]
        lines, boxes = figure["data"][::2], figure["data"][1::2]
        for (snr_db, agent), line, box in zip(groups, lines, boxes, strict=True):
            rows = [row for row in episodes if (row["snr_db"], row["agent"]) == (snr_db, agent)]
            assert line["customdata"] == sorted(row["latent_mse"] for row in rows)
            assert line["y"] == pytest.approx([k / 9 for k in range(1, 10)])
            counts = [row["num_deliveries"] for row in rows]
            assert (box["lowerfence"], box["upperfence"]) == ([min(counts)], [max(counts)])
            assert box["median"] == [float(np.median(counts))]
            assert line["visible"] == box["visible"] == (snr_db == 6.0)
        menu = figure["layout"]["updatemenus"][0]
        assert menu["active"] == 1
        for snr_db, button in zip(SNRS_DB, menu["buttons"], strict=True):
            assert button["label"] == f"{snr_db:g} dB"
            assert button["args"][0]["visible"] == [snr_db == own for own, _ in groups for _ in range(2)]

    def test_the_player_shows_rows_of_the_table(self, page: Page, folder: Path) -> None:
        episodes = read_table(folder / "episodes.csv", EPISODE_COLUMNS)
        run = read_run(folder)
        assert run is not None
        player = page.data("player-data")
        assert len(player["frames"]) == 60
        assert sorted(player["episodes"]) == sorted(
            f"{i}-{j}-{k}" for i in range(3) for j in range(3) for k in range(2)
        )
        for j, snr_db in enumerate(SNRS_DB):
            chosen = choose_episodes([row for row in episodes if row["snr_db"] == snr_db], 2)
            for i, agent in enumerate(AGENTS[:3]):
                for k, episode in enumerate(chosen):
                    entry = player["episodes"][f"{i}-{j}-{k}"]
                    (row,) = [
                        row
                        for row in episodes
                        if (row["agent"], row["snr_db"], row["episode"]) == (agent, snr_db, episode)
                    ]
                    trace = replay_row(row, run["env_kwargs"])
                    assert f"at {snr_db:g} dB: episode {episode}, seed {row['seed']}" in entry["title"]
                    bars, error = entry["data"][:3], entry["data"][-1]
                    rates = dict(pair for bar in bars for pair in zip(bar["x"], bar["y"], strict=True))
                    assert [rates[n] for n in range(1, 61)] == pytest.approx([slot["rate"] for slot in trace], rel=1e-5)
                    assert error["customdata"] == [slot["latent_mse"] for slot in trace]
                    assert entry["data"][3]["y"] == [slot["server_step"] for slot in trace]
                    assert entry["data"][4]["y"] == [slot["device_step"] for slot in trace]
                    ends = [slot["slot"] for slot in trace if slot["delivered"]]
                    assert [x + 0.0 for x in entry["data"][5]["x"] if x is not None][1::2] == [n + 0.5 for n in ends]
                    assert entry["slots"][-1].endswith(f"latent MSE {row['latent_mse']:.3g}.")
                    assert len(entry["slots"]) == len(entry["pictures"]) == 60

    def test_a_policy_that_draws_is_named_and_left_out(self, page: Page, folder: Path) -> None:
        assert page.data("player-data")["choices"]["agent"] == {
            "0": "Look-ahead",
            "1": "Persistent-Q (3 bit)",
            "2": "Final-Only",
        }
        assert any(text.startswith("Random is not here, or not at every SNR.") for text in page.texts)

    def test_the_command_is_printed(self, page: Page, gaussian_cache: Path) -> None:
        (command,) = [text for text in page.texts if text.startswith("python -m agents.evaluate")]
        assert command == (
            "python -m agents.evaluate --agents lookahead,persistent-q3,final-only,random --snr-db 0,6,30 --episodes 9 "
            f"--seed 1 --cache {gaussian_cache} --split test --bit-depths 3,4,8,10,16 --deadline 60"
        )
        assert TrajectoryCache.open(gaussian_cache).sha256 in page.texts

    def test_pictures_are_what_the_device_holds(self, page: Page, folder: Path, gaussian_cache: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        player = page.data("player-data")
        episodes = read_table(folder / "episodes.csv", EPISODE_COLUMNS)
        run = read_run(folder)
        assert run is not None
        episode = choose_episodes([row for row in episodes if row["snr_db"] == 6.0], 2)[1]
        (row,) = [
            row for row in episodes if (row["agent"], row["snr_db"], row["episode"]) == ("lookahead", 6.0, episode)
        ]
        trace = replay_row(row, run["env_kwargs"], latents=True)
        entry = player["episodes"]["0-1-1"]
        source = TrajectoryCache.open(gaussian_cache).latents(row["trajectory"])

        def decoded(number: int) -> Any:
            kind, _, content = player["pictures"][number].partition(",")
            assert kind == "data:image/png;base64"
            return np.asarray(image.open(io.BytesIO(base64.b64decode(content))))

        def expected(latent: Any) -> Any:
            return np.rint(fake_decoder(latent.reshape(1, *source.shape[1:]))[0] * 255)

        number, caption = entry["pictures"][0]
        assert caption == "the noise that both ends share"
        np.testing.assert_array_equal(decoded(number), expected(source[-1]))
        np.testing.assert_array_equal(decoded(entry["clean"]), expected(source[0]))
        last = next(slot for slot in reversed(trace) if slot["delivered"])
        number, caption = entry["pictures"][-1]
        assert caption == f"x_{last['device_step']} at {last['device_bits']} bit, delivered in slot {last['slot']}"
        np.testing.assert_array_equal(decoded(number), expected(last["latent"]))


def test_pictures_are_few_and_the_last_one_is_kept(
    evaluated: tuple[Table, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(player_module, "_MOST_IMAGES", 20)
    monkeypatch.setattr(player_module, "_MOST_PIXELS", 8)
    page = Page(write_report(write_tables(tmp_path, *evaluated), decoder=fake_decoder).read_text())
    player = page.data("player-data")
    entry = player["episodes"]["1-1-0"]
    captions = list(dict.fromkeys(caption for _, caption in entry["pictures"]))
    ends = entry["data"][-2]["x"]
    assert len(ends) > 3
    assert len(captions) - 1 == player["pictures_each"] < len(ends)
    assert captions[-1].endswith(f"delivered in slot {ends[-1]}")
    assert sum(len({number for number, _ in each["pictures"]}) - 1 for each in player["episodes"].values()) <= 20
    image = pytest.importorskip("PIL.Image")
    content = base64.b64decode(player["pictures"][0].partition(",")[2])
    assert image.open(io.BytesIO(content)).size == (8, 8)


def test_the_default_comparison_stays_small(gaussian_cache: Path, tmp_path: Path) -> None:
    """Seven policies at eleven SNRs, pictures of pure noise, which PNG cannot compress: below 15 MB."""
    kwargs = {"cache": str(gaussian_cache), "split": "test"}
    rows = evaluate(DEFAULT_AGENTS, DEFAULT_SNRS_DB, episodes=3, seed=0, env_kwargs=kwargs)
    run = describe_run(DEFAULT_AGENTS, DEFAULT_SNRS_DB, 3, 0, kwargs)
    rng = np.random.default_rng(0)
    path = write_report(
        write_tables(tmp_path, rows, run), decoder=lambda latents: rng.random((len(latents), 64, 64, 3), np.float32)
    )
    player = Page(path.read_text()).data("player-data")
    assert len(player["episodes"]) == 77
    assert len(player["pictures"]) <= 400 + 2 * 11  # the noise and x_0 of every trajectory
    assert path.stat().st_size < 15_000_000


def test_median_episodes_are_chosen_for_all_policies_together() -> None:
    scores = {"a": [3.0, 1.0, 2.0, 9.0, 0.0], "b": [30.0, 10.0, 20.0, 0.0, 90.0]}
    rows = [
        {"agent": agent, "coder": "forward", "payload": "latent", "episode": k, "latent_mse": mse}
        for agent, values in scores.items()
        for k, mse in enumerate(values[:3])
    ]
    assert choose_episodes(rows, 1) == [2]
    assert choose_episodes(rows, 3) == [1, 2, 0]
    assert choose_episodes(rows, 2) == [1, 0]
    assert sorted(choose_episodes(rows, 50)) == [0, 1, 2]
    assert choose_episodes([row for row in rows if (row["agent"], row["episode"]) != ("b", 2)], 1) == [0]
    ties = [{**row, "latent_mse": 1.0} for row in rows]
    assert choose_episodes(ties, 3) == [0, 1, 2]


EVIL = '</script><script>document.title="evil"</script><img src=x onerror=alert(1)>&amp;"\''


def test_what_tables_and_prompts_say_stays_text(
    evaluated: tuple[Table, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, run = evaluated
    rows = [*rows, *({**row, "agent": EVIL, "coder": EVIL} for row in rows if row["agent"] == "lookahead")]
    run = {**run, "agents": [EVIL], "seed": EVIL, "versions": {EVIL: EVIL}, "episodes": EVIL}
    monkeypatch.setattr(TrajectoryCache, "prompt", lambda self, index: EVIL)
    path = write_report(write_tables(tmp_path, rows, run))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.code) == 2
    assert len(page.all("img")) == 0
    assert "<img" not in text.replace(page.code[0], "")
    assert EVIL in page.texts[page.texts.index("seed") + 1]
    assert EVIL in page.data("player-data")["episodes"]["0-0-0"]["title"]
    # Plotly takes HTML in names for markup: there it is escaped twice over.
    assert "&lt;img" in page.data("fig3a-data")["data"][-1]["name"]
    assert not any("<img" in json.dumps(page.data(name)["data"]) for name in ("fig3a-data", "distribution-data"))
    assert any("`name` must be one of" in text for text in page.texts)


def test_image_metrics_are_drawn_where_the_tables_have_them(
    evaluated: tuple[Table, dict[str, Any]], page: Page, tmp_path: Path
) -> None:
    rows, run = evaluated
    scored = [{**row, "psnr_db": 20.0 + row["snr_db"] + row["episode"] / 9, "ssim": 0.5} for row in rows]
    scored_page = Page(write_report(write_tables(tmp_path, scored, run), player_episodes=0).read_text())
    figure = scored_page.data("fig3b-data")
    assert len(figure["data"]) == 2 * len(AGENTS)
    assert figure["data"][0]["y"] == pytest.approx([20.0 + snr_db + 4 / 9 for snr_db in SNRS_DB])
    assert figure["layout"]["yaxis"]["title"]["text"] == "PSNR at the deadline [dB]"
    assert not any(attributes.get("id") in ("fig3b", "player") for attributes in page.all("div")[:2])
    assert "It was left out." in scored_page.texts
    with pytest.raises(ValueError, match="not enough values"):
        page.data("fig3b-data")


def test_without_the_run_s_description_there_is_no_player(
    evaluated: tuple[Table, dict[str, Any]], tmp_path: Path
) -> None:
    rows, run = evaluated
    page = Page(write_report(write_tables(tmp_path, rows, None)).read_text())
    assert any("There is no run.json" in text for text in page.texts)
    for change, sentence in (
        ({"cache": {**run["cache"], "sha256": "0" * 64}}, "its hash differs"),
        ({"env_kwargs": {"cache": "nowhere"}}, "cannot be played again"),
        ({"env_kwargs": {**run["env_kwargs"], "deadline": -1}}, "`deadline` must be"),
        ({"env_kwargs": {**run["env_kwargs"], "color": "red"}}, "Environment arguments must be among"),
    ):
        page = Page(write_report(write_tables(tmp_path, rows, {**run, **change})).read_text())
        assert any(sentence in text for text in page.texts), sentence
        assert not any(attributes.get("id") == "player" for attributes in page.all("div"))


def test_a_failed_write_keeps_the_old_page(
    evaluated: tuple[Table, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tables(tmp_path, *evaluated)
    (tmp_path / REPORT_FILE).write_text("old")

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, player_episodes=0)
    assert (tmp_path / REPORT_FILE).read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before


def test_the_same_tables_give_the_same_page(folder: Path, tmp_path: Path) -> None:
    path = write_report(folder, tmp_path / "again.html", player_episodes=2, decoder=fake_decoder)
    assert path.read_bytes() == (folder / REPORT_FILE).read_bytes()


@pytest.mark.parametrize("library", ["plotly", "jinja2"])
def test_a_missing_library_ends_in_one_sentence(
    library: str,
    folder: Path,
    tmp_path: Path,
    gaussian_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"`{library}` must be installed.*pip install 'refine-env\[report\]'"):
        write_report(folder, tmp_path / "page.html")
    with pytest.raises(typer.Exit, match="4"):
        evaluate_module.main(
            agent_names="final-only", snr_db="0", episodes=2, out=tmp_path / "out", cache=str(gaussian_cache), html=True
        )
    assert "refine-env[report]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_lines(gaussian_cache: Path, tmp_path: Path) -> None:
    common = ("--agents", "lookahead,final-only", "--snr-db", "6", "--episodes", "3", "--no-figures", "--html")
    result = run_module("agents.evaluate", *common, "--cache", str(gaussian_cache), "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / REPORT_FILE) in result.stdout
    first = (tmp_path / REPORT_FILE).read_bytes()
    result = run_module("agents.report", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert re.search(r"report\.html \(\d+\.\d MB\)", result.stdout)
    assert (tmp_path / REPORT_FILE).read_bytes() == first
    assert len(Page(first.decode()).data("player-data")["episodes"]) == 2


@pytest.mark.parametrize(
    ("spoil", "arguments", "code", "message"),
    [
        (lambda folder: (folder / "summary.csv").unlink(), (), 2, "`summary.csv` must be a table of an evaluation"),
        (lambda folder: (folder / "run.json").write_text("{"), (), 2, "`run.json` must be a JSON object"),
        (lambda folder: (folder / "run.json").write_text("[]"), (), 2, "`run.json` must have 'agents' as a JSON array"),
        (lambda folder: None, ("--player-episodes", "-1"), 2, "`player_episodes` must be an integer >= 0"),
        (lambda folder: None, ("--out", "{folder}"), 3, "`{folder}` must be readable or writable here, and is not"),
        (lambda folder: None, ("--images",), 2, "`cache` must hold latents of a model to be decoded"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    evaluated: tuple[Table, dict[str, Any]],
    tmp_path: Path,
    spoil: Callable[[Path], Any],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    spoil(write_tables(tmp_path, *evaluated))
    result = run_module("agents.report", str(tmp_path), *(word.format(folder=tmp_path) for word in arguments))
    assert result.returncode == code
    assert result.stderr.startswith(f"error: {message.format(folder=tmp_path)}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / REPORT_FILE).exists()


def test_an_unknown_run_is_refused(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None
    (tmp_path / "run.json").write_text('{"agents": [], "snr_db": 3}')
    with pytest.raises(ConfigurationError, match="`run.json` must have 'snr_db' as a JSON array"):
        read_run(tmp_path)


# --- In a browser --------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser: Any, folder: Path) -> Iterator[Any]:
    """The page, drawn; at the end of a test nothing may have gone wrong or been asked for."""
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get((folder / REPORT_FILE).as_uri())
    wait_until(lambda: text_of(browser, "player-now").startswith("Slot 60 of 60."))
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked[0].startswith("file:")
    assert [url for url in asked[1:] if not url.startswith(("data:", "blob:", "chrome:"))] == []


def text_of(browser: Any, name: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0]).textContent", name))


def choose(browser: Any, name: str, label: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("id", name)).select_by_visible_text(label)


def shown(browser: Any) -> dict[str, Any]:
    """What the player's plot has on the screen."""
    script = """
        const plot = document.getElementById("player");
        const [now, later] = plot.layout.shapes;
        return {
          slider: plot.layout.sliders[0].active + 1,
          now: (now.x0 + now.x1) / 2,
          later: later.x0,
          label: plot.querySelector(".slider-label").textContent,
          bars: plot.querySelectorAll(".barlayer .point").length,
          device: plot.data[4].y,
        };"""
    return dict(browser.execute_script(script))


class TestInTheBrowser:
    def test_the_figures_are_drawn(self, opened: Any) -> None:
        count = "return document.querySelectorAll(arguments[0]).length"
        assert opened.execute_script(count, "#fig3a .scatterlayer .trace") == len(AGENTS)
        assert opened.execute_script(count, "#distribution .scatterlayer .trace") == len(AGENTS)
        assert opened.execute_script(count, "#distribution .boxlayer .trace") == len(AGENTS)
        assert opened.execute_script(count, "#player .barlayer .point") == 60
        assert opened.execute_script(count, ".modebar-btn") == 4 * 3
        assert opened.execute_script(count, "a[href^=http]") == 0
        assert opened.title == "Evaluation: 4 policies at 3 SNRs"

    def test_a_name_in_the_legend_hides_its_line(self, opened: Any) -> None:
        opened.find_elements("css selector", "#fig3a .legendtoggle")[0].click()
        wait_until(lambda: len(opened.find_elements("css selector", "#fig3a .scatterlayer .trace")) == len(AGENTS) - 1)

    def test_the_slider_moves_through_the_slots(self, opened: Any, page: Page) -> None:
        entry = page.data("player-data")["episodes"]["0-1-0"]
        assert text_of(opened, "player-now") == entry["slots"][59]
        first = shown(opened)
        assert (first["slider"], first["now"], first["bars"]) == (60, 60, 60)
        assert first["device"] == entry["data"][4]["y"]
        handle = opened.find_element("css selector", "#player .slider-grip-rect")
        from selenium.webdriver import ActionChains

        ActionChains(opened).drag_and_drop_by_offset(handle, -500, 0).perform()
        wait_until(lambda: shown(opened)["slider"] < 60)
        slot = shown(opened)["slider"]
        assert 15 < slot < 45
        wait_until(lambda: text_of(opened, "player-now") == entry["slots"][slot - 1])
        state = shown(opened)
        assert (state["now"], state["later"], state["label"]) == (slot, slot + 0.5, f"slot {slot}")
        assert entry["slots"][slot - 1] != entry["slots"][59]
        opened.find_element("id", "forward").click()
        wait_until(lambda: text_of(opened, "player-now") == entry["slots"][slot])
        opened.find_element("id", "back").click()
        opened.find_element("id", "back").click()
        wait_until(lambda: text_of(opened, "player-now") == entry["slots"][slot - 2])
        assert shown(opened)["slider"] == slot - 1

    def test_it_plays_and_pauses(self, opened: Any) -> None:
        play, pause = opened.find_elements("css selector", "#player .updatemenu-button")
        play.click()
        wait_until(lambda: 3 <= shown(opened)["slider"] < 60)
        pause.click()
        time.sleep(0.5)
        slot = shown(opened)["slider"]
        assert text_of(opened, "player-now").startswith(f"Slot {slot} of 60.")
        time.sleep(0.6)
        assert shown(opened)["slider"] == slot
        play.click()
        wait_until(lambda: shown(opened)["slider"] > slot)

    def test_another_policy_and_snr_in_the_same_slot(self, opened: Any, page: Page) -> None:
        episodes = page.data("player-data")["episodes"]
        opened.find_element("id", "back").click()
        wait_until(lambda: shown(opened)["slider"] == 59)
        choose(opened, "choose-agent", "Persistent-Q (3 bit)")
        wait_until(lambda: shown(opened)["device"] == episodes["1-1-0"]["data"][4]["y"])
        assert text_of(opened, "player-title") == episodes["1-1-0"]["title"]
        assert text_of(opened, "player-now") == episodes["1-1-0"]["slots"][58]
        assert shown(opened)["slider"] == 59
        choose(opened, "choose-snr", "30 dB")
        choose(opened, "choose-episode", "2 of 2")
        wait_until(lambda: shown(opened)["device"] == episodes["1-2-1"]["data"][4]["y"])
        assert text_of(opened, "player-title") == episodes["1-2-1"]["title"]
        opened.find_element("id", "back").click()  # the frames are there still
        wait_until(lambda: text_of(opened, "player-now") == episodes["1-2-1"]["slots"][57])

    def test_the_picture_is_that_of_the_slot(self, opened: Any, page: Page) -> None:
        player = page.data("player-data")
        entry = player["episodes"]["0-1-0"]
        source = "return document.getElementById(arguments[0]).getAttribute('src')"
        assert opened.execute_script(source, "picture-now") == player["pictures"][entry["pictures"][59][0]]
        assert opened.execute_script(source, "picture-clean") == player["pictures"][entry["clean"]]
        change = max(n for n in range(1, 60) if entry["pictures"][n - 1] != entry["pictures"][n])
        for _ in range(60 - change):
            opened.find_element("id", "back").click()
        wait_until(lambda: text_of(opened, "player-now").startswith(f"Slot {change} of"))
        assert opened.execute_script(source, "picture-now") == player["pictures"][entry["pictures"][change - 1][0]]
        assert text_of(opened, "caption-now") == entry["pictures"][change - 1][1]
        width = "return document.getElementById('picture-now').naturalWidth"
        assert wait_until(lambda: opened.execute_script(width)) == 16

    def test_the_menu_shows_another_snr_s_distribution(self, opened: Any) -> None:
        script = """return document.getElementById("distribution").data.map((trace) => trace.visible)"""
        before = opened.execute_script(script)
        opened.find_element("css selector", "#distribution .updatemenu-header").click()
        wait_until(lambda: len(opened.find_elements("css selector", "#distribution .updatemenu-dropdown-button")) == 3)
        opened.find_elements("css selector", "#distribution .updatemenu-dropdown-button")[2].click()
        wait_until(lambda: opened.execute_script(script) != before)
        assert opened.execute_script(script) == [False] * 16 + [True] * 8

    def test_text_from_tables_does_not_run(
        self, browser: Any, evaluated: tuple[Table, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows, run = evaluated
        monkeypatch.setattr(TrajectoryCache, "prompt", lambda self, index: EVIL)
        rows = [*rows, *({**row, "agent": EVIL} for row in rows if row["agent"] == "lookahead")]
        browser.get_log("browser")
        browser.get(write_report(write_tables(tmp_path, rows, run)).as_uri())
        wait_until(lambda: EVIL in text_of(browser, "player-title"))
        assert browser.title.startswith("Evaluation:")
        assert browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
        names = browser.execute_script(
            "return Array.from(document.querySelectorAll('#fig3a .legendtext')).map((node) => node.textContent)"
        )
        assert EVIL in names
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
