"""Bytes that may be held at once."""

from __future__ import annotations

import threading

from mergekit_ray.evaluation.budget import Budget, Share
from support.waiting import DEADLINE_SECONDS


def test_a_budget_makes_takers_wait_but_never_the_only_one() -> None:
    class Never(threading.Event):
        """Asked for by those who wait."""

        def is_set(self) -> bool:
            waiting.set()
            return False

    budget, waiting, entered = Budget(100), threading.Event(), threading.Event()
    budget.take(500, threading.Event())  # alone: let in whatever its size

    def second() -> None:
        budget.take(60, Never())
        entered.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert waiting.wait(DEADLINE_SECONDS)
    assert not entered.is_set()
    budget.give(500)
    assert entered.wait(DEADLINE_SECONDS)
    thread.join()
    assert budget.held_bytes == 60
    assert budget.peak_bytes == 500


def test_a_waiting_taker_is_let_go_when_the_shard_has_failed() -> None:
    budget, failed = Budget(100), threading.Event()
    budget.take(100, failed)
    thread = threading.Thread(target=budget.take, args=(1, failed))
    thread.start()
    failed.set()
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()


def test_what_a_user_has_left_is_given_back_at_once() -> None:
    budget, never = Budget(100), threading.Event()
    first, second = Share(budget), Share(budget)
    first.take(30, never)
    first.take(40, never)
    second.take(20, never)
    first.give(30)
    assert budget.held_bytes == 60
    first.give_all()
    assert budget.held_bytes == 20
    first.give_all()
    assert budget.held_bytes == 20, "that of the other"
