"""How far a build is: TensorRT tells from 10 on. A bar where rich is there and a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Say = Callable[[str], None]
Report = Callable[[float], None]
"""Called with the part that is done, 0 … 1."""


def no_report(_: float) -> None:
    """Show nothing."""


class Phases:
    """Phases of a build, each of steps, some of which are phases of their own; several threads report."""

    def __init__(self, report: Report):
        self._report, self._lock = report, threading.Lock()
        self._steps: dict[str, tuple[str | None, int, int]] = {}  # by name: parent, steps done, steps
        self._shown = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._steps[name] = (parent, 0, max(steps, 1))

    def step(self, name: str, step: int) -> None:
        """A step, counted from 0, is done."""
        with self._lock:
            if name in self._steps:
                parent, _, steps = self._steps[name]
                self._steps[name] = (parent, step + 1, steps)
                self._tell()

    def finish(self, name: str) -> None:
        """A phase ends, maybe before its last step."""
        with self._lock:
            self._steps.pop(name, None)

    def _tell(self) -> None:
        roots = [name for name, (parent, _, _) in self._steps.items() if not parent]
        done = max((self._part(name) for name in roots), default=0.0)
        if done > self._shown:  # a bar that went back would say nothing
            self._shown = done
            self._report(done)

    def _part(self, name: str) -> float:
        _, done, steps = self._steps[name]
        inside = max(
            (self._part(child) for child, (parent, _, _) in self._steps.items() if parent == name), default=0.0
        )
        return min((done + inside) / steps, 1.0)


def monitor(trt: Any, report: Report) -> Any:
    """TensorRT's IProgressMonitor that reports; it must live as long as the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc]  # the base is there only where TensorRT is
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases(report)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.step(phase_name, step)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    return Monitor()


@contextmanager
def shown() -> Iterator[tuple[Say, Report]]:
    """Ways to say a line and to report progress, for a command."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        yield _lines()
        return
    console = Console()
    if not (sys.stdout.isatty() and console.is_terminal):
        yield _lines()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("engine", total=None)  # before 10 nobody knows how far it is
        yield (
            lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False),
            lambda part: bars.update(task, completed=part, total=1),
        )


def _lines() -> tuple[Say, Report]:
    told = 0

    def report(part: float) -> None:
        nonlocal told
        if int(part * 10) > told:
            told = int(part * 10)
            print(f"building: {told * 10} %", flush=True)

    return lambda text: print(text, flush=True), report
