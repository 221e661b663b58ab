"""The limit on BLAS's threads lasts as long as any block that needs it, and is gone afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import permutations

import numpy as np  # loads BLAS
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from cpimerge.levelling import one_thread

assert np.ones((2, 2)).shape == (2, 2)


def counts() -> set[int]:
    """How many threads each BLAS of the process has."""
    return {int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    """A number that neither the machine nor the limit has by chance."""
    with threadpool_limits(3, user_api="blas"):
        assert counts() == {3}
        yield


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_last_to_leave_restores(order: tuple[int, ...]) -> None:
    blocks = [ExitStack() for _ in order]
    for block in blocks:
        block.enter_context(one_thread())
        assert counts() == {1}
    for number in order[:-1]:
        blocks[number].close()
        assert counts() == {1}
    blocks[order[-1]].close()
    assert counts() == {3}


def test_two_threads_at_a_time() -> None:
    seen: dict[str, set[int]] = {}
    entered, left, over = threading.Event(), threading.Event(), threading.Event()
    both = threading.Barrier(2, timeout=60)

    def first() -> None:
        with one_thread():
            entered.set()
            both.wait()
        left.set()
        assert over.wait(timeout=60)  # it lives on, and has nothing to say any more

    def second() -> None:
        assert entered.wait(timeout=60)
        with one_thread():
            both.wait()
            assert left.wait(timeout=60)
            seen["alone"] = counts()
        seen["after"] = counts()
        over.set()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"alone": {1}, "after": {3}}
    assert counts() == {3}
    with threadpool_limits(2, user_api="blas"):  # anybody can set another
        assert counts() == {2}


def test_an_error_ends_it_and_a_later_block_begins_anew() -> None:
    for number in (3, 2):
        with threadpool_limits(number, user_api="blas"):
            with pytest.raises(ZeroDivisionError):
                fail_inside()
            assert counts() == {number}


def fail_inside() -> None:
    with one_thread():
        assert counts() == {1}
        raise ZeroDivisionError
