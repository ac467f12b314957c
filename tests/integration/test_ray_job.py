"""`ray job submit` of `jobs.prune` on a head node with token authentication, and the metrics that it exports."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from pipeline.config import dump_config
from pipeline.emit.verify import verify
from tests.helpers import Member, image_bytes, sample_members, write_tar
from tests.infra.test_monitoring import expressions, names_in
from tests.integration.runs import small_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 240
LABEL = re.compile(r'[{,](\w+)="')


@dataclass
class Head:
    """A Ray head node of this test's own: its dashboard, its Prometheus endpoint, the environment of its users."""

    dashboard: str
    metrics: str
    environment: dict[str, str]
    folder: str

    def submit(
        self, *arguments: str, module: str = "jobs.prune", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """What README shows: `ray job submit` of `jobs.prune` from the project's root."""
        command = [_bin("ray"), "job", "submit", "--address", self.dashboard, "--working-dir", "."]
        return subprocess.run(
            [*command, "--", "python", "-m", module, *arguments],
            cwd=ROOT,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


def _bin(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def _stop(process: subprocess.Popen[bytes], folder: str) -> None:
    """End the head and whatever it started: its processes carry the name of its folder, which no others do."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    for other in psutil.process_iter(["cmdline"]):
        if any(folder in argument for argument in other.info["cmdline"] or ()):
            with suppress(psutil.NoSuchProcess):
                other.kill()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # A short path: Ray puts Unix sockets below it.
    folder = tempfile.mkdtemp(prefix="dp-job-", dir="/tmp")
    gcs, dashboard, metrics, client = _free_ports(4)
    (Path(folder) / ".ray").mkdir()
    (Path(folder) / ".ray" / "auth_token").write_text(secrets.token_hex(16))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": folder,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [_bin("ray"), "start", "--head", "--block", f"--port={gcs}", "--node-ip-address=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}"]
    command += [f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--dashboard-agent-listen-port=0", "--num-cpus=2", f"--temp-dir={folder}/ray"]
    command += [f"--object-store-memory={128 << 20}"]
    with open(Path(folder) / "head.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    found = Head(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", environment, folder)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{found.dashboard}/api/version"):
            assert process.poll() is None, (Path(folder) / "head.log").read_text()
            assert time.monotonic() < deadline, "the head did not start"
            time.sleep(0.5)
        yield found
    finally:
        _stop(process, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    """Whether somebody listens: an answer that asks for the token is one, too."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


class MetricsWatch(threading.Thread):
    """Reads a Prometheus endpoint while something runs; remembers the largest value of each series of ours that begins
    then (each has the id of a process), and of all of Ray's."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.values: dict[str, float] = {}
        self.ended = threading.Event()
        self.earlier = {series for series in self._read() if series.startswith("ray_diffprune")}

    def run(self) -> None:
        while not self.ended.wait(0.5):
            for series, value in self._read().items():
                if series not in self.earlier:
                    self.values[series] = max(value, self.values.get(series, 0.0))

    def _read(self) -> dict[str, float]:
        try:
            with urllib.request.urlopen(self.url, timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        return {series: float(value) for series, value in re.findall(r"^(ray_\w+\{.*\}) (\S+)$", text, re.MULTILINE)}

    def labels(self, name: str) -> set[str]:
        """The labels of a metric's series."""
        return {label for series in self.values if series.startswith(f"{name}{{") for label in LABEL.findall(series)}

    def total(self, name: str, **labels: str) -> float:
        """Sum of the series of a metric that have these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for series, value in self.values.items()
            if series.startswith(f"{name}{{") and all(part in series for part in wanted)
        )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Absolute paths, as a job runs in a folder of its own. Three shards of eight pairs, two of which are bad."""
    folder = tmp_path_factory.mktemp("shards")
    paths = []
    for shard in range(3):
        members: list[Member] = []
        for number in range(8 * shard, 8 * shard + 8):
            image = b"no image at all" if number == 3 else image_bytes(seed=number)
            members += sample_members(f"{number:06d}", image, None if number == 12 else f"a thing called {number}")
        paths.append(write_tar(folder / f"{shard:05d}.tar", members))
    return paths


def test_a_submitted_job_runs_to_the_end_and_counts_on_the_endpoint(
    head: Head, shards: list[str], tmp_path: Path
) -> None:
    out, config = tmp_path / "run", tmp_path / "job.yaml"
    config.write_text(dump_config(small_config(shards, out)))
    watch = MetricsWatch(head.metrics)
    watch.start()
    done = head.submit("--config", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    counts = json.loads((out / "summary.json").read_text())["counts"]
    assert (counts["in"], counts["kept"], counts["rejected"]) == (24, 11, 2)
    assert (out / "report" / "index.html").exists()
    assert verify(str(out)) == []

    # Processes report every few seconds, and once more when they end.
    deadline = time.monotonic() + 60
    while watch.total("ray_diffprune_pairs_total") < 24 and time.monotonic() < deadline:
        time.sleep(0.5)
    watch.ended.set()
    assert watch.total("ray_diffprune_pairs_total") == 24
    assert watch.total("ray_diffprune_shards_total") == 3
    assert watch.total("ray_diffprune_rejected_total", reason="corrupt-image") == 1
    assert watch.total("ray_diffprune_rejected_total", reason="no-caption") == 1
    for phase in ("load", "waiting", "score", "commit"):
        assert watch.total("ray_diffprune_phase_seconds_count", phase=phase) == 3


def documented() -> dict[str, set[str]]:
    """The metrics of docs/operations.md as they appear on the endpoint, with their labels."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "docs" / "operations.md").read_text().splitlines():
        if line.startswith("| `ray_diffprune"):
            _, names, labels, _, _ = line.split("|")
            name, *suffixes = re.findall(r"`(\w+)`", names)
            found.update({name + suffix: set(re.findall(r"`(\w+)`", labels)) for suffix in suffixes or [""]})
    return found


def test_every_metric_that_is_documented_or_drawn_is_on_the_endpoint(head: Head, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.mkdir()
    (script / "raise-3").touch()
    (script / "kill-7").touch()
    watch = MetricsWatch(head.metrics)
    watch.start()
    arguments = ["--out", str(tmp_path / "run"), "--script", str(script), "--shards", "20", "--retries", "1"]
    done = head.submit(*arguments, module="tests.faults.cheap_job")
    assert "2 of 20 shards failed" in done.stdout, done.stdout + done.stderr
    deadline = time.monotonic() + 60
    while watch.total("ray_diffprune_failed_shards_total") < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    watch.ended.set()

    table = documented()
    assert len(table) == 8
    for name, labels in table.items():
        assert labels <= watch.labels(name), name
    assert watch.total("ray_diffprune_failed_shards_total") == 2
    assert watch.total("ray_diffprune_worker_deaths_total") in (1, 2)  # alone, or first beside other shards
    # A worker that is killed takes what it has not reported yet with it.
    shards = watch.total("ray_diffprune_shards_total")
    assert 1 <= shards <= 18
    assert watch.total("ray_diffprune_pairs_total") == 20 * shards
    assert watch.total("ray_diffprune_rejected_total", reason="no-image") == 2 * shards
    for phase in ("load", "waiting", "score", "commit"):
        assert watch.total("ray_diffprune_phase_seconds_count", phase=phase) == shards
        assert watch.total("ray_diffprune_phase_seconds_bucket", phase=phase, le="+Inf") == shards
    assert watch.total("ray_diffprune_phase_seconds_sum", phase="score") >= 0.1 * shards
    drawn = {name for expression in expressions() for name in names_in(expression)}
    assert {name for name in drawn if not watch.labels(name)} == {"ray_node_gpus_utilization"}, "no GPU here"


def test_the_list_of_nodes_for_prometheus_names_the_endpoint(head: Head) -> None:
    listed = json.loads((Path(head.folder) / "ray" / PROMETHEUS_SERVICE_DISCOVERY_FILE).read_text())
    targets = [target for entry in listed for target in entry["targets"]]
    assert any(target.endswith(f":{urlsplit(head.metrics).port}") for target in targets)


def test_a_config_error_fails_the_job_with_its_one_line(head: Head, shards: list[str], tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(dump_config(small_config(shards, tmp_path / "run")))
    done = head.submit("--config", str(config), "--set", "select.keep=1.5")
    assert done.returncode == 1
    assert "Job entrypoint command failed with exit code 2" in done.stdout
    after = done.stdout.split("Running entrypoint for job", 1)[1].splitlines()
    assert after[1] == f"error: {config}: select.keep: expected a fraction in (0, 1], found 1.5"
    assert "failed" in after[3]
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_nobody_submits_without_the_token(head: Head) -> None:
    done = head.submit("--config", "none.yaml", RAY_AUTH_MODE="disabled")
    assert done.returncode != 0
    assert "Missing authentication token" in done.stderr
