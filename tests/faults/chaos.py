"""Kills parts of a running job at random moments, starts it again, and compares its files with an undisturbed run.

    python -m tests.faults.chaos --kills 15 --seed 0
    python -m tests.faults.chaos --kills 100 --job 'diffprune run my.yaml --out {out}' --ignore 'report/*'

Each kill is a SIGKILL of an actor or task process, of the driver, or (with `--cluster`) of a whole Ray node, which
comes back after a moment. A job that completes before all kills are spent is compared and begun anew in another
folder. The job must end with status 0 by itself: a kill may cost time, never the result. Prints one JSON object;
the exit status is 0 only if every file of every round equals that of the undisturbed run byte for byte, times in
JSON files aside.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHEAP_JOB = f"{sys.executable} -m tests.faults.cheap_job --out {{out}}"

#: Keys of JSON files whose values are times, or say where something ran.
TIME_KEYS = ("seconds", "finished", "worker", "node", "time", "timings", "throughput", "started", "pairs_per_second")


#: Titles of Ray's processes that run none of our work: idle workers, and a node's own agents (the node dies with them).
NOT_WORK = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


def contents(folder: Path, ignored: list[str], keys: tuple[str, ...]) -> dict[str, bytes]:
    """Every file below `folder` by relative path; JSON without `keys`, and the folder's own name as `{out}`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or any(fnmatch.fnmatch(name, pattern) for pattern in ignored):
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            data = json.dumps(_without(json.loads(data), keys)).encode()
        if path.suffix in (".json", ".jsonl", ".yaml", ".sh", ".csv", ".md", ".html"):
            data = data.replace(str(folder).encode(), b"{out}")
        found[name] = data
    return found


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _without(child, keys) for key, child in value.items() if key not in keys}
    return [_without(child, keys) for child in value] if isinstance(value, list) else value


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """What is absent, unexpected or different."""
    return [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())),
        *(f"{name} differs" for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]),
    ]


def ray_processes(roots: set[int]) -> list[int]:
    """Actor and task processes of Ray that descend from the processes `roots`; idle workers are left out."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])

    def descends(pid: int) -> bool:
        while pid in parents:
            if pid in roots:
                return True
            pid = parents[pid]
        return False

    return sorted(
        pid
        for pid, title in titles.items()
        if title.startswith("ray::") and not title.startswith(NOT_WORK) and descends(pid)
    )


class Nodes:
    """A Ray cluster of a head without CPUs and two machines with one CPU each, all on this host.

    Its files are in a temporary folder of its own: a `Cluster` names itself in Ray's temporary folder as the one that
    a bare `ray.init()` joins, and removes that name when it ends. In the default folder other people's programs on
    this machine would join nodes that are about to be killed, and lose the name of their own cluster.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="chaos-")  # short: the paths of sockets in it are limited
        os.environ["RAY_TMPDIR"] = self._folder
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}, shutdown_at_exit=True
        )
        self._nodes = [self._add() for _ in range(2)]

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=100 << 20)

    @property
    def address(self) -> str:
        """For `RAY_ADDRESS`."""
        return str(self._cluster.address)

    def kill_one(self, generator: random.Random) -> None:
        """Take a machine away, and bring another one."""
        node = self._nodes.pop(generator.randrange(len(self._nodes)))
        self._cluster.remove_node(node, allow_graceful=False)
        time.sleep(generator.uniform(0, 3))
        self._nodes.append(self._add())

    def close(self) -> None:
        """Stop all nodes."""
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass
class Chaos:
    """One session: the job, the generator of moments and victims, and what happened."""

    job: str
    folder: Path
    generator: random.Random
    between: tuple[float, float]
    nodes: Nodes | None
    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        """Start the job, its output appended to `OUT.log`."""
        self.starts += 1
        environment = {**os.environ, "RAY_ADDRESS": self.nodes.address if self.nodes else "local"}
        with open(f"{out}.log", "ab") as log:
            return subprocess.Popen(
                shlex.split(self.job.format(out=shlex.quote(str(out)))), stdout=log, stderr=log, env=environment
            )

    def undisturbed(self) -> Path:
        """Run the job once without any kill."""
        out = self.folder / "undisturbed"
        if self.start(out).wait() != 0:
            raise SystemExit(f"the undisturbed job failed:\n{Path(f'{out}.log').read_text()[-3000:]}")
        return out

    def rounds(self, kills: int) -> Iterator[Path]:
        """Disturb the job until `kills` are spent; yields the folder of each completed run."""
        while self.kills.total() < kills:
            out = self.folder / f"round-{self.starts:04d}"
            driver = self.start(out)
            try:
                while self.kills.total() < kills and not self._ended(driver, self.generator.uniform(*self.between)):
                    driver = self._strike(driver, out)
                if driver.wait() != 0:
                    log = Path(f"{out}.log").read_text(errors="replace")[-3000:]
                    raise SystemExit(f"after {dict(self.kills)} the job failed by itself:\n{log}")
            finally:
                if driver.poll() is None:
                    driver.kill()
            yield out

    def _ended(self, driver: subprocess.Popen[bytes], seconds: float) -> bool:
        try:
            driver.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _strike(self, driver: subprocess.Popen[bytes], out: Path) -> subprocess.Popen[bytes]:
        kind = self.generator.choice(["actor", "driver", *(["node"] if self.nodes else [])])
        # A start takes longer than much of the work: three strikes in four wait for work to go on.
        if kind == "actor" or self.generator.random() < 0.75:
            while not ray_processes({os.getpid(), driver.pid}):
                if self._ended(driver, 0.3):
                    return driver
        if kind == "node" and self.nodes:
            self.nodes.kill_one(self.generator)
        elif kind == "actor":
            victims = ray_processes({os.getpid(), driver.pid})
            if not victims:
                return driver
            try:
                os.kill(self.generator.choice(victims), signal.SIGKILL)
            except ProcessLookupError:
                return driver
        else:
            driver.kill()
            driver.wait()
            driver = self.start(out)
        self.kills[kind] += 1
        return driver


