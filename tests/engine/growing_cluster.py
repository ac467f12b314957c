"""Scores fake shards on a cluster that starts with no room at all and may grow to three machines of one CPU.

    RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(openssl rand -hex 16) python -m tests.engine.growing_cluster

The machines are processes of Ray's `fake_multinode` provider, started and ended by Ray's own autoscaler. Prints one
JSON object: shards done, and how many shards each machine committed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray
import yaml

from pipeline.config import EngineConfig
from pipeline.engine.connect import connect
from pipeline.engine.scoring import score_shards
from pipeline.run import RunFolder
from tests.engine.fakes import FINGERPRINT, FakeSpec, shard_infos

MACHINES = 3

#: In the form of Ray's own example of the provider.
CLUSTER = {
    "cluster_name": "growing",
    "max_workers": MACHINES,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "small": {
            "resources": {"CPU": 1, "object_store_memory": 100_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": MACHINES,
        },
    },
    "head_node_type": "ray.head.default",
    "auth": {},
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "docker": {},
}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])


@contextmanager
def growing_cluster() -> Iterator[str]:
    """Address of a head without CPUs whose autoscaler may add `MACHINES`; all its processes end with the block."""
    tag = f"dp-grow-{secrets.token_hex(4)}"
    folder = Path(tempfile.mkdtemp(prefix=f"{tag}-", dir="/tmp"))  # short: Ray puts Unix sockets below it
    port = _free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"  # machines of their own do not take 127.0.0.1
    CLUSTER["provider"]["gcs_address"] = address  # type: ignore[index]
    (folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "DIFFPRUNE_TEST_TAG": tag,
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}/ray"]
    command += [f"--autoscaling-config={folder}/cluster.yaml", f"--object-store-memory={100_000_000}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    with open(folder / "log", "wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while "Ray runtime started" not in (folder / "log").read_text():
            if head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.5)
        yield address
    finally:
        head.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(30)
        for other in psutil.process_iter():
            with suppress(psutil.Error):
                if other.pid != os.getpid() and other.environ().get("DIFFPRUNE_TEST_TAG") == tag:
                    other.kill()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Score on the growing cluster and print what came of it."""
    folder = Path(tempfile.mkdtemp())
    shards = shard_infos(60)
    with growing_cluster() as address:
        config = EngineConfig(address=address, cpus_per_worker=1, retry_wait=0.1)
        with connect(config):
            run = RunFolder(str(folder / "run"))
            spec = FakeSpec(run, script=str(folder), seconds=1.0)
            outcome = score_shards(spec, shards, run, FINGERPRINT, config)
    lines = [line.split() for line in (folder / "log").read_text().splitlines()]
    shutil.rmtree(folder)
    print(json.dumps({"done": outcome.done, "shards_of": Counter(worker for _, _, worker in lines)}))


if __name__ == "__main__":
    main()
