"""Frames: what they show is what happened, no more; and what they cost where nobody looks."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import refine_env
from refine_env import CacheError, ConfigurationError, MissingExtraError, TrajectoryCache
from refine_env.render import FRAME_HEIGHT, FRAME_WIDTH, EpisodeHistory, EpisodeViewer, decoder, viewer
from refine_env.render.decoder import find_decoder, load_decoder
from refine_env.render.frame import FramePainter, _bars_with_gaps, format_error, latent_name
from refine_env.trajectories.pipeline import BUNDLED_MODELS

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (FRAME_HEIGHT, FRAME_WIDTH, 3)
MakeEnv = Callable[..., gym.Env[Any, Any]]


class CountingDecoder:
    """Stands in for a model: images that depend on the latents, and how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, latents: Any) -> Any:
        assert latents.shape[0] == 1
        self.calls += 1
        gray = 0.5 + 0.1 * np.asarray(latents, dtype=np.float32)[:, 0]
        return np.repeat(gray.clip(0, 1)[..., None], 3, axis=3)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> CountingDecoder:
    found = CountingDecoder()
    monkeypatch.setattr(viewer, "find_decoder", lambda cache, choice: (found, ""))
    return found


def viewer_of(env: Any) -> EpisodeViewer:
    found = env.unwrapped._viewer
    assert isinstance(found, EpisodeViewer)
    return found


def painter_of(env: Any) -> FramePainter:
    found = viewer_of(env)._painter
    assert found is not None
    return found


def history_of(env: Any) -> EpisodeHistory:
    history = viewer_of(env)._histories[0]
    history.catch_up()
    return history


def heights(patch: Any) -> Any:
    return patch.get_data().values[::2]


def play(env: Any, actions: Any, seed: int = 0, options: Any = None) -> Iterator[tuple[Any, Any]]:
    """Observation and info of every decision, the first and the last included."""
    observation, info = env.reset(seed=seed, options=options)
    yield observation, info
    for action in actions:
        observation, _, terminated, _, info = env.step(action)
        yield observation, info
        if terminated:
            return


def test_frames_are_of_one_form_and_differ(make_env: MakeEnv) -> None:
    env = make_env(render_mode="rgb_array")
    frames = [env.render() for _ in play(env, itertools.cycle([2, 0]))]
    assert len(frames) == 61
    assert {(frame.shape, frame.dtype) for frame in frames} == {(SHAPE, np.dtype(np.uint8))}
    assert len({frame.tobytes() for frame in frames}) == 61
    assert FRAME_WIDTH % 2 == FRAME_HEIGHT % 2 == 0