def run(
    kills: int,
    seed: int,
    folder: Path,
    *,
    job: str = CHEAP_JOB,
    cluster: bool = False,
    between: tuple[float, float] = (1.0, 8.0),
    ignored: list[str] | None = None,
    ignored_keys: list[str] | None = None,
) -> dict[str, Any]:
    """Spend `kills` on `job` and report; `problems` is empty when every file came out right."""
    nodes = Nodes() if cluster else None
    try:
        chaos = Chaos(job, folder, random.Random(seed), between, nodes)
        patterns, keys = ignored or [], (*TIME_KEYS, *(ignored_keys or []))
        start = time.monotonic()
        expected = contents(chaos.undisturbed(), patterns, keys)
        calm = time.monotonic() - start
        problems: list[str] = []
        rounds = 0
        for out in chaos.rounds(kills):
            rounds += 1
            problems += [f"{out.name}: {line}" for line in differences(expected, contents(out, patterns, keys))]
        return {
            "kills": dict(sorted(chaos.kills.items())),
            "rounds": rounds,
            "starts": chaos.starts,
            "files": len(expected),
            "seconds_undisturbed": round(calm, 1),
            "seconds": round(time.monotonic() - start, 1),
            "problems": problems,
        }
    finally:
        if nodes:
            nodes.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go; must be empty")
    parser.add_argument("--job", default=CHEAP_JOB, help="a resumable command with {out} for its run folder")
    parser.add_argument("--cluster", action="store_true", help="two Ray nodes, which are killed too")
    parser.add_argument("--between", type=float, nargs=2, default=(1.0, 8.0), help="seconds between two kills")
    parser.add_argument("--ignore", action="append", default=[], help="files not compared (pattern)")
    parser.add_argument("--ignore-key", action="append", default=[], help="keys of JSON files not compared")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nodes and driver are stopped
    given.folder.mkdir(parents=True, exist_ok=True)
    report = run(
        given.kills,
        given.seed,
        given.folder,
        job=given.job,
        cluster=given.cluster,
        between=tuple(given.between),
        ignored=given.ignore,
        ignored_keys=given.ignore_key,
    )
    print(json.dumps(report, indent=2))
    sys.exit(1 if report["problems"] else 0)
