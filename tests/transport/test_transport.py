"""Server and device as two processes on one socket; and what a failing peer ends in."""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import agents
import refine_env
from refine_env import ConfigurationError
from refine_env.coding.bitstream import HEADER_BYTES
from refine_env.errors import BitstreamError, MissingExtraError, TransportError, printable
from refine_env.trajectories import generate_gaussian
from refine_env.transport import Receiver, Reception, Sender
from tests.processes import assert_refused, run_module
from tests.transport import hostile
from tests.transport.hostile import frame

ROOT = Path(__file__).parents[2]
FRAME_BYTES = 13
DEVICE = """
import sys
import numpy as np
from refine_env.transport import Receiver

with Receiver(timeout=60.0) as receiver:
    print(*receiver.address, flush=True)
    for line in sys.stdin:
        reception = receiver.receive()
        np.savez(line.strip(), latent=reception.latent, deliveries=reception.deliveries,
                 held=(reception.device_step, reception.device_bits))
        print("saved", flush=True)
"""


def frames(data: bytes) -> list[tuple[int, int, bytes]]:
    found = []
    while data:
        kind, slot, length, _ = struct.unpack(">BIII", data[:FRAME_BYTES])
        found.append((kind, slot, data[FRAME_BYTES : FRAME_BYTES + length]))
        data = data[FRAME_BYTES + length :]
    return found


def make_policy(name: str, env: gym.Env[Any, Any], seed: int = 0) -> agents.Agent:
    options = {"seed": seed} if name == "random" else {}
    return agents.make(name, env.unwrapped.config, **options)  # type: ignore[attr-defined]


def simulate(env: gym.Env[Any, Any], policy: Any, seed: int) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """What the simulator says the device holds at the deadline, and the last info."""
    observation, info = env.reset(seed=seed)
    terminated = False
    while not terminated:
        observation, _, terminated, _, info = env.step(policy.select_action(observation, info))
    return env.unwrapped._process.episodes.device[0].copy(), info  # type: ignore[attr-defined]


class Reckless:
    """TRANSMIT in every slot, legal or not."""

    name = "reckless"

    def reset(self, num_envs: int = 1) -> None:
        self._slots = 0

    def check_config(self, config: refine_env.SystemConfig) -> None:
        """Acts under any configuration."""

    def select_action(self, observation: Any, info: Any) -> int:
        self._slots += 1
        return 1 + self._slots % 5


