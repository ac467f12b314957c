"""Kills parts of `diffprune run` at random moments, starts it again, and compares its files with an undisturbed run.

    python -m tests.faults.chaos --kills 16 --seed 0 --folder FOLDER

The job is small but whole: two proxy runs, four checkpoints, scores, a selection, pruned tars and the report. Each kill
is a SIGKILL of a worker (an actor or task process), of a whole Ray node, which another one replaces after a moment, or
of the driver, which is started again with the same command. The kills are spread evenly over train, directions, score
and emit and over the three kinds; the moment within a stage is random. After `--per-round` kills the job is left alone
until it ends by itself with status 0: every file must then equal that of the undisturbed run byte for byte (but for
times: `tests/faults/outputs.py`), and `diffprune verify` must have nothing to say. The next round begins anew.

One Ray cluster serves all rounds. Prints each kill as it happens, and at the end one JSON object; the exit status is 0
only if all of that held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.emit.verify import verify
from tests.faults.outputs import contents, differences
from tests.faults.victims import Nodes, kill, workers_of
from tests.helpers import Member, caption_of, image_bytes, sample_members, uid_of, write_tar

#: Where kills are aimed at, and all stages in their order.
STAGES = ("train", "directions", "score", "emit")
ORDER = ("inventory", "train", "directions", "score", "select", "emit", "report")

KINDS = ("worker", "node", "driver")

SHARDS, SAMPLES = 24, 16

#: Seconds after which a job that is left alone is held to hang.
PATIENCE = 900.0

#: Of the kills, the share that waits until some worker has work; the others hit starts and work of the driver, too.
AT_WORK = 0.8


def write_job(folder: Path) -> Path:
    """Input shards, with a pair or two to be rejected in each, and the config of the job, whose path is returned."""
    for shard in range(SHARDS):
        members: list[Member] = []
        for number in range(shard * SAMPLES, (shard + 1) * SAMPLES):
            image = image_bytes(seed=number) if number % 17 else b"no image"
            caption = caption_of(number) if number % 29 else None
            members += sample_members(f"{number:06d}", image, caption, {"uid": uid_of(number)})
        write_tar(folder / "input" / f"{shard:05d}.tar", members)
    config = {
        "out": str(folder / "run"),
        "seed": 5,
        "data": {"shards": f"{folder}/input/{{00000..{SHARDS - 1:05d}}}.tar"},
        "proxy": {
            "model": "digits-vit",
            "runs": 2,
            "steps": 120,
            "batch_size": 16,
            "lr": 1e-3,
            "num_checkpoints": 2,
            "resume_every": 10,
        },
        "target": {"pairs": 8},
        "reference": {"pairs": 8, "gradient_pairs": 16},
        "select": {"keep": 0.5},
        # Each kill counts as an attempt for the unit of work that it hits.
        "engine": {"retries": 20, "retry_wait": 0.1},
        # A tar per pair: many small tasks, so that the stage takes long enough to be hit.
        "emit": {"materialize": True, "pairs_per_shard": 1, "shuffle": True},
        "report": {"gallery": 3},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def stage_of(run: Path) -> str:
    """The stage that a job is in, from its files."""
    if not (run / "inventory.parquet").exists():
        return "inventory"
    if not (run / "checkpoints" / "trained.json").exists():
        return "train"
    if not (run / "directions" / "manifest.json").exists():
        return "directions"
    if len(list((run / "scores").glob("[0-9]*.json"))) < SHARDS:
        return "score"
    if not (run / "pruned" / "selection.json").exists():
        return "select"
    return "report" if (run / "pruned" / "emit.json").exists() else "emit"


@dataclass
class Chaos:
    """One session: the job, the cluster, the generator of moments and victims, and what happened."""

    folder: Path
    nodes: Nodes
    generator: random.Random
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    starts: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def run(self) -> Path:
        """The run folder: the same path in each round, since files name it."""
        return self.folder / "run"

    def start(self) -> subprocess.Popen[bytes]:
        """Start the job; its output goes to `job.log`."""
        self.starts += 1
        environment = {**os.environ, "RAY_ADDRESS": self.nodes.address}
        with open(self.folder / "job.log", "ab") as log:
            command = [sys.executable, "-m", "pipeline.cli", "run", str(self.folder / "job.yaml")]
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def finish(self, driver: subprocess.Popen[bytes]) -> None:
        """Wait for the job's end by itself. Raises `SystemExit` when it fails or hangs."""
        if not self._ended(driver, PATIENCE):
            driver.kill()
            self._fail(f"hangs: in {stage_of(self.run)} after {PATIENCE:.0f} seconds without any kill")
        if driver.returncode != 0:
            self._fail(f"failed by itself with status {driver.returncode}")

    def _fail(self, how: str) -> None:
        log = (self.folder / "job.log").read_text(errors="replace")[-4000:]
        raise SystemExit(f"after {self.kills.total()} kills the job {how}:\n{log}")

    def say(self, what: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"{time.monotonic() - self.began:7.1f} s  {what}", file=sys.stderr, flush=True)

    def round(self, plan: list[tuple[str, str]], seconds: dict[str, float]) -> list[tuple[str, str]]:
        """Run the job once, with the kills of `plan` (stage and kind, in the order of the stages).

        `seconds` is what each stage takes undisturbed. Returns the kills that came too late: the job had ended.
        """
        (self.folder / "job.log").unlink(missing_ok=True)
        driver = self.start()
        try:
            for place, (stage, kind) in enumerate(plan):
                at_work = self.generator.random() < AT_WORK
                delay = self.generator.uniform(0, seconds[stage] / 2)  # two kills fit in
                if not self._await(driver, stage, kind == "worker" or at_work) or self._ended(driver, delay):
                    self.finish(driver)
                    return plan[place:]
                if kind == "driver":
                    found, driver = stage_of(self.run), self._restart(driver)
                elif (hit := self._strike(driver, kind)) is None:
                    self.finish(driver)
                    return plan[place:]
                else:
                    found = hit
                self.kills[found, kind] += 1
                self.say(f"{kind} killed in {found} ({self.kills.total()})")
            self.finish(driver)
            return []
        finally:
            if driver.poll() is None:
                driver.kill()

    def _await(self, driver: subprocess.Popen[bytes], stage: str, at_work: bool) -> bool:
        """Until the job has come to `stage`, and some worker has work; False when the job ended before that."""
        while ORDER.index(stage_of(self.run)) < ORDER.index(stage) or (at_work and not self._at_work()):
            if self._ended(driver, 0.05):
                return False
        return True

    def _at_work(self) -> list[int]:
        return workers_of(os.getpid())

    def _ended(self, driver: subprocess.Popen[bytes], seconds: float) -> bool:
        """Wait that long for the job's end, and see to it that a killed node is replaced meanwhile."""
        deadline = time.monotonic() + seconds
        while True:
            self.nodes.tend()
            try:
                driver.wait(max(0.0, min(0.2, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                if time.monotonic() >= deadline:
                    return False
            else:
                return True

    def _restart(self, driver: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """Kill the driver and give the same command again."""
        driver.kill()
        driver.wait()
        return self.start()

    def _strike(self, driver: subprocess.Popen[bytes], kind: str) -> str | None:
        """Kill a worker or a node; the stage that this hit, or None when the job ended before there was a victim."""
        if kind == "node":
            found = stage_of(self.run)
            self.nodes.kill_one(self.generator)
            return found
        while driver.poll() is None:
            victims, found = self._at_work(), stage_of(self.run)
            if victims and kill(self.generator.choice(victims)):
                return found
        return None


def plan_kills(kills: int, generator: random.Random) -> list[tuple[str, str]]:
    """`kills` pairs of stage and kind: stages in turn, and within a stage all kinds as often as each other."""
    bags: dict[str, list[str]] = {stage: [] for stage in STAGES}
    plan = []
    for number in range(kills):
        stage = STAGES[number % len(STAGES)]
        if not bags[stage]:
            bags[stage] = generator.sample(KINDS, len(KINDS))
        plan.append((stage, bags[stage].pop()))
    return plan


def run(kills: int, seed: int, folder: Path, per_round: int = 8) -> dict[str, Any]:
    """Spend `kills` on the job and report; `problems` is empty when every file of every round came out right."""
    folder.mkdir(parents=True, exist_ok=True)
    write_job(folder)
    began = time.monotonic()
    nodes = Nodes()
    try:
        chaos = Chaos(folder, nodes, random.Random(seed))
        start = time.monotonic()
        chaos.finish(chaos.start())
        calm = time.monotonic() - start
        expected = contents(chaos.run)
        seconds = json.loads((chaos.run / "summary.json").read_text())["seconds"]
        problems = [f"undisturbed: {line}" for line in verify(str(chaos.run))]
        chaos.run.rename(folder / "undisturbed")
        chaos.say(f"undisturbed: {len(expected)} files in {calm:.1f} s ({seconds})")
        waiting = plan_kills(kills, chaos.generator)
        rounds = 0
        while waiting:
            now, waiting = waiting[:per_round], waiting[per_round:]
            late = chaos.round(sorted(now, key=lambda kill: STAGES.index(kill[0])), seconds)
            waiting = late + waiting
            found = [
                *differences(expected, contents(chaos.run)),
                *(f"verify: {line}" for line in verify(str(chaos.run))),
            ]
            problems += [f"round {rounds}: {line}" for line in found]
            chaos.say(f"round {rounds} ended: {len(found)} problems")
            if found:
                chaos.run.rename(folder / f"round-{rounds}")  # to look into
            else:
                shutil.rmtree(chaos.run)
            rounds += 1
        by_stage: dict[str, dict[str, int]] = {}
        for (stage, kind), count in sorted(chaos.kills.items()):
            by_stage.setdefault(stage, {})[kind] = count
        return {
            "kills": chaos.kills.total(),
            "by_stage": by_stage,
            "rounds": rounds,
            "starts": chaos.starts,
            "files": len(expected),
            "seconds_undisturbed": round(calm, 1),
            "seconds": round(time.monotonic() - began, 1),
            "problems": problems,
        }
    finally:
        nodes.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go; must not exist")
    parser.add_argument("--per-round", type=int, default=8, help="kills before the job is left alone and compared")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nodes and driver are stopped
    report = run(given.kills, given.seed, given.folder, given.per_round)
    print(json.dumps(report, indent=2))
    sys.exit(1 if report["problems"] else 0)
