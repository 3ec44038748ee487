"""Work done by other threads, ahead of who takes its results: reading while computing."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """Results in the order of ``items``, by as many threads as results are ahead.

    Args:
        work: what releases the interpreter's lock for most of its time, as reading files does.
        items: what it is given.
        most: results that exist beside the one that was yielded last, at most.
    """
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(most) as threads:
        for item in items:
            pending.append(threads.submit(work, item))
            if len(pending) > most:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
