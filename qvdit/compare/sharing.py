"""One comparison filled by several processes: what one of them makes, the others wait for or leave to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


@contextmanager
def held(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock that ``path`` stands for, until the block or the process ends; whether it is held.

    Without ``wait``, a lock that another process holds is left to it. Its file, .NAME.lock, stays beside ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