def test_equal_seeds_give_equal_frames_and_others_others(make_env: MakeEnv) -> None:
    def frames(seed: int) -> list[Any]:
        env = make_env(render_mode="rgb_array")
        return [env.render() for _, _ in itertools.islice(play(env, itertools.repeat(1), seed), 20)]

    first, again, other = frames(3), frames(3), frames(4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_frame_does_not_depend_on_the_frames_before(make_env: MakeEnv) -> None:
    watched, unwatched = make_env(render_mode="rgb_array"), make_env(render_mode="rgb_array")
    for _ in play(watched, [3] * 40, seed=2):
        frame = watched.render()
    for _ in play(unwatched, [3] * 40, seed=2):
        pass
    assert np.array_equal(frame, unwatched.render())
    watched.reset(seed=5)
    unwatched.reset(seed=5)
    assert np.array_equal(watched.render(), unwatched.render())


def test_the_frame_shows_the_rates_and_the_errors(make_env: MakeEnv) -> None:
    env = make_env(render_mode="rgb_array")
    errors = []
    for observation, info in play(env, itertools.repeat(1), seed=1):
        slot = observation["slot"]
        errors.append(info["latent_mse"])
        env.render()
        painter = painter_of(env)
        history = observation["channel_history"]
        rates = history[-slot:] if slot <= 60 else history
        assert heights(painter.rate_bars)[: slot - 1] == pytest.approx(rates[: slot - 1], rel=1e-6)
        if slot <= 60:
            assert heights(painter.current_rate_bar) == pytest.approx(rates[-1:], rel=1e-6)
            edges = painter.current_rate_bar.get_data().edges
            assert edges[0] < slot < edges[-1]
        x, y = painter.error_curve.get_data()
        assert y[:slot] == pytest.approx(errors)
        assert x[-1] == min(slot, 60) + 0.5
        assert len(painter.delivery_marks.get_offsets()) == info["num_deliveries"]
    assert slot == 61
    assert heights(painter.current_rate_bar).tolist() == [0.0]


def test_the_frame_names_the_state(make_env: MakeEnv) -> None:
    env = make_env(render_mode="rgb_array", snr_db=6.0)
    *_, (observation, info) = play(env, [0] * 30 + [2] * 12, seed=0)
    env.render()
    fields = {name: field.get_text() for name, field in painter_of(env).fields.items()}
    held = observation["device_step"], observation["device_bits"]
    assert fields["slot"] == "slot 43 of 60"
    assert fields["server"] == latent_name(observation["server_step"])
    assert fields["device"] == f"{latent_name(held[0])} · {held[1]} bit"
    message = history_of(env).in_flight
    assert message is not None
    left = observation["remaining_bits"][0] / message.bits
    assert fields["link"] == f"{latent_name(message.step)} · {message.bits} bit, {int(100 * (1 - left))} %"
    assert fields["latent MSE"] == format_error(info["latent_mse"])
    assert fields["SNR"] == "6 dB"


def test_messages_and_their_slots(tiny_kwargs: dict[str, Any]) -> None:
    """With the numbers of the tiny system: a prompt of 6 bits, latents of 4 values, 4 bits a slot."""
    env = gym.make(refine_env.ENV_ID, render_mode="rgb_array", **tiny_kwargs)
    list(play(env, [0, 0, 0, 1, 2, 0, 0, 0], options={"rates": [4.0] * 8}))
    env.render()
    history = history_of(env)
    seen = [(m.step, m.bits, m.first_slot, m.last_slot) for m in history.messages]
    assert seen == [(4, 0, 1, 2), (3, 1, 4, 4), (2, 2, 5, 6)]
    assert history.uplink_slots == 2
    assert history.in_flight is None
    bars = {(bar.row, bar.start, bar.stop) for bar in painter_of(env)._bars(history)}
    assert bars == {
        ("server", 2, 6), ("link", 0, 2), ("link", 3, 4), ("link", 4, 6),
        ("device", 0, 4), ("device", 4, 6), ("device", 6, 8),
    }  # fmt: skip
    assert list(painter_of(env).delivery_arrows.get_xdata()) == [4.5, 6.5]


def test_the_future_is_not_shown(make_env: MakeEnv) -> None:
    """Other rates in the slots to come leave the frame as it is; another rate in the current slot does not."""
    rates = np.full(60, 200.0)
    later, now = rates.copy(), rates.copy()
    later[30:] = 3_000.0
    now[29] = 150.0
    frames = []
    for chosen in (rates, later, now):
        env = make_env(render_mode="rgb_array")
        *_, (observation, _) = play(env, [1] * 29, options={"rates": chosen})
        assert observation["slot"] == 30
        frames.append(env.render())
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])


def test_rates_beyond_the_axis_widen_it(make_env: MakeEnv) -> None:
    env = make_env(render_mode="rgb_array")
    rates = [200.0] * 10 + [2_000.0] + [0.0] * 49
    for _ in play(env, [0] * 10, options={"rates": rates}):
        env.render()
    painter = painter_of(env)
    assert painter._rates.get_ylim()[1] >= 2_000.0 / 256
    frame = env.render()
    env.reset(seed=0)
    env.render()
    assert painter._rates.get_ylim()[1] < 2_000.0 / 256  # another episode has its own
    for _ in play(env, [0] * 10, options={"rates": rates}):
        pass
    assert np.array_equal(env.render(), frame)


