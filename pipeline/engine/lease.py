"""One driver per run folder: a file that it renews while it works, by which another one knows to keep away.

Object stores have no locks that all of them share, so this is a sign of life: it keeps out whoever starts while another
works, and of two that start in the same moment the one goes on whose file is there in the end.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import StageError
from pipeline.store.pulse import Pulse, read_pulse

#: Seconds between two signs of life.
EVERY = 5.0

#: Signs of life without which a driver counts as dead.
MISSED = 4


@contextmanager
def alone(url: str, say: Callable[[str], None]) -> Iterator[None]:
    """While open, this process is the one driver whose sign of life is the file `url`, which it removes at the end.

    One that is there already is watched for `EVERY * MISSED` seconds, unless its process is of this machine and gone.
    When another driver has taken the file in the same moment, this one says so by `say` and sends itself SIGTERM.

    Raises `StageError` while another driver works.
    """
    there = read_pulse(url)
    if there is not None and _works(url, there):
        raise StageError(
            f"{url}: {describe(there)} works on this folder: expected one driver at a time; wait for it, or stop it"
        )
    own = {"driver": uuid.uuid4().hex, "process": os.getpid(), **_machine()}
    pulse = Pulse(url)
    _beat(pulse, own)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(url, pulse, own, ended, say), daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(EVERY)  # storage may hang
        found = read_pulse(url)
        if found is not None and found.get("driver") == own["driver"]:
            pulse.end()


def describe(driver: dict[str, Any]) -> str:
    """Which process it is."""
    return f"process {driver.get('process')} on {driver.get('host')}"


def _renew(url: str, pulse: Pulse, own: dict[str, Any], ended: threading.Event, say: Callable[[str], None]) -> None:
    while not ended.wait(EVERY):
        other = read_pulse(url)
        if other is not None and other.get("driver") != own["driver"]:
            say(f"{describe(other)} has begun to work on this folder in the same moment: this one ends")
            os.kill(os.getpid(), signal.SIGTERM)  # SIGINT is ignored by processes that a script has in the background
            return
        _beat(pulse, own)


def _beat(pulse: Pulse, own: dict[str, Any]) -> None:
    pulse.beat({**own, "time": time.time()}, now=True)


def _works(url: str, driver: dict[str, Any]) -> bool:
    """Whether the driver that wrote this still does; takes `EVERY * MISSED` seconds where only its file can tell."""
    here = _machine()
    if {name: driver.get(name) for name in here} == here and not _is_alive(driver.get("process")):
        return False
    until = time.monotonic() + EVERY * MISSED
    while time.monotonic() < until:
        time.sleep(EVERY / 10)
        now = read_pulse(url)
        if now is None:
            return False
        if now != driver:
            return True
    return False


def _machine() -> dict[str, str]:
    """What tells machines, and containers with process numbers of their own, from each other."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [boot.read_text().strip() if boot.exists() else "", os.readlink(space) if space.is_symlink() else ""]
    return {"host": socket.gethostname(), "boot": "/".join(parts)}


def _is_alive(process: object) -> bool:
    """Whether another process of this number is there."""
    if not isinstance(process, int) or process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
