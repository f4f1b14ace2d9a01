"""Paint the frames of an episode as pictures, with matplotlib."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refine_env.config import SystemConfig
from refine_env.errors import import_extra
from refine_env.radiomap import COVERAGE_DBM, PowerScale, color_bar
from refine_env.render.history import EpisodeHistory, Message
from refine_env.render.text import start_kind

__all__ = ["FRAME_HEIGHT", "FRAME_WIDTH", "FramePainter", "Pictures"]

FRAME_WIDTH, FRAME_HEIGHT = 960, 540
"""Size of a frame [pixel]; even, as video codecs want it."""

EXTRA = "render"
_DPI = 100

# Okabe and Ito's palette: distinguishable with any color vision. Bit depths in ascending order have its colors as the
# policies that send at these depths have them in the figures.
_DEPTH_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#CC79A7", "#F0E442")
_DEADLINE_COLOR = "#D55E00"
_RATE_COLOR, _CURRENT_RATE_COLOR = "#9CC9E3", "#0072B2"
_SERVER_COLOR, _PROMPT_COLOR, _NOISE_COLOR = "#4D4D4D", "#BDBDBD", "#E3E3E3"
_TEXT_COLOR, _QUIET_COLOR = "#1A1A1A", "#666666"
_STYLE = {
    "font.family": "DejaVu Sans",  # matplotlib brings it along: the same frame everywhere
    "font.size": 11.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _QUIET_COLOR,
    "axes.labelcolor": _TEXT_COLOR,
    "text.color": _TEXT_COLOR,
    "xtick.color": _QUIET_COLOR,
    "ytick.color": _QUIET_COLOR,
    "xtick.labelcolor": _TEXT_COLOR,
    "ytick.labelcolor": _TEXT_COLOR,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "mathtext.default": "regular",
}
_LABEL_SIZE, _CAPTION_SIZE, _VALUE_SIZE, _TITLE_SIZE = 10.5, 10.5, 13.0, 17.0

# Left, top, width and height of everything [pixel]; the panels are wider where there are no pictures.
_PANEL_LEFT, _PANEL_RIGHT, _PANEL_RIGHT_ALONE = 92, 664, 936
_TRACKS = (118, 104)
_RATES = (240, 106)
_ERRORS = (362, 126)
_PROMPT_WIDTH = 250
_PICTURE_BOXES = ((722, 120, 180, 180), (722, 332, 180, 180))
_BAR_BOX = (910, 120, 8, 180)  # of the scale of a map
_ROWS = ("device", "link", "server")
_BAR_HEIGHT = 0.72
_BAR_WIDTH = 0.8
_CURVE_TOP_DECADES = 0.15
_MOST_BACKGROUNDS = 8

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Pictures(NamedTuple):
    """The decoded images beside a frame, float in [0, 1], (height, width, 3).

    Attributes:
        device: the image of the latent that the device holds.
        clean: the image of the clean latent x_0.
        prompt: the prompt of the trajectory, if it is known.
    """

    device: NDArray[np.float32]
    clean: NDArray[np.float32]
    prompt: str | None


class _Bar(NamedTuple):
    """A bar in the tracks, which reaches from the end of slot ``start`` to the end of slot ``stop``."""

    row: str
    start: float
    stop: float
    color: str
    labels: Sequence[str]  # the first that fits


def latent_name(step: int) -> str:
    """Return the name of x_t, with t as a subscript."""
    return f"x{str(step).translate(_SUBSCRIPTS)}"


def _start_name(config: SystemConfig) -> str:
    """Return the name of what the device starts with."""
    return f"{latent_name(config.first_device_step)} ({start_kind(config)})"


def message_name(message: Message) -> str:
    """Return the name of what a message carries: x_t with its bit depth, or the prompt."""
    return "prompt" if message.bits == 0 else f"{latent_name(message.step)} · {message.bits} bit"


def format_error(value: float) -> str:
    """Write a mean square error with three digits."""
    if value == 0.0:
        return "exactly 0"
    exponent = math.floor(math.log10(value))
    if -3 < exponent < 3:
        return f"{value:.3g}"
    return f"{value / 10.0**exponent:.2f}·10{str(exponent).translate(_SUPERSCRIPTS)}"


def _format_snr(snr_db: float | tuple[float, float]) -> str:
    if isinstance(snr_db, tuple):
        return "{:g} … {:g} dB".format(*snr_db)
    return f"{snr_db:g} dB"


def _nice_ceiling(value: float) -> float:
    """Return the least of 1, 1.5, 2, 3, 5, 7 times a power of ten that is at least ``value`` > 0."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(factor * unit for factor in (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0) if factor * unit >= value * (1 - 1e-9))


