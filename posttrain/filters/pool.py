"""Chunks scanned by several processes, results in order. The number of processes changes only the time."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from threading import Thread

from gemma2.posttrain.data.sources import Row
from gemma2.posttrain.schemas import FilterConfig

from .criteria.contamination import EvaluationTexts
from .scan import Findings, Scanner

__all__ = ["scanned"]

Rows = Sequence[Row]

_scanners: list[Scanner] = []  # the scanner of this worker process


def scanned(
    chunks: Iterable[Rows], config: FilterConfig, evaluation: EvaluationTexts | None, workers: int
) -> Iterator[tuple[Rows, Findings]]:
    """Yield every chunk with its findings, in order; a few chunks are in memory at a time."""
    if workers == 1:
        scanner = Scanner(config, evaluation)
        yield from ((chunk, scanner.scan(chunk)) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _prepare, (config, evaluation))
    try:
        yield from _in_order(chunks, lambda chunk: pool.submit(_scan, chunk), 2 * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    chunks: Iterable[Rows], submit: Callable[[Rows], Future[Findings]], window: int
) -> Iterator[tuple[Rows, Findings]]:
    waiting: deque[tuple[Rows, Future[Findings]]] = deque()
    for chunk in chunks:
        waiting.append((chunk, submit(chunk)))
        if len(waiting) == window:
            first, future = waiting.popleft()
            yield first, future.result()
    for chunk, future in waiting:
        yield chunk, future.result()


def _prepare(config: FilterConfig, evaluation: EvaluationTexts | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers
    Thread(target=_end_with_parent, daemon=True).start()
    _scanners[:] = [Scanner(config, evaluation)]


def _scan(chunk: Rows) -> Findings:
    return _scanners[0].scan(chunk)


def _end_with_parent() -> None:
    """End this worker when its parent has died: a killed parent cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
