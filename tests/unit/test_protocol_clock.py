"""Clock arithmetic: lag, the admission rule and the order of prompts."""

import pytest

from protocol.clock import ClockState, admission_limit, lag, prompt_of_ticket
from protocol.trajectory import VersionSpan


def state(**changes: int) -> ClockState:
    fields = {"version": 5, "step": 5, "epoch": 1, "groups_per_version": 4, "max_lag": 2, "base": 0, "base_version": 0}
    return ClockState(**(fields | changes))


def test_lag_is_measured_from_the_oldest_span() -> None:
    assert lag(9, (VersionSpan(0, 2, 6), VersionSpan(2, 5, 8))) == 3


def test_synchronous_training_admits_one_version_at_a_time() -> None:
    assert admission_limit(state(max_lag=0), served_version=5) == 24
    assert admission_limit(state(max_lag=0, version=6), served_version=6) == 28


def test_an_actor_that_serves_an_old_version_is_admitted_as_if_the_clock_were_old() -> None:
    assert admission_limit(state(), served_version=3) == admission_limit(state(version=3), served_version=3)


def test_an_actor_ahead_of_the_clock_gains_nothing() -> None:
    assert admission_limit(state(), served_version=99) == admission_limit(state(), served_version=5)


def test_a_rebased_clock_counts_from_its_base() -> None:
    assert admission_limit(state(base=100, base_version=5), served_version=5) == 100 + 3 * 4


@pytest.mark.parametrize("num_prompts", [1, 7, 100])
def test_every_pass_visits_every_prompt_once_in_its_own_order(num_prompts: int) -> None:
    passes = [[prompt_of_ticket(e * num_prompts + i, 3, num_prompts) for i in range(num_prompts)] for e in range(3)]
    assert all(sorted(p) == list(range(num_prompts)) for p in passes)
    if num_prompts == 100:
        assert passes[0] != passes[1] != passes[2]


def test_the_order_depends_on_the_seed_alone() -> None:
    first = [prompt_of_ticket(i, 1, 50) for i in range(100)]
    assert first == [prompt_of_ticket(i, 1, 50) for i in range(100)]
    assert first != [prompt_of_ticket(i, 2, 50) for i in range(100)]