class FramePainter:
    """Paints the frames of all episodes of one system.

    Axes, ticks and labels are drawn once and kept; only what changes from slot to slot is drawn anew, with artists
    that were made once. What a frame shows is a function of the episode's history, hence of its past.

    Args:
        config: the system.
        with_pictures: whether to leave room for decoded images.
        note: a remark in small print, such as the reason why there are no images.
        scale: what the colors of the images stand for, where they are maps.

    Attributes:
        rate_bars: the rates of the slots before the current one.
        current_rate_bar: the rate of the current slot.
        error_curve: the latent MSE over the slots.
        delivery_marks: the deliveries on that curve.
        track_bars: the bars that show what server, link and device do.
        track_labels: the texts in these bars; the ones in use are visible.
        fields: the texts of the header, by name.
        images: the image at the device and the clean one.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """

    def __init__(
        self, config: SystemConfig, *, with_pictures: bool, note: str = "", scale: PowerScale | None = None
    ) -> None:
        self._config = config
        self._matplotlib = import_extra("matplotlib", EXTRA)
        self._background = lru_cache(_MOST_BACKGROUNDS)(self._draw_background)
        self._width = lru_cache(None)(self._measure)
        self._colors = self._depth_colors()
        self._shown_prompt: str | None = None
        base = 1.0
        if not isinstance(config.snr_db, tuple):
            statistics = config.rate_statistics
            base = (statistics.mean + 3.0 * statistics.std) / config.latent_dim
        self._usual_max_rate = max(base, 1e-6)
        with self._style():
            self._build(with_pictures, note)
            if with_pictures and scale is not None:
                self._build_color_bar(scale)

    @contextlib.contextmanager
    def _style(self) -> Iterator[None]:
        """Set matplotlib's defaults and the frame's style for a while, whatever the user has set."""
        with self._matplotlib.rc_context():
            self._matplotlib.rcdefaults()
            self._matplotlib.rcParams.update(_STYLE)
            yield

    def _depth_colors(self) -> dict[int, str]:
        depths = self._config.bit_depths
        if len(depths) <= len(_DEPTH_COLORS):
            return dict(zip(depths, _DEPTH_COLORS, strict=False))
        import_extra("matplotlib.colors", EXTRA)
        colormap = self._matplotlib.colormaps["viridis"]
        to_hex = self._matplotlib.colors.to_hex
        return {depth: to_hex(colormap(i / (len(depths) - 1))) for i, depth in enumerate(depths)}

    def _build(self, with_pictures: bool, note: str) -> None:
        figure_module = import_extra("matplotlib.figure", EXTRA)
        agg = import_extra("matplotlib.backends.backend_agg", EXTRA)
        collections = import_extra("matplotlib.collections", EXTRA)
        patches = import_extra("matplotlib.patches", EXTRA)
        figure = figure_module.Figure(figsize=(FRAME_WIDTH / _DPI, FRAME_HEIGHT / _DPI), dpi=_DPI, facecolor="white")
        self._figure = figure
        self._canvas = agg.FigureCanvasAgg(figure)
        deadline = self._config.deadline
        right = _PANEL_RIGHT if with_pictures else _PANEL_RIGHT_ALONE
        self._tracks, self._rates, self._errors = (
            self._axes(_PANEL_LEFT, top, right - _PANEL_LEFT, height) for top, height in (_TRACKS, _RATES, _ERRORS)
        )
        panels = (self._tracks, self._rates, self._errors)
        margin = 0.012 * deadline
        self._bands = []
        for axes in panels:
            axes.set_xlim(0.5 - margin / 2, deadline + 0.5 + margin)
            axes.axvline(deadline + 0.5, color=_DEADLINE_COLOR, linewidth=1.6, linestyle=(0, (4, 2)))
            axes.xaxis.set_major_locator(self._slot_locator(deadline))
            axes.tick_params(axis="x", labelbottom=axes is self._errors)
            self._bands.append(axes.axvspan(0.5, 1.5, color="#000000", alpha=0.08, linewidth=0, animated=True))
        self._tracks.set_ylim(-0.5, len(_ROWS) - 0.5)
        self._tracks.set_yticks(range(len(_ROWS)), _ROWS)
        self._tracks.tick_params(axis="y", length=0, labelsize=11)
        self._tracks.spines["left"].set_visible(False)
        self._errors.set_yscale("log")
        ticker = import_extra("matplotlib.ticker", EXTRA)
        self._rates.yaxis.set_major_locator(ticker.MaxNLocator(3))
        self._rates.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        self._rates.set_ylabel("rate [bit/dim.]", labelpad=8)
        self._errors.set_ylabel("latent MSE", labelpad=8)
        for axes in (self._rates, self._errors):
            axes.yaxis.set_label_coords(-(_PANEL_LEFT - 24) / (right - _PANEL_LEFT), 0.5)
            axes.grid(visible=True, axis="y", linewidth=0.5, color="#DDDDDD")
            axes.set_axisbelow(True)
        self._errors.set_xlabel("slot", labelpad=2)
        # In the coordinates of the tracks, so that it stays with the line.
        self._tracks.annotate(
            "deadline",
            (deadline + 0.5, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=_DEADLINE_COLOR,
            fontsize=_LABEL_SIZE,
        )
        self._legend(patches)

        self.track_bars = collections.PolyCollection([], linewidth=0.8, edgecolor="white", animated=True)
        self._tracks.add_collection(self.track_bars, autolim=False)
        self.track_labels: list[Any] = []
        (self.delivery_arrows,) = self._tracks.plot(
            [], [], linestyle="none", marker="v", markersize=6, color=_TEXT_COLOR, animated=True
        )
        no_bar = ([0.0], [0.5, 0.6])
        self.rate_bars = self._rates.stairs(*no_bar, fill=True, color=_RATE_COLOR, linewidth=0, animated=True)
        self.current_rate_bar = self._rates.stairs(
            *no_bar, fill=True, color=_CURRENT_RATE_COLOR, linewidth=0, animated=True
        )
        (self.error_curve,) = self._errors.plot(
            [], [], drawstyle="steps-post", color=_TEXT_COLOR, linewidth=1.6, animated=True
        )
        self.delivery_marks = self._errors.scatter(
            [], [], s=44, edgecolor="white", linewidth=0.8, zorder=5, clip_on=False, animated=True
        )
        self._build_header()
        self.images = [self._image_axes(box) for box in _PICTURE_BOXES] if with_pictures else []
        self._captions = []
        if with_pictures:
            for (left, top, width, _), position in zip(_PICTURE_BOXES, ("device", "clean"), strict=True):
                self._captions.append(self._text(left + width / 2, top - 8, position, _LABEL_SIZE + 1, ha="center"))
            left, top, width, height = _PICTURE_BOXES[1]
            self._prompt = self._text(
                left + width / 2, top + height + 18, "", _CAPTION_SIZE, ha="center", color=_QUIET_COLOR
            )
        if note:
            self._text(FRAME_WIDTH - 24, FRAME_HEIGHT - 12, note, 9.0, ha="right", color=_QUIET_COLOR, animated=False)

    def _build_color_bar(self, scale: PowerScale) -> None:
        axes = self._axes(*_BAR_BOX)
        axes.imshow(color_bar(), aspect="auto", extent=(0.0, 1.0, *scale), origin="lower", interpolation="nearest")
        axes.set_xticks([])
        axes.yaxis.tick_right()
        axes.tick_params(axis="y", length=2, pad=2, labelsize=8.5)
        axes.set_yticks([scale.black_dbm, COVERAGE_DBM, scale.white_dbm])
        left, top, width, height = _BAR_BOX
        self._text(left + width / 2, top + height + 20, "dBm", _CAPTION_SIZE, ha="center", animated=False)

    def _build_header(self) -> None:
        deadline, snr = self._config.deadline, _format_snr(self._config.snr_db)
        size = self._fitting_size(f"slot {deadline} of {deadline}", _TITLE_SIZE, 190)
        self.fields: dict[str, Any] = {"slot": self._text(24, 48, "", size, weight="bold")}
        columns = {"server": 250, "link": 344, "device": 540, "latent MSE": 674, "SNR": 798}
        for name, left in columns.items():
            self._text(left, 26, name, _CAPTION_SIZE, color=_QUIET_COLOR, animated=False)
            self.fields[name] = self._text(left, 49, "", _VALUE_SIZE)
        self.fields["SNR"].set(text=snr, fontsize=self._fitting_size(snr, _VALUE_SIZE, 138), animated=False)
        rule = import_extra("matplotlib.lines", EXTRA).Line2D(
            [24 / FRAME_WIDTH, 1 - 24 / FRAME_WIDTH], [1 - 66 / FRAME_HEIGHT] * 2, color="#CCCCCC", linewidth=0.8
        )
        self._figure.add_artist(rule)

    def _legend(self, patches: Any) -> None:
        depths = list(self._colors)
        shown = depths if len(depths) <= len(_DEPTH_COLORS) else [depths[0], depths[len(depths) // 2], depths[-1]]
        handles = [patches.Patch(color=self._colors[depth], linewidth=0) for depth in shown]
        labels = [f"{depth} bit" for depth in shown]
        handles.append(patches.Patch(color=_PROMPT_COLOR, linewidth=0))
        labels.append("prompt")
        self._tracks.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=len(labels),
            frameon=False,
            fontsize=_LABEL_SIZE,
            handlelength=0.9,
            handleheight=0.9,
            handletextpad=0.4,
            columnspacing=1.0,
            borderaxespad=0.1,
            borderpad=0.2,
        )

    def _slot_locator(self, deadline: int) -> Any:
        ticker = import_extra("matplotlib.ticker", EXTRA)
        if deadline <= 12:
            return ticker.FixedLocator(range(1, deadline + 1))
        spacing = max(1, int(_nice_ceiling(deadline / 8)))
        return ticker.FixedLocator([1, *range(spacing, deadline + 1, spacing)])

    def _axes(self, left: float, top: float, width: float, height: float) -> Any:
        return self._figure.add_axes(
            (
                left / FRAME_WIDTH,
                1 - (top + height) / FRAME_HEIGHT,
                width / FRAME_WIDTH,
                height / FRAME_HEIGHT,
            )
        )

    def _image_axes(self, box: tuple[int, int, int, int]) -> Any:
        axes = self._axes(*box)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(True)
            spine.set_color("#AAAAAA")
        return axes.imshow(np.ones((1, 1, 3)), animated=True, interpolation="antialiased", aspect="equal")

    def _text(
        self, left: float, baseline: float, text: str, size: float, *, animated: bool = True, **style: Any
    ) -> Any:
        return self._figure.text(
            left / FRAME_WIDTH,
            1 - baseline / FRAME_HEIGHT,
            text,
            fontsize=size,
            animated=animated,
            parse_math=False,
            **style,
        )

    def paint(self, history: EpisodeHistory, pictures: Pictures | None = None) -> NDArray[np.uint8]:
        """Paint the frame of the current slot.

        Args:
            history: the episode's past, up to date.
            pictures: the decoded images to show beside it, where there is room for them.

        Returns:
            uint8 (FRAME_HEIGHT, FRAME_WIDTH, 3).
        """
        with self._style():
            self._restore_background(history)
            self._set_header(history)
            self._set_tracks(history)
            self._set_curves(history)
            if pictures is not None and self.images:
                self._set_pictures(history, pictures)
            for artist in self._dynamic():
                (artist.axes or self._figure).draw_artist(artist)
            return np.array(np.asarray(self._canvas.buffer_rgba())[:, :, :3])

    def _dynamic(self) -> Iterator[Any]:
        yield from self._bands
        yield self.track_bars
        yield from (label for label in self.track_labels if label.get_visible())
        yield from (self.delivery_arrows, self.rate_bars, self.current_rate_bar, self.error_curve, self.delivery_marks)
        yield from (field for field in self.fields.values() if field.get_animated())
        if self.images:
            yield from (*self.images, *self._captions, self._prompt)

    def _limits(self, history: EpisodeHistory) -> tuple[float, float, float]:
        """Return the highest rate, the lowest and the highest error on the axes, which follow from the past alone."""
        highest = _nice_ceiling(max(self._usual_max_rate, float(history.rates.max())))
        positive = [value for value in history.latent_mse if value > 0.0]
        top = 10.0 ** (math.log10(max(positive, default=1.0)) + _CURVE_TOP_DECADES)
        decade = min(math.floor(math.log10(min(positive, default=1.0))), math.floor(math.log10(top)) - 2)
        below = len(positive) < len(history.latent_mse)  # an error of exactly 0 lies a decade below the others
        return highest, 10.0 ** (decade - below), top

    def _restore_background(self, history: EpisodeHistory) -> None:
        """Put on the canvas what stays from slot to slot; it is drawn when the limits of the axes are new."""
        limits = self._limits(history)
        self._rates.set_ylim(0.0, limits[0])
        self._errors.set_ylim(*limits[1:])
        self._canvas.restore_region(self._background(limits))

    def _draw_background(self, limits: tuple[float, float, float]) -> Any:
        """Draw what stays as long as the axes have these limits, which are set already."""
        self._canvas.draw()
        return self._canvas.copy_from_bbox(self._figure.bbox)

    def _set_header(self, history: EpisodeHistory) -> None:
        deadline, in_flight = self._config.deadline, history.in_flight
        ended = history.slot > deadline
        self.fields["slot"].set_text("deadline" if ended else f"slot {history.slot} of {deadline}")
        self.fields["server"].set_text(latent_name(history.server_step))
        link = "idle" if in_flight is None else f"{message_name(in_flight)}, {math.floor(100 * history.progress)} %"
        self.fields["link"].set_text("closed" if ended else link)
        self.fields["device"].set_text(self._device_name(history))
        self.fields["latent MSE"].set_text(format_error(history.latent_mse[-1]))
        for band in self._bands:
            band.set_x(history.slot - 0.5)
            band.set_visible(not ended)

    def _device_name(self, history: EpisodeHistory) -> str:
        deliveries = history.deliveries
        return message_name(deliveries[-1]) if deliveries else _start_name(self._config)

    def _bars(self, history: EpisodeHistory) -> Iterator[_Bar]:
        now = history.slot - 1  # slots that are over; what the device holds is known in the current one too
        uplink, first_step = history.uplink_slots, self._config.first_server_step
        if uplink is not None and now > uplink:
            name = latent_name(history.server_step)
            done = min(now, uplink + first_step)
            yield _Bar("server", uplink, done, _SERVER_COLOR, (f"{latent_name(first_step)} → {name}", name))
        for message in history.messages:
            begun = message.first_slot - 1
            stop = now if message.last_slot is None else message.last_slot
            color = self._colors[message.bits] if message.bits else _PROMPT_COLOR
            labels = (message_name(message), latent_name(message.step) if message.bits else "")
            yield _Bar("link", begun, stop, color, labels)
        first = latent_name(self._config.first_device_step)
        start, color, labels = 0, _NOISE_COLOR, (_start_name(self._config), first)
        for message in history.deliveries:
            stop = message.last_slot or 0
            yield _Bar("device", start, stop, color, labels)
            start, color = stop, self._colors[message.bits]
            labels = (message_name(message), latent_name(message.step))
        yield _Bar("device", start, min(history.slot, self._config.deadline), color, labels)

    def _set_tracks(self, history: EpisodeHistory) -> None:
        bars = [bar for bar in self._bars(history) if bar.stop > bar.start]
        corners = []
        slots_per_pixel = self._config.deadline * 1.018 / (self._tracks.bbox.width)
        used = 0
        for bar in bars:
            row = _ROWS.index(bar.row)
            bottom, top = row - _BAR_HEIGHT / 2, row + _BAR_HEIGHT / 2
            left, right = bar.start + 0.5, bar.stop + 0.5
            corners.append([(left, bottom), (left, top), (right, top), (right, bottom)])
            room = (right - left) / slots_per_pixel - 6
            label = next((label for label in bar.labels if label and self._width(label, _LABEL_SIZE) <= room), None)
            if label is not None:
                artist = self._label(used)
                artist.set_position(((left + right) / 2, row))
                artist.set_text(label)
                artist.set_color(self._contrast(bar.color))
                used += 1
        for artist in self.track_labels[used:]:
            artist.set_visible(False)
        self.track_bars.set_verts(corners)
        self.track_bars.set_facecolor([bar.color for bar in bars])
        ends = [(message.last_slot or 0) + 0.5 for message in history.deliveries]
        self.delivery_arrows.set_data(ends, [_ROWS.index("device") + 0.5] * len(ends))

    def _label(self, number: int) -> Any:
        if number == len(self.track_labels):
            self.track_labels.append(
                self._tracks.text(0, 0, "", fontsize=_LABEL_SIZE, ha="center", va="center_baseline", animated=True)
            )
        label = self.track_labels[number]
        label.set_visible(True)
        return label

    def _measure(self, text: str, size: float) -> float:
        """Return the width of a text [pixel]."""
        properties = import_extra("matplotlib.font_manager", EXTRA).FontProperties(size=size)
        renderer = self._canvas.get_renderer()
        return float(renderer.get_text_width_height_descent(text, properties, ismath=False)[0])

    def _fitting_size(self, text: str, size: float, room: float) -> float:
        """Return ``size``, or less where the text would be wider than ``room`` [pixel]."""
        return size * min(1.0, room / self._width(text, size))

    @staticmethod
    def _contrast(color: str) -> str:
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 130 else "black"

    def _set_curves(self, history: EpisodeHistory) -> None:
        rates, slot = history.rates, history.slot
        past = rates[: slot - 1]
        self.rate_bars.set_data(*_bars_with_gaps(past, first_slot=1))
        self.current_rate_bar.set_data(*_bars_with_gaps(rates[slot - 1 :], first_slot=slot))
        errors = np.maximum(history.latent_mse, self._errors.get_ylim()[0])
        ends_of_slots = np.arange(slot) + 0.5
        last = min(slot, self._config.deadline) + 0.5
        self.error_curve.set_data(np.append(ends_of_slots, last), np.append(errors, errors[-1]))
        deliveries = history.deliveries
        ends = [message.last_slot or 0 for message in deliveries]
        self.delivery_marks.set_offsets(np.array([(end + 0.5, errors[end]) for end in ends]).reshape(-1, 2))
        self.delivery_marks.set_facecolor([self._colors[message.bits] for message in deliveries])

    def _set_pictures(self, history: EpisodeHistory, pictures: Pictures) -> None:
        for artist, picture in zip(self.images, (pictures.device, pictures.clean), strict=True):
            height, width = picture.shape[:2]
            artist.set_data(picture)
            artist.set_extent((-0.5, width - 0.5, height - 0.5, -0.5))
        self._captions[0].set_text(f"device: {self._device_name(history)}")
        self._captions[1].set_text(f"clean: {latent_name(0)}")
        if pictures.prompt != self._shown_prompt:
            self._shown_prompt = pictures.prompt
            self._prompt.set_text(self._quote(pictures.prompt) if pictures.prompt else "")

    def _quote(self, prompt: str) -> str:
        """Cut a prompt to the one line under its picture; characters that the font lacks become boxes."""
        manager = import_extra("matplotlib.font_manager", EXTRA)
        font = manager.get_font(manager.findfont(_STYLE["font.family"]))
        text = "".join(c if font.get_char_index(ord(c)) else "□" for c in " ".join(prompt.split()))
        shown = f"“{text}”"
        while self._width(shown, _CAPTION_SIZE) > _PROMPT_WIDTH:
            text = text[:-1].rstrip()
            shown = f"“{text}…”"
        return shown


def _bars_with_gaps(values: NDArray[np.float64], first_slot: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return values and edges of stairs that look like bars, one a slot, whose heights are ``values[::2]``."""
    if values.size == 0:
        return np.array([0.0]), np.array([first_slot - 0.5, first_slot - 0.5])
    heights = np.full(2 * values.size - 1, np.nan)
    heights[::2] = values
    centers = first_slot + np.arange(values.size)
    edges = np.stack([centers - _BAR_WIDTH / 2, centers + _BAR_WIDTH / 2], axis=1).ravel()
    return heights, edges