class DeviceProcess:
    """A device in another process: plays an episode whenever it is handed a file to save what came of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", DEVICE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        host, port = self._read_line().split()
        self.address = (host, int(port))

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def expect(self, name: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._folder / name}.npz\n")
        self._process.stdin.flush()

    def result(self, name: str) -> Any:
        assert self._read_line() == "saved"
        return np.load(self._folder / f"{name}.npz")

    def close(self) -> None:
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceProcess]:
    with closing(DeviceProcess(tmp_path_factory.mktemp("device"))) as process:
        yield process


@pytest.mark.parametrize(
    ("name", "snr_db", "kwargs"),
    [
        ("lookahead", 6.0, {}),
        ("lookahead", 15.0, {"decision_epochs": True}),
        ("persistent-q3", 0.0, {}),
        ("persistent-q10", 12.0, {"split": "test"}),
        ("final-only", 24.0, {}),
        ("final-only", 0.0, {}),
        ("random", 9.0, {"bit_depths": [1, 2, 5, 7, 11, 15, 16], "decision_epochs": True}),
        ("random", 3.0, {"bit_depths": [3, 6, 9, 12, 13, 14]}),
        ("lookahead", 6.5, {"warm_start": {"step": 25}}),
        ("lookahead", 7.0, {"warm_start": {"step": 25, "shared": True}}),
        ("persistent-q8", 2.0, {"coder": "closed_loop", "warm_start": {"step": 10, "shared": True, "name_bits": 99}}),
    ],
)
def test_two_processes_hold_the_simulators_latent(
    device: DeviceProcess, make_env: Callable[..., gym.Env[Any, Any]], name: str, snr_db: float, kwargs: dict[str, Any]
) -> None:
    """Bit for bit, three seeds each; the device knows nothing but what came over the socket."""
    env, twin = make_env(snr_db=snr_db, **kwargs), make_env(snr_db=snr_db, **kwargs)
    for seed in range(3):
        label = f"{name}-{snr_db:g}-{seed}"
        device.expect(label)
        sent = Sender(env, make_policy(name, env, seed)).send(device.address, seed=seed)
        received = device.result(label)
        expected, info = simulate(twin, make_policy(name, twin, seed), seed)
        assert received["latent"].dtype == np.float32
        assert received["latent"].tobytes() == sent.latent.tobytes() == expected.tobytes()
        assert received["deliveries"].tolist() == [list(delivery) for delivery in sent.deliveries]
        assert received["held"].tolist() == [sent.device_step, sent.device_bits]
        assert len(sent.deliveries) == info["num_deliveries"]
        assert sent.latent_mse == info["latent_mse"]
        assert sent.trajectory == info["trajectory"]
        clean = env.unwrapped.cache.latents(sent.trajectory)[0].ravel()  # type: ignore[attr-defined]
        assert np.mean((received["latent"] - clean.astype(float)) ** 2) == pytest.approx(sent.latent_mse, rel=1e-12)
        assert (name, snr_db) == ("final-only", 0.0) or sent.deliveries


@pytest.mark.parametrize("shared", [False, True])
def test_a_midpoint_that_the_cache_says(
    device: DeviceProcess, make_env: Callable[..., gym.Env[Any, Any]], reuse_cache: Path, shared: bool
) -> None:
    """In two processes, bit for bit; what the device starts with is handed over, the noise of the cache, too."""
    kwargs = {"cache": str(reuse_cache), "snr_db": 5.0, "warm_start": {"shared": shared}}
    env, twin = make_env(**kwargs), make_env(**kwargs)
    device.expect(f"midpoint-{shared}")
    sent = Sender(env, make_policy("lookahead", env)).send(device.address, seed=4)
    received = device.result(f"midpoint-{shared}")
    expected, info = simulate(twin, make_policy("lookahead", twin), 4)
    assert received["latent"].tobytes() == sent.latent.tobytes() == expected.tobytes()
    assert sent.deliveries[0].step <= 20
    assert sent.latent_mse == info["latent_mse"] < info["full_latent_mse"]


def test_an_illegal_transmit_sends_nothing(device: DeviceProcess, make_env: Callable[..., gym.Env[Any, Any]]) -> None:
    """A policy of no base class, which does not look at the mask."""
    device.expect("reckless")
    env = make_env(snr_db=9.0)
    sent = Sender(env, Reckless()).send(device.address, seed=0)
    policy = Reckless()
    policy.reset()
    expected, info = simulate(env, policy, 0)
    assert device.result("reckless")["latent"].tobytes() == sent.latent.tobytes() == expected.tobytes()
    assert len(sent.deliveries) == info["num_deliveries"] > 0


def test_the_command_lines(gaussian_cache: Path, make_env: Callable[..., gym.Env[Any, Any]], tmp_path: Path) -> None:
    out = tmp_path / "results" / "latent.npy"
    device = subprocess.Popen(
        [sys.executable, "-u", "-m", "refine_env.receive", "--port", "0", "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert device.stdout is not None
    port = device.stdout.readline().rpartition(":")[2].strip()
    options = ("--agent", "persistent-q8", "--port", port, "--snr-db", "9", "--seed", "4")
    server = run_module("agents.send", *options, "--cache", str(gaussian_cache))
    heard, _ = device.communicate(timeout=60)
    assert device.returncode == 0
    env = make_env(snr_db=9.0, split="test")
    expected, info = simulate(env, make_policy("persistent-q8", env), 4)
    assert np.array_equal(np.load(out), expected)
    assert f"latent MSE {info['latent_mse']:.6g}" in server.stdout
    assert server.stdout.splitlines()[:-1] == heard.splitlines()[:-1]
    assert (
        len(re.findall(r"^slot \d+: x_\d+ at 8 bits, 284 bytes$", heard, flags=re.MULTILINE)) == info["num_deliveries"]
    )


@pytest.mark.parametrize(
    ("module", "options", "code", "sentence"),
    [
        ("refine_env.receive", ["--port", "0", "--timeout", "0.1"], 3, "A server must be heard of within 0.1 s"),
        ("refine_env.receive", ["--port", "0", "--timeout", "-1"], 2, "`timeout` must be > 0, got -1.0"),
        ("agents.send", ["--agent", "nobody"], 2, "`name` must be one of .* got 'nobody'"),
        ("agents.send", ["--cache", "/nowhere/at/all"], 3, "/nowhere/at/all"),
        ("agents.send", ["--port", "1"], 3, "The device at 127.0.0.1:1 must be listening"),
    ],
)
def test_command_lines_fail_in_one_sentence(
    gaussian_cache: Path, module: str, options: list[str], code: int, sentence: str
) -> None:
    cache = ["--cache", str(gaussian_cache)] if module == "agents.send" and "--cache" not in options else []
    assert_refused(run_module(module, *cache, *options), code, sentence)


@contextmanager
def peer(act: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """Another device: listens in a thread, does ``act`` with the connection, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                act(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()
        finally:
            thread.join(timeout=30)
            assert not thread.is_alive()


def read_all(connection: socket.socket, deadline: int, answer: bytes) -> bytes:
    """Everything that a sender sends up to the deadline's slot; then answer."""
    data = b""
    while True:
        data += connection.recv(1 << 16)
        try:
            if frames(data)[-1][1] == deadline and len(b"".join(frame(*f) for f in frames(data))) == len(data):
                break
        except struct.error:
            continue
    connection.sendall(answer)
    return data


@pytest.fixture(scope="module")
def recorded(gaussian_cache: Path) -> tuple[bytes, Reception]:
    """All that a sender sends in an episode of several deliveries, and what a device makes of it."""
    env = gym.make(refine_env.ENV_ID, cache=str(gaussian_cache), snr_db=12.0)
    data = record(env, "persistent-q4", seed=1)
    reception = play(data)
    assert len(reception.deliveries) > 5
    return data, reception


def record(env: gym.Env[Any, Any], policy: str, *, seed: int) -> bytes:
    """All that a sender sends in an episode, to a device that answers with another digest."""
    recording: list[bytes] = []
    with (
        peer(lambda connection: recording.append(read_all(connection, 60, frame(4, 60, b"\0" * 32)))) as address,
        pytest.raises(TransportError, match="The device must hold the latent that the simulator says, got a digest"),
    ):
        Sender(env, make_policy(policy, env)).send(address, seed=seed)
    return recording[0]


def play(data: bytes, *, timeout: float = 5.0, hang_up: bool = True) -> Reception:
    """A receiver whose sender sends just that and, unless told otherwise, hangs up."""
    with Receiver(timeout=timeout) as receiver, socket.create_connection(receiver.address) as connection:
        connection.sendall(data)
        if hang_up:
            connection.shutdown(socket.SHUT_WR)
        return receiver.receive()


@pytest.mark.parametrize(
    ("latent_dim", "decision_epochs", "start"),
    [
        (256, False, None),
        (256, True, None),
        (61, False, None),
        (256, False, {"step": 30, "shared": True}),
        (256, True, {"step": 30, "shared": False}),
    ],
)
def test_every_slot_carries_the_bytes_that_flowed(
    tmp_path: Path, latent_dim: int, decision_epochs: bool, start: dict[str, Any] | None
) -> None:
    """After each step, of the message in flight: the header and ⌊bits/8⌋ bytes; all of them when it is delivered.

    Where the device begins with a midpoint, the first message has four bytes more.
    """
    generate_gaussian(tmp_path / "cache", num_trajectories=2, latent_shape=(1, 1, latent_dim), num_steps=50, seed=0)
    env = gym.make(
        refine_env.ENV_ID,
        cache=str(tmp_path / "cache"),
        snr_db=3.0,
        decision_epochs=decision_epochs,
        warm_start=start,
    )
    config = env.unwrapped.config  # type: ignore[attr-defined]
    kinds = frames(record(env, "random", seed=5))
    assert [kind for kind, _, _ in kinds[:3]] == [1, 2, 3]
    system = json.loads(kinds[0][2])
    assert system == {"protocol": 2, "config": config.to_dict()}
    policy, episodes = make_policy("random", env), env.unwrapped._process.episodes  # type: ignore[attr-defined]
    observation, info = env.reset(seed=5)
    shared = start is not None and start["shared"]
    noise = env.unwrapped.cache.latents(info["trajectory"])[30 if shared else -1]  # type: ignore[attr-defined]
    assert kinds[1][2] == noise.astype(">f2").tobytes()
    arrived, unfinished = 0, 0
    for _, slot, piece in kinds[2:]:
        observation, _, terminated, _, info = env.step(policy.select_action(observation, info))
        assert slot == observation["slot"] - 1
        state = episodes.state[0]
        arrived += len(piece)
        if info["delivered"]:
            name = 4 if shared and state["num_deliveries"] == 1 else 0
            assert arrived == HEADER_BYTES + name + math.ceil(config.latent_dim * state["device_bits"] / 8)
            arrived = 0
        elif state["message_bits"] > 0:
            assert arrived == HEADER_BYTES + math.floor(state["message_sent"] / 8)
            unfinished += 1
        else:
            assert piece == b""
    assert terminated
    assert unfinished > (0 if decision_epochs else 10)


def test_a_device_decodes_what_was_recorded(recorded: tuple[bytes, Reception]) -> None:
    data, reception = recorded
    again = play(data)
    assert again.latent.tobytes() == reception.latent.tobytes()
    assert again.config.latent_dim == again.latent.size


def test_a_message_in_flight_at_the_deadline_does_not_count(recorded: tuple[bytes, Reception]) -> None:
    """The last slot's frame emptied: the device holds what the delivery before left."""
    data, reception = recorded
    pieces = frames(data)
    last = reception.deliveries[-1].slot
    cut = [f if f[0] != 3 or f[1] < last else (3, f[1], b"") for f in pieces]
    shortened = play(b"".join(frame(*f) for f in cut))
    assert shortened.deliveries == reception.deliveries[:-1]
    assert shortened.device_step == reception.deliveries[-2].step


def change_config(data: bytes, **changes: Any) -> bytes:
    (kind, slot, system), *rest = frames(data)
    values = json.loads(system)
    values["config"].update(changes)
    return b"".join(frame(*f) for f in [(kind, slot, json.dumps(values).encode()), *rest])


def replace(data: bytes, position: int, *changed: tuple[int, int, bytes]) -> bytes:
    found = frames(data)
    found[position : position + 1] = changed
    return b"".join(frame(*f) for f in found)


def first_piece(data: bytes) -> int:
    return next(i for i, f in enumerate(frames(data)) if f[0] == 3 and f[2])


def spoil_piece(data: bytes, spoil: Callable[[bytes], bytes]) -> bytes:
    position = first_piece(data)
    kind, slot, piece = frames(data)[position]
    return replace(data, position, (kind, slot, spoil(piece)))


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (lambda d: b"", TransportError, "The server must stay connected to the end .* got a closed connection"),
        (lambda d: d[:5], TransportError, "must stay connected"),
        (lambda d: d[:-1], TransportError, "must stay connected"),
        (lambda d: d[: len(d) // 2], TransportError, "must stay connected"),
        (lambda d: b"GET / HTTP/1.1\r\n\r\n", TransportError, r"must be of kind 1 \(system\), got 71"),
        (lambda d: replace(d, 0), TransportError, r"must be of kind 1 \(system\), got 2"),
        (lambda d: replace(d, 1), TransportError, r"must be of kind 2 \(noise\), got 3"),
        (lambda d: d[:20] + b"#" + d[21:], TransportError, r"kind 1 \(system\) must have the CRC-32 that it says"),
        (lambda d: replace(d, 0, (1, 0, b"")), TransportError, "must have 1 … 4194304 bytes here, got 0"),
        (lambda d: struct.pack(">BII", 1, 0, 1 << 23) + d[9:], TransportError, "1 … 4194304 bytes here, got 8388608"),
        (lambda d: replace(d, 0, (1, 0, b"hello")), TransportError, "must be a JSON object with `protocol`"),
        (lambda d: replace(d, 0, (1, 0, b"[]")), TransportError, r"must be a JSON object .* \(TypeError\)"),
        (lambda d: replace(d, 0, (1, 0, b"[" * 65000)), TransportError, "must be a JSON object with `protocol`"),
        (lambda d: replace(d, 0, (1, 0, b"\xff\xfe{")), TransportError, "must be a JSON object with `protocol`"),
        (
            lambda d: replace(d, 0, (1, 0, b'{"protocol": 9, "config": {}}')),
            TransportError,
            "`protocol` must be 2, got 9",
        ),
        (
            lambda d: replace(d, 0, (1, 0, b'{"protocol": 2, "config": {}}')),
            TransportError,
            "`config` must describe a system",
        ),
        (lambda d: change_config(d, coder="psychic"), TransportError, "`coder` must be one of .* got 'psychic'"),
        (lambda d: change_config(d, snr_db=10**400), TransportError, "`config` must describe a system"),
        (lambda d: change_config(d, link=[1]), TransportError, "`link` must be an object"),
        (lambda d: change_config(d, latent_dim=10**12), TransportError, "at most 1048576 at this device, got 10{12}"),
        (lambda d: change_config(d, latent_dim=10**99), TransportError, "`config` must describe a .*`latent_dim`"),
        (lambda d: change_config(d, latent_dim=512), TransportError, "must have 1024 bytes here, got 512"),
        (
            lambda d: change_config(d, schedule={"alpha_bar": np.geomspace(1.0, 5e-324, 9).tolist()}),
            TransportError,
            r"`config` must describe a system, got one that does not \(overflow encountered",
        ),
        (lambda d: replace(d, 1, (2, 0, b"\0" * 510)), TransportError, "must have 512 bytes here, got 510"),
        (lambda d: replace(d, 1, (2, 0, b"\x7c\x00" * 256)), BitstreamError, "`noise` must be finite"),
        (lambda d: replace(d, 2, (3, 0, b"")), TransportError, "slot of a frame must be in 1 … 60, got 0"),
        (lambda d: replace(d, 2, (3, 61, b"")), TransportError, "slot of a frame must be in 1 … 60, got 61"),
        (lambda d: replace(d, 3, (3, 1, b"")), TransportError, "slot of a frame must be in 2 … 60, got 1"),
        (lambda d: replace(d, 2, (3, 1, b"\0" * 541)), TransportError, "must have 0 … 540 bytes here, got 541"),
        (lambda d: spoil_piece(d, lambda p: b"JPEG" + p[4:]), BitstreamError, "must begin with b'RFNL', got b'JPEG'"),
        (
            lambda d: spoil_piece(d, lambda p: p[:16] + b"\x00\xff\xff\xff" + p[20:]),
            BitstreamError,
            "must have at most 540 bytes in this system, got 16777243",
        ),
        (lambda d: spoil_piece(d, lambda p: p[:-1]), BitstreamError, "must have the CRC-32|must have the 156 bytes"),
        (lambda d: spoil_piece(d, lambda p: p + b"\0"), BitstreamError, "must have the CRC-32|must have the 156 bytes"),
    ],
)  # fmt: skip
def test_a_bad_sender_ends_in_one_sentence(
    recorded: tuple[bytes, Reception], spoil: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        play(spoil(recorded[0]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_on_the_way_never_yields_another_latent(recorded: tuple[bytes, Reception], data: st.DataObject) -> None:
    good, _ = recorded
    bad = bytearray(good)
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    where = data.draw(st.integers(0, len(good) - 1))
    if kind == "flip":
        for position in data.draw(st.sets(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=8)):
            bad[position // 8] ^= 1 << position % 8
    elif kind == "cut":
        del bad[where : where + data.draw(st.integers(1, 200))]
    else:
        bad[where:where] = data.draw(st.binary(min_size=1, max_size=50))
    with pytest.raises((TransportError, BitstreamError), match=r"\. "):
        play(bytes(bad))


@settings(max_examples=60)
@given(data=st.binary(max_size=400))
def test_a_device_refuses_random_bytes(data: bytes) -> None:
    with pytest.raises(TransportError, match=r"\. "):
        play(data)


@contextmanager
def at_most_megabytes(most: float) -> Iterator[None]:
    """What is allocated at a time, beyond what was before."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most * 1e6
    finally:
        tracemalloc.stop()


def test_hostile_senders_end_in_one_sentence() -> None:
    """Each stream in a sentence or a finite latent, in bounded memory; of 10,000 see :mod:`tests.transport.hostile`."""
    ends = set()
    with Receiver(timeout=10.0) as receiver:
        for number in range(300):
            data = hostile.malformed(np.random.default_rng([0, number]))
            with at_most_megabytes(64.0):
                ends.add(type(hostile.outcome(receiver, data)))
    assert ends == {Reception, TransportError, BitstreamError}


@pytest.mark.parametrize("coder", ["forward", "closed_loop"])
def test_a_long_schedule_is_refused_before_anything_is_built(coder: str) -> None:
    """60 kB of JSON; one matrix of that order has 72 MB, and a coder has a dozen."""
    good = hostile.session(np.random.default_rng(0))
    schedule = {"alpha_bar": np.linspace(1.0, 0.1, 3001).tolist()}
    config = good.config | {"coder": coder, "schedule": schedule, "payload": "latent", "second_moments": None}
    config["entropy_coding"] = False
    data = b"".join(frame(*one) for one in good._replace(config=config).frames())
    with Receiver() as receiver, at_most_megabytes(8.0):
        end = hostile.outcome(receiver, data)
    assert str(end) == (
        "`num_steps` must be at most 1000 at this device, got 3000. Raise the receiver's `max_num_steps` if it is "
        "meant to be so large."
    )


@pytest.mark.parametrize(("name", "value"), [("max_num_steps", 8), ("max_latent_dim", 256)])
def test_a_receiver_takes_what_it_is_told_to(name: str, value: int) -> None:
    good = hostile.session(np.random.default_rng(0))
    data = b"".join(frame(*one) for one in good.frames())
    with Receiver(**{name: value}) as receiver:  # type: ignore[arg-type]
        assert isinstance(hostile.outcome(receiver, data), Reception)
    with Receiver(**{name: value - 1}) as receiver:  # type: ignore[arg-type]
        assert f"must be at most {value - 1} at this device, got {value}." in str(hostile.outcome(receiver, data))


@pytest.mark.parametrize(
    "value",
    [hostile.ESCAPES * 1000, [hostile.ESCAPES] * 1000, {hostile.ESCAPES: 1}, 10**4000],
    ids=["text", "list", "object", "number"],
)
def test_what_a_sender_wrote_is_shown_short_and_escaped(value: Any) -> None:
    """In every field of its system, and where it has fields of its own, in these."""
    good = hostile.session(np.random.default_rng(0))
    configs = [good.config | {name: value} for name in (*good.config, hostile.ESCAPES)]
    configs += [good.config | {"link": good.config["link"] | {name: value}} for name in good.config["link"]]
    configs += [good.config | {"schedule": {"alpha_bar": value}}]
    with Receiver() as receiver:
        for config in configs:
            system = {"protocol": 2, "config": config}
            assert isinstance(
                hostile.outcome(receiver, frame(1, 0, json.dumps(system).encode())), TransportError
            )  # which also says how long it may be
        hostile.outcome(receiver, frame(1, 0, json.dumps({"protocol": value}).encode()))
        hostile.outcome(receiver, frame(1, 0, json.dumps({"protocol": value, "config": 1}).encode()))


def test_printable() -> None:
    assert printable("naïve – ŷ") == "naïve – ŷ"
    assert printable("\x1b[2J\u202e\ud800\n") == r"\x1b[2J\u202e\ud800\n"
    assert printable("a" * 200) == "a" * 200
    assert printable("a" * 201) == "a" * 199 + "…"
    assert printable("\0" * 100, 40) == r"\x00" * 9 + r"\x0…"


def test_an_episode_has_an_end(recorded: tuple[bytes, Reception]) -> None:
    """Of a sender whose frames all come in time, and that has 100,000 of them."""
    system, noise, *_ = frames(change_config(recorded[0], deadline=100_000))
    with Receiver(timeout=5.0, episode_timeout=0.3) as receiver:

        def send(connection: socket.socket) -> None:
            with contextlib.suppress(ConnectionError):
                connection.sendall(frame(*system) + frame(*noise))
                for slot in range(1, 100):
                    time.sleep(0.02)
                    connection.sendall(frame(3, slot, b""))

        with socket.create_connection(receiver.address) as connection:
            thread = threading.Thread(target=send, args=(connection,))
            thread.start()
            with pytest.raises(
                TransportError, match=r"The server must complete the episode within 0\.3 s, got one that"
            ):
                receiver.receive()
            thread.join()


def entropy_coded() -> bytes:
    """A session whose messages are entropy-coded."""
    sessions = (hostile.session(np.random.default_rng(seed)) for seed in range(100))
    good = next(one for one in sessions if one.config["entropy_coding"])
    return b"".join(frame(*one) for one in good.frames())


def test_a_device_without_the_entropy_coder(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so before it takes a message, and hangs up; the next sender is served."""
    data, plain = entropy_coded(), b"".join(frame(*one) for one in hostile.session(np.random.default_rng(0)).frames())
    monkeypatch.setitem(sys.modules, "constriction", None)
    with Receiver() as receiver:
        with socket.create_connection(receiver.address) as connection:
            connection.sendall(data[: data.index(b"RFNL")])
            with pytest.raises(MissingExtraError, match="`constriction` must be installed for this"):
                receiver.receive()
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""
        assert isinstance(hostile.outcome(receiver, plain), Reception)


def test_the_command_line_without_the_entropy_coder() -> None:
    program = (
        "import sys, typer; sys.modules['constriction'] = None; from refine_env.receive import main; typer.run(main)"
    )
    device = subprocess.Popen(
        [sys.executable, "-u", "-c", program, "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert device.stdout is not None
    port = int(device.stdout.readline().rpartition(":")[2])
    with hostile.sending(("127.0.0.1", port), entropy_coded()):
        _, complaint = device.communicate(timeout=60)
    assert device.returncode == 4
    assert complaint.startswith("error: `constriction` must be installed")
    assert "Traceback" not in complaint


def test_a_sender_that_falls_silent(recorded: tuple[bytes, Reception]) -> None:
    with pytest.raises(TransportError, match=r"The server must be heard of within 0\.2 s, got nothing complete"):
        play(recorded[0][:-1], timeout=0.2, hang_up=False)


def test_a_sender_that_trickles() -> None:
    """A frame has to be whole in time: a byte now and then keeps no device waiting."""
    with Receiver(timeout=0.3) as receiver, socket.create_connection(receiver.address) as connection:

        def trickle() -> None:
            with contextlib.suppress(ConnectionError):
                connection.sendall(frame(1, 0, b" " * 1000)[:-900])
                for _ in range(900):  # to the end of the frame, which is refused for another reason
                    time.sleep(0.01)
                    connection.sendall(b" ")

        thread = threading.Thread(target=trickle)
        thread.start()
        with pytest.raises(TransportError, match=r"The server must be heard of within 0\.3 s, got nothing complete"):
            receiver.receive()
        thread.join()


def test_nobody_comes() -> None:
    with (
        Receiver(timeout=0.1) as receiver,
        pytest.raises(TransportError, match=r"A server must be heard of within 0\.1 s"),
    ):
        receiver.receive()


def test_a_device_goes_on_after_a_bad_sender(recorded: tuple[bytes, Reception]) -> None:
    data, reception = recorded
    with Receiver(timeout=5.0) as receiver:
        with socket.create_connection(receiver.address) as connection:
            connection.sendall(b"nonsense, and no end of it")
        with pytest.raises(TransportError, match="must be of kind 1"):
            receiver.receive()
        with socket.create_connection(receiver.address) as connection:
            connection.sendall(data)
            assert receiver.receive().latent.tobytes() == reception.latent.tobytes()


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda c: None, "must stay connected to the end of the episode, got a closed connection"),
        (lambda c: c.recv(3000), "must stay connected to the end"),
        (lambda c: read_all(c, 60, b"\x04\0\0"), "must stay connected to the end"),
        (lambda c: read_all(c, 60, b"HTTP/1.1 400 Bad Request\r\n"), r"must be of kind 4 \(digest\), got 72"),
        (lambda c: read_all(c, 60, frame(4, 60, b"\0" * 31)), r"kind 4 \(digest\) must have 32 bytes here, got 31"),
        (lambda c: (read_all(c, 60, b""), time.sleep(0.8)), "must be heard of within 0.4 s"),
    ],
)
def test_a_bad_device_ends_in_one_sentence(
    make_env: Callable[..., gym.Env[Any, Any]], act: Callable[[socket.socket], None], sentence: str
) -> None:
    env = make_env(snr_db=6.0)
    with peer(act) as address, pytest.raises(TransportError, match=sentence):
        Sender(env, make_policy("persistent-q3", env), timeout=0.4).send(address, seed=0)


def test_no_device(make_env: Callable[..., gym.Env[Any, Any]]) -> None:
    env = make_env()
    sender = Sender(env, make_policy("persistent-q3", env), timeout=1.0)
    with Receiver() as receiver:
        address = receiver.address
    with pytest.raises(TransportError, match=r"The device at 127\.0\.0\.1:\d+ must be listening, got a refusal"):
        sender.send(address)
    with pytest.raises(TransportError, match="must be reachable, got .* Check host and port"):
        sender.send(("no-such-host.invalid", 1))
    with pytest.raises(ConfigurationError, match="`port` must be an integer in 1 … 65535, got 65541"):
        sender.send(("127.0.0.1", 65541))


def test_addresses_that_cannot_be_listened_at() -> None:
    with Receiver() as first, pytest.raises(TransportError, match="must be an address to listen at, got 127.0.0.1:"):
        Receiver(*first.address)
    with pytest.raises(TransportError, match="must be an address to listen at, got no-such-host.invalid:0"):
        Receiver("no-such-host.invalid")
    with pytest.raises(ConfigurationError, match="`port` must be an integer in 0 … 65535, got 99999"):
        Receiver(port=99999)
    with pytest.raises(ConfigurationError, match="`timeout` must be > 0, got 0"):
        Receiver(timeout=0)
    with pytest.raises(ConfigurationError, match="`episode_timeout` must be a finite number, got inf"):
        Receiver(episode_timeout=math.inf)
    with pytest.raises(ConfigurationError, match="`max_latent_dim` must be an integer in 1 … 2147483647, got 0"):
        Receiver(max_latent_dim=0)
    with pytest.raises(ConfigurationError, match="`max_num_steps` must be an integer in 1 … 65535, got 65536"):
        Receiver(max_num_steps=65536)


def test_senders_that_cannot_be(make_env: Callable[..., gym.Env[Any, Any]]) -> None:
    env = make_env(snr_db=6.0)
    with pytest.raises(ConfigurationError, match="`env` must be a LatentRefinementEnv, got CartPoleEnv"):
        Sender(gym.make("CartPole-v1"), make_policy("persistent-q3", env))
    with pytest.raises(ConfigurationError, match="`config` must be the one that persistent-q3 was made for"):
        Sender(env, make_policy("persistent-q3", make_env(snr_db=7.0)))
    with pytest.raises(ConfigurationError, match="`timeout` must be a finite number"):
        Sender(env, make_policy("persistent-q3", env), timeout=math.inf)
