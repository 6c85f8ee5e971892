"""Steps of a schedule done several at once, each in a process: one of these small networks leaves a GPU half idle."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from train.checkpoint import CheckpointError
from train.data.files import DataError
from train.reproduce import Runner, Step
from train.settings import SettingsError

log = logging.getLogger("veilcam.train")

_MISTAKES = CheckpointError, DataError, SettingsError, OSError
"""A user's, or the machine's, told in one line; what else fails a step is a bug, with its traceback."""


class JobError(RuntimeError):
    """Steps that couldn't be done, or a process that ended on its own."""


def do_at_once(steps: Sequence[Step], jobs: int, open_runner: Callable[[], Runner]) -> None:
    """Do steps as soon as what they need is done, those first that most runs wait for, and the longest of them.

    What a step that fails is needed for isn't done; everything else is, and the failures are told at the end.

    Args:
        steps: in an order in which one thing needs another; what they need beside each other is done already.
        jobs: processes.
        open_runner: called once in every process; can be pickled.

    Raises:
        JobError: some steps failed, or a process was killed.
    """
    runs = {step.name for step in steps if step.run is not None}
    waiting = sorted(steps, key=lambda step: _urgency(step, steps), reverse=True)
    done: set[str] = set()
    failed: dict[str, str] = {}
    under_way: dict[Future[None], Step] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_open, initargs=(open_runner, jobs)) as processes:
        while True:
            ready = [step for step in waiting if runs.intersection(step.needs) <= done]
            for step in ready[: jobs - len(under_way)]:
                waiting.remove(step)
                log.info("begun: %s", step.told)
                try:
                    under_way[processes.submit(_do, step)] = step
                except BrokenProcessPool:
                    if not under_way:
                        raise JobError(f"{step.told}: its process was killed before it began") from None
                    break  # those under way know of it too
            if not under_way:
                break
            killed: list[Step] = []
            for future in _ended(under_way):
                step = under_way.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    killed.append(step)
                    continue
                if error is not None:
                    failed[step.told] = f"{type(error).__name__}: {error}"
                    bug = None if isinstance(error, _MISTAKES) else error
                    log.error("failed: %s: %s", step.told, failed[step.told], exc_info=bug)
                    continue
                log.info("done: %s, %d to go", step.told, len(waiting) + len(under_way))
                if step.run is not None:
                    done.add(step.name)
            if killed:  # one process takes all others with it, and whose it was isn't told
                suspects = ", ".join(step.told for step in (*killed, *under_way.values()))
                before = f"; failed before that: {', '.join(failed)}" if failed else ""
                raise JobError(f"a process was killed (by lack of memory?), of one of these: {suspects}{before}")
    if failed:
        without = f"; {len(waiting)} more need them" if waiting else ""
        raise JobError(f"{', '.join(failed)} failed{without}")


def _ended(under_way: Iterable[Future[None]]) -> set[Future[None]]:
    """Wait for one at least; who interrupts meanwhile isn't kept waiting for the rest."""
    try:
        return wait(under_way, return_when=FIRST_COMPLETED).done
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _urgency(step: Step, steps: Sequence[Step]) -> tuple[int, int, int]:
    """How many runs wait for one, directly or not, how many measurements, and its iterations: most goes first.

    Every measurement waits for every classifier, so runs count first: a chain of them is what takes longest.
    """
    if step.run is None:
        return 0, 0, 0
    names, runs, measurements = {step.name}, 0, 0
    for other in steps:
        if names.intersection(other.needs):
            if other.run is None:
                measurements += 1
            else:
                runs += 1
                names.add(other.name)
    return runs, measurements, step.run.iterations


_runner: Runner | None = None


def _open(open_runner: Callable[[], Runner], jobs: int) -> None:
    global _runner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at a terminal it comes to all processes; who began this one ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    _runner = open_runner()


def _end_with_parent() -> None:
    """Who started this process was killed: no step must go on alone, and meet itself when it is begun anew."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(step: Step) -> None:
    assert _runner is not None
    _runner.do(step)
