"""A generation of a diffusion model, really killed at random points, ends in the same bytes when it is run again.

What is killed is a fork of one process that has imported torch, so that a kill costs no import. Kill points are
drawn from all the events of a run: every sampling step and every operation on the disk, a write in its middle; and
some are moments of the clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from refine_env import TrajectoryCache
from refine_env.trajectories.midpoints import MidpointStore

from .test_writer import content

ROOT = Path(__file__).parents[2]

SCRIPT = """
import functools, json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from refine_env.trajectories import Reuse, generate_diffusers, pipeline
pipeline._load_pipeline = functools.cache(pipeline._load_pipeline)  # loaded before the forks

FOLDER, MODEL, MODE = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
PROMPTS = ["a cat", "dog", "the sun", "moon", "a red fish", "x", "y"]

class Clock:
    # Counts events, and kills its own process at one of them.
    def __init__(self, life, fraction):
        self.count, self.life, self.fraction = 0, life, fraction

    def tick(self):
        self.count += 1
        return self.count == self.life

    def watch(self, module, name):
        operation = getattr(module, name)
        def run(*args, **kwargs):
            if self.tick():
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)
        setattr(module, name, run)

    def write_bytes(self, path, data):
        torn = self.tick()
        with open(path, "wb", buffering=0) as file:
            if torn:
                file.write(data[: int(self.fraction * len(data))])
                os.kill(os.getpid(), signal.SIGKILL)
            file.write(data)

def generate(path, progress=None):
    reuse = None
    if MODE != "full":  # with a store of its own, so that the midpoints are to be made
        store = path.with_name("store-" + path.name)
        static = PROMPTS[:3] + PROMPTS[:4]
        reuse = Reuse(ratio=0.4, static_prompts=static, mode=MODE, mean_runs=2, midpoints=store, with_full=True)
    generate_diffusers(
        path, MODEL, PROMPTS, num_steps=3, batch_size=2, shard_size=2, seed=3, reuse=reuse, progress=progress
    )

def run(path, life, fraction):
    clock = Clock(life, fraction)
    for module, name in [(os, "replace"), (os, "rename"), (os, "fsync"), (Path, "unlink"), (Path, "mkdir")]:
        clock.watch(module, name)
    Path.write_bytes = lambda path, data: clock.write_bytes(path, data)
    def progress(phase, done, total):
        if clock.tick():
            os.kill(os.getpid(), signal.SIGKILL)
    generate(path, progress)
    return clock.count

def fork(path, life=0, fraction=0.5, seconds=None):
    # The signal that ended it, 0 for a natural end.
    child = os.fork()
    if child == 0:
        try:
            (FOLDER / "events").write_text(str(run(path, life, fraction)))
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return 0
    return os.WTERMSIG(status)

generate(FOLDER / "whole")
begun = time.monotonic()
assert fork(FOLDER / "cache") == 0
duration = time.monotonic() - begun
events = int((FOLDER / "events").read_text())
rng = random.Random(20261121)
lives = [[rng.randint(1 + events * k // 20, events * (k + 1) // 20)] for k in range(20)]  # spread over the run
lives += [[rng.randint(5, events // 2), rng.randint(5, events // 3)] for _ in range(2)]  # killed, and killed again
report = []
for number, points in enumerate(lives):
    path = FOLDER / f"cache{number}"
    signals = [fork(path, life, rng.random()) for life in points]
    shards = len(list(path.with_name(path.name + ".partial").glob("*.safetensors")))
    report.append([path.name, points, signals, shards, fork(path)])
for number in range(4):
    path = FOLDER / f"clock{number}"
    seconds = rng.uniform(0.1, 0.9) * duration
    report.append([path.name, [seconds], [fork(path, seconds=seconds)], None, fork(path)])
print(json.dumps({"events": events, "report": report}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("mode", ["full", "vanilla", "mean"])
def test_killed_at_random_points(tiny_model: Path, tmp_path: Path, mode: str) -> None:
    pytest.importorskip("diffusers")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), str(tiny_model), mode],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    whole = content(tmp_path / "whole")
    TrajectoryCache.open(tmp_path / "whole").verify()
    assert result["events"] > 40
    for name, points, _, _, last in result["report"]:
        assert last == 0
        assert content(tmp_path / name) == whole, f"killed at {points}"
    names = {"whole", "cache", *(name for name, *_ in result["report"])}
    stores = set() if mode == "full" else {f"store-{name}" for name in names}
    assert {entry.name for entry in tmp_path.iterdir()} == {"events", *names, *stores}
    for name in stores:
        store = MidpointStore(tmp_path / name)
        assert store.find_damage() == []
        assert {file.name for file in store.sizes()} == {
            file.name for file in MidpointStore(tmp_path / "store-whole").sizes()
        }
    by_event = [(points, signals, shards) for name, points, signals, shards, _ in result["report"] if name[1] == "a"]
    assert sum(len(points) for points, _, _ in by_event) >= 24
    assert all(signal == 9 for _, signals, _ in by_event for signal in signals)
    assert {shards for _, _, shards in by_event} >= {0, 1, 2, 3}  # some early, some late
