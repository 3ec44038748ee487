"""Work done ahead by threads."""

import threading
from collections.abc import Iterator

import pytest

from epmq_deploy.checkpoints.prefetch import ahead


def test_results_come_in_order_and_only_so_many_are_ahead() -> None:
    given: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10):
            given.append(item)
            yield item

    for place, found in enumerate(ahead(lambda item: item * item, items(), 3)):
        assert found == place * place
        assert len(given) <= place + 4
    assert given == list(range(10))


def test_work_goes_on_while_a_result_is_used() -> None:
    second = threading.Event()
    results = ahead(lambda item: second.set() if item else None, [0, 1], 2)
    next(results)
    assert second.wait(timeout=60)


def test_one_result_ahead_is_enough_for_that() -> None:
    second = threading.Event()
    results = ahead(lambda item: second.set() if item else None, [0, 1, 2], 1)
    next(results)
    assert second.wait(timeout=60)


def test_errors_reach_who_takes_the_result() -> None:
    results = ahead(lambda item: 1 // item, [1, 0, 1], 2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