def test_skipped_slots_are_shown(make_env: MakeEnv) -> None:
    """An environment that runs through forced slots shows the same past as one that does not."""
    epochs = make_env(render_mode="rgb_array", decision_epochs=True)
    slots = make_env(render_mode="rgb_array")
    steps = list(play(epochs, itertools.cycle([0, 2, 3]), seed=6))
    taken = dict(zip((int(observation["slot"]) for observation, _ in steps), itertools.cycle([0, 2, 3]), strict=False))
    observation, _ = slots.reset(seed=6)
    while observation["slot"] <= 60:
        observation, *_ = slots.step(taken.get(int(observation["slot"]), 0))
    assert len(steps) < 61
    a, b = history_of(epochs), history_of(slots)
    assert a.messages == b.messages
    assert a.latent_mse == b.latent_mse
    assert len(a.latent_mse) == 61
    assert np.array_equal(epochs.render(), slots.render())


def test_decision_epochs_before_the_first_decision(make_env: MakeEnv) -> None:
    env = make_env(render_mode="rgb_array", decision_epochs=True)
    observation, _ = env.reset(seed=0)
    env.render()
    assert observation["slot"] > 1
    assert history_of(env).slot == observation["slot"]
    assert len(history_of(env).latent_mse) == observation["slot"]


def test_the_replay_holds_what_the_device_holds(make_env: MakeEnv) -> None:
    env = make_env(render_mode="rgb_array", illegal_action="wait")
    for _ in play(env, itertools.cycle([1, 4, 0]), seed=8):
        episodes = env.unwrapped._process.episodes  # type: ignore[attr-defined]
        assert np.array_equal(history_of(env).device_latent, episodes.device[0])
        assert history_of(env).server_step == episodes.state["server_step"][0]


def test_terminal_frame(make_env: MakeEnv) -> None:
    env = make_env(render_mode="rgb_array", snr_db=30.0)
    *_, (_, info) = play(env, [0] * 52 + [5] * 8)
    env.render()
    painter = painter_of(env)
    assert info["latent_mse"] == 0.0
    assert painter.fields["slot"].get_text() == "deadline"
    assert painter.fields["latent MSE"].get_text() == "exactly 0"
    assert not any(band.get_visible() for band in painter._bands)
    bottom = painter._errors.get_ylim()[0]
    assert painter.error_curve.get_ydata()[-1] == bottom
    assert bottom == pytest.approx(1e-3)  # a decade below the axis of the frames before


def test_text_does_not_overlap(make_env: MakeEnv, counting: CountingDecoder) -> None:
    env = make_env(render_mode="rgb_array", snr_db=[-12.5, 24.5])
    for _ in play(env, itertools.cycle([5, 1]), seed=3):
        env.render()
        painter = painter_of(env)
        texts = [text for text in painter._figure.texts if text.get_text()]
        texts += [label for label in painter.track_labels if label.get_visible()]
        texts += [painter._tracks.get_legend(), painter._tracks.texts[0]]
        boxes = [text.get_window_extent(painter._canvas.get_renderer()) for text in texts]
        for (one, box), (another, other) in itertools.combinations(zip(texts, boxes, strict=True), 2):
            overlap = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(overlap) <= 0.5, (one, another)
        assert all(box.x0 >= 0 and box.x1 <= FRAME_WIDTH and box.y0 >= 0 and box.y1 <= FRAME_HEIGHT for box in boxes)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"bit_depths": list(range(1, 17))},
        {"deadline": 1},
        {"deadline": 700},
        {"snr_db": -80.0},
        {"snr_db": 200.0},
        {"link": {"uplink_bits": 1e9}},
    ],
    ids=str,
)
def test_unusual_systems_have_frames(make_env: MakeEnv, kwargs: dict[str, Any]) -> None:
    env = make_env(render_mode="rgb_array", **kwargs)
    for _ in play(env, itertools.repeat(env.action_space.n - 1)):  # type: ignore[attr-defined]
        pass
    assert env.render().shape == SHAPE


