"""Bytes that may be held at once."""

from __future__ import annotations

import threading

from mergekit_ray.evaluation.budget import Budget, Share


def test_a_budget_makes_takers_wait_but_never_the_only_one() -> None:
    budget, never = Budget(100), threading.Event()
    budget.take(500, never)  # alone: let in whatever its size
    entered = threading.Event()

    def second() -> None:
        budget.take(60, never)
        entered.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not entered.wait(0.15)
    budget.give(500)
    assert entered.wait(5)
    thread.join()
    assert budget._held == 60


def test_a_waiting_taker_is_let_go_when_the_shard_has_failed() -> None:
    budget, failed = Budget(100), threading.Event()
    budget.take(100, failed)
    thread = threading.Thread(target=budget.take, args=(1, failed))
    thread.start()
    failed.set()
    thread.join(5)
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
