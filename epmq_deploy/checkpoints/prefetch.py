"""Background prefetching: run work in threads ahead of the consumer."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def ahead(work: Callable[[ItemT], ResultT], items: Iterable[ItemT], most: int) -> Iterator[ResultT]:
    """Yield the results of ``work`` in the order of ``items``, computed in ``most`` threads.

    Args:
        work: a function that mostly releases the GIL, such as file I/O.
        items: its arguments.
        most: results computed ahead, in addition to the one that was yielded last, at most.
    """
    pending: deque[Future[ResultT]] = deque()
    with ThreadPoolExecutor(most) as threads:
        for item in items:
            pending.append(threads.submit(work, item))
            if len(pending) > most:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