def test_users_style_changes_nothing_and_stays(make_env: MakeEnv) -> None:
    import matplotlib as mpl

    plain, styled = make_env(render_mode="rgb_array"), make_env(render_mode="rgb_array")
    plain.reset(seed=0)
    expected = plain.render()
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "black", "lines.linewidth": 7}):
        styled.reset(seed=0)
        assert np.array_equal(styled.render(), expected)
        assert mpl.rcParams["font.size"] == 20


class TestPictures:
    def test_decoded_once_for_every_change(self, make_env: MakeEnv, counting: CountingDecoder) -> None:
        env = make_env(render_mode="rgb_array")
        for _, info in play(env, itertools.repeat(1)):
            env.render()
            env.render()
            assert counting.calls == 2 + info["num_deliveries"]  # x_0, x_T and every delivery
        assert info["num_deliveries"] > 3

    def test_a_new_episode_is_decoded_anew(self, make_env: MakeEnv, counting: CountingDecoder) -> None:
        env = make_env(render_mode="rgb_array")
        shown = []
        for trajectory in (1, 2, 2):
            env.reset(seed=0, options={"trajectory": trajectory})
            env.render()
            shown.append([np.array(image.get_array()) for image in painter_of(env).images])
        assert not np.array_equal(shown[0][1], shown[1][1])
        assert np.array_equal(shown[1], shown[2])
        assert counting.calls == 2 + 2 + 1  # of the same trajectory, x_0 is known

    def test_they_are_of_what_the_device_holds_and_of_the_clean_latent(
        self, make_env: MakeEnv, counting: CountingDecoder
    ) -> None:
        env = make_env(render_mode="rgb_array")
        *_, (_, info) = play(env, [0] * 40 + [1] * 10)
        env.render()
        held = env.unwrapped._process.episodes.device.reshape(1, 4, 8, 8)  # type: ignore[attr-defined]
        clean = env.unwrapped.cache.latents(info["trajectory"])[:1]  # type: ignore[attr-defined]
        device_image, clean_image = painter_of(env).images
        assert np.allclose(device_image.get_array(), counting(held)[0])
        assert np.allclose(clean_image.get_array(), counting(clean)[0])
        assert not np.allclose(counting(held), counting(clean), atol=0.01)

    @pytest.mark.parametrize(
        ("prompt", "shown"),
        [
            ("a $x_0$ and a $", "“a $x_0$ and a $”"),
            ("two\nlines", "“two lines”"),
            ("fox \U0001f98a", "“fox □”"),
            (None, ""),
        ],
    )
    def test_prompts_of_all_kinds(
        self, make_env: MakeEnv, counting: CountingDecoder, monkeypatch: pytest.MonkeyPatch, prompt: Any, shown: str
    ) -> None:
        monkeypatch.setattr(TrajectoryCache, "prompt", lambda self, index: prompt)
        env = make_env(render_mode="rgb_array")
        env.reset(seed=0)
        env.render()
        assert painter_of(env)._prompt.get_text() == shown

    def test_a_long_prompt_is_cut(
        self, make_env: MakeEnv, counting: CountingDecoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TrajectoryCache, "prompt", lambda self, index: "WIDE WORDS " * 50)
        env = make_env(render_mode="rgb_array")
        env.reset(seed=0)
        env.render()
        painter = painter_of(env)
        assert painter._prompt.get_text().endswith("…”")
        box = painter._prompt.get_window_extent(painter._canvas.get_renderer())
        assert 200 < box.width < 272
        assert box.x1 < FRAME_WIDTH

    def test_the_bundled_cache_has_its_decoder(self) -> None:
        pytest.importorskip("diffusers")
        cache = TrajectoryCache.open("default")
        found, note = find_decoder(cache, "auto")
        assert found is not None, note
        image = found(cache.latents(0)[:1])
        assert image.shape[0] == 1
        assert image.shape[3] == 3
        assert found is load_decoder("emoji")
        assert find_decoder(cache, "none") == (None, "")

    def test_without_a_model(self, gaussian_cache: Path) -> None:
        cache = TrajectoryCache.open(gaussian_cache)
        assert find_decoder(cache, "auto") == (None, "no picture: gaussian latents")

    @pytest.mark.parametrize(
        ("model", "missing", "note"),
        [
            ("org/model", (), "no picture: the model org/model is not here"),
            ("emoji", ("torch",), "no picture: needs refine-env[generate]"),
            ("emoji", ("diffusers",), "no picture: needs refine-env[generate]"),
            ("emoji", (), "no picture: not the cache's revision of emoji"),
            ("radiomap", (), "no picture: not the cache's revision of radiomap"),
        ],
    )
    def test_a_note_says_why_there_is_none(
        self, monkeypatch: pytest.MonkeyPatch, model: str, missing: tuple[str, ...], note: str
    ) -> None:
        recipe = SimpleNamespace(model={"id": model, "revision": "new"}, source="diffusers")
        cache: Any = SimpleNamespace(manifest=SimpleNamespace(recipe=recipe))
        monkeypatch.setattr(
            decoder.importlib.util, "find_spec", lambda name: None if name in missing else SimpleNamespace()
        )
        monkeypatch.setattr(decoder, "load_decoder", lambda name: SimpleNamespace(revision="old"))
        assert find_decoder(cache, "auto") == (None, note)
        recipe.model["revision"] = "old"
        if not missing and model in BUNDLED_MODELS:
            assert find_decoder(cache, "auto")[0] is not None

        def fail(name: str) -> Any:
            raise CacheError("damaged")

        monkeypatch.setattr(decoder, "load_decoder", fail)
        if not missing and model in BUNDLED_MODELS:
            assert find_decoder(cache, "auto") == (None, f"no picture: the model {model} cannot be loaded")

    def test_a_model_that_was_named_must_be_there(self, make_env: MakeEnv) -> None:
        pytest.importorskip("diffusers")
        env = make_env(render_mode="rgb_array", render_decoder="./nowhere")
        env.reset(seed=0)
        with pytest.raises(CacheError, match="got './nowhere', and there is no such folder"):
            env.render()

    @pytest.mark.parametrize("value", [None, 3, ""])
    def test_bad_values(self, make_env: MakeEnv, value: Any) -> None:
        with pytest.raises(ConfigurationError, match="`render_decoder` must be 'auto', 'none' or a model, got"):
            make_env(render_decoder=value)


class TestHuman:
    @pytest.fixture(autouse=True)
    def window(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("pygame")
        monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
        monkeypatch.setitem(refine_env.LatentRefinementEnv.metadata, "render_fps", 1_000)

    def test_every_reset_and_step_shows_the_frame(self, make_env: MakeEnv) -> None:
        import pygame

        env, reference = make_env(render_mode="human"), make_env(render_mode="rgb_array")
        for _ in zip(play(env, [1] * 6), play(reference, [1] * 6), strict=True):
            surface = pygame.display.get_surface()
            assert surface is not None
            assert np.array_equal(pygame.surfarray.array3d(surface).swapaxes(0, 1), reference.render())
        assert env.render() is None
        env.close()
        assert not pygame.display.get_init()
        env.close()

    def test_a_closed_window_opens_again(self, make_env: MakeEnv) -> None:
        import pygame

        env = make_env(render_mode="human").unwrapped
        env.close()
        env.reset(seed=0)
        env.close()
        env.step(0)
        assert pygame.display.get_surface() is not None
        env.close()

    def test_it_keeps_the_frame_rate(self, make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch) -> None:
        import pygame

        rates = []
        monkeypatch.setattr(pygame.time, "Clock", lambda: SimpleNamespace(tick=rates.append))
        env = make_env(render_mode="human")
        env.reset(seed=0)
        env.step(0)
        env.close()
        assert rates == [1_000, 1_000]

    def test_copies_leave_the_window_behind(self, make_env: MakeEnv) -> None:
        env = make_env(render_mode="human").unwrapped
        env.reset(seed=0)
        twin = pickle.loads(pickle.dumps(env))
        twin.step(0)
        twin.close()
        env.close()

    def test_without_pygame(self, make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pygame", None)
        env = make_env(render_mode="human").unwrapped
        with pytest.raises(MissingExtraError, match=r"`pygame` must be installed .*refine-env\[render\]"):
            env.reset(seed=0)


class TestGymnasium:
    def test_before_an_episode(self, make_env: MakeEnv) -> None:
        for mode in ("rgb_array", "human"):
            with pytest.raises(ResetNeeded, match="must have begun to render"):
                make_env(render_mode=mode).unwrapped.render()

    def test_without_matplotlib(self, make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch) -> None:
        env = make_env(render_mode="rgb_array")
        env.reset(seed=0)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(MissingExtraError, match=r"`matplotlib` must be installed .*refine-env\[render\]"):
            env.render()
        env.step(0)  # only looking needs it

    def test_close_is_idempotent_and_frames_come_back(self, make_env: MakeEnv) -> None:
        env = make_env(render_mode="rgb_array").unwrapped
        env.close()
        env.reset(seed=0)
        env.step(1)
        frame = env.render()
        env.close()
        env.close()
        assert np.array_equal(env.render(), frame)

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
    @pytest.mark.parametrize("looked", [False, True])
    def test_copies_mid_episode(self, make_env: MakeEnv, counting: CountingDecoder, clone: Any, looked: bool) -> None:
        env = make_env(render_mode="rgb_array").unwrapped
        for _ in play(env, [2] * 33, seed=4):
            if looked:
                env.render()
        twin = clone(env)
        assert viewer_of(twin)._painter is None
        for _ in range(4):
            env.step(1)
            twin.step(1)
        assert np.array_equal(env.render(), twin.render())
        twin.step(1)
        assert not np.array_equal(env.render(), twin.render())

    def test_spec_round_trip(self, gaussian_cache: Path) -> None:
        env = gym.make(refine_env.ENV_ID, cache=str(gaussian_cache), render_mode="rgb_array", render_decoder="none")
        assert env.spec is not None
        restored = gym.make(EnvSpec.from_json(env.spec.to_json()))
        assert restored.unwrapped.settings.render_decoder == "none"  # type: ignore[attr-defined]
        env.reset(seed=0)
        restored.reset(seed=0)
        assert np.array_equal(env.render(), restored.render())

    def test_lists_of_frames(self, make_env: MakeEnv) -> None:
        env = make_env(render_mode="rgb_array_list")
        for _ in play(env, [1, 1, 0]):
            pass
        frames: Any = env.render()
        assert len(frames) == 4
        assert all(frame.shape == SHAPE for frame in frames)
        assert "rgb_array_list" not in refine_env.LatentRefinementEnv.metadata["render_modes"]

    def test_record_video(self, make_env: MakeEnv, tmp_path: Path) -> None:
        pytest.importorskip("moviepy")
        ffmpeg = pytest.importorskip("imageio_ffmpeg")
        env = wrappers.RecordVideo(make_env(render_mode="rgb_array"), str(tmp_path / "videos"), disable_logger=True)
        for _ in play(env, itertools.repeat(1)):
            pass
        env.close()
        (video,) = tmp_path.glob("videos/*.mp4")
        count, _ = ffmpeg.count_frames_and_secs(str(video))
        assert count == 61

    def test_nobody_pays_who_does_not_look(self, make_env: MakeEnv, gaussian_cache: Path) -> None:
        for mode in (None, "ansi"):
            assert make_env(render_mode=mode).unwrapped._viewer is None  # type: ignore[attr-defined]
        code = (
            "import sys, gymnasium, refine_env;"
            f"env = gymnasium.make(refine_env.ENV_ID, cache={str(gaussian_cache)!r}, render_mode='rgb_array');"
            "env.reset(seed=0); [env.step(1) for _ in range(60)];"
            "print([m for m in ('matplotlib', 'pygame', 'torch', 'PIL', 'moviepy') if m in sys.modules],"
            " env.unwrapped._viewer._histories[0]._replay)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
        )
        assert result.stdout.strip() == "[] None"


class TestVector:
    @pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
    @pytest.mark.parametrize("epochs", [False, True])
    def test_equals_sync_vector_env(self, gaussian_cache: Path, mode: str, epochs: bool) -> None:
        kwargs = {"cache": str(gaussian_cache), "render_mode": "rgb_array", "decision_epochs": epochs, "deadline": 7}
        ours: Any = gym.make_vec(refine_env.ENV_ID, num_envs=2, autoreset_mode=mode, **kwargs)
        theirs = SyncVectorEnv(
            [lambda: refine_env.LatentRefinementEnv(**kwargs) for _ in range(2)], autoreset_mode=AutoresetMode(mode)
        )
        ours.reset(seed=1)
        theirs.reset(seed=1)
        rng = np.random.default_rng(0)
        for _ in range(10):
            frames, expected = ours.render(), theirs.render()
            assert isinstance(frames, tuple)
            assert len(frames) == 2
            assert all(np.array_equal(a, b) for a, b in zip(frames, expected, strict=True))  # type: ignore[arg-type]
            actions = rng.integers(0, 6, 2)
            ours.step(actions)
            theirs.step(actions)
        ours.close()
        ours.close()

    def test_partial_reset(self, gaussian_cache: Path) -> None:
        env = refine_env.LatentRefinementVectorEnv(2, cache=str(gaussian_cache), render_mode="rgb_array")
        env.reset(seed=0)
        for _ in range(3):
            env.step(np.array([0, 0]))
        env.reset(seed=[5, 6], options={"reset_mask": np.array([False, True])})
        env.render()
        viewer = env._viewer
        assert viewer is not None
        assert [history.slot for history in viewer._histories] == [4, 1]

    def test_there_is_no_window(self, gaussian_cache: Path) -> None:
        with pytest.raises(ConfigurationError, match="must be one of 'ansi', 'rgb_array' or None, got 'human'.*window"):
            refine_env.LatentRefinementVectorEnv(2, cache=str(gaussian_cache), render_mode="human")
        assert "human" not in refine_env.LatentRefinementVectorEnv.metadata["render_modes"]

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
    def test_copies(self, gaussian_cache: Path, clone: Any) -> None:
        env = refine_env.LatentRefinementVectorEnv(2, cache=str(gaussian_cache), render_mode="rgb_array")
        env.reset(seed=0)
        for _ in range(20):
            env.step(np.array([1, 2]))
        assert all(map(np.array_equal, env.render() or (), clone(env).render()))


def test_bars_with_gaps() -> None:
    values, edges = _bars_with_gaps(np.array([1.0, 2.0, 4.0]), first_slot=5)
    assert values[::2].tolist() == [1.0, 2.0, 4.0]
    assert np.isnan(values[1::2]).all()
    assert edges == pytest.approx([4.6, 5.4, 5.6, 6.4, 6.6, 7.4])
    assert _bars_with_gaps(np.empty(0), first_slot=1)[0].tolist() == [0.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "exactly 0"), (1.7321, "1.73"), (0.0312, "0.0312"), (1.234e-4, "1.23·10⁻⁴"), (4321.0, "4.32·10³")],
)
def test_errors_as_text(value: float, text: str) -> None:
    assert format_error(value) == text
