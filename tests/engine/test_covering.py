import itertools

import pytest

from tests.engine.covering import covering

AXES = [("a", "b", "c"), (1, 2, 3, 4), (True, False)]


def is_slow(parameters):
    return [mark.name for mark in parameters.marks] == ["slow"]


def test_every_two_values_meet_in_the_fast_suite():
    everything = covering(*AXES)
    assert [one.values for one in everything] == list(itertools.product(*AXES))
    fast = [one.values for one in everything if not is_slow(one)]
    assert 12 <= len(fast) < len(everything)
    for first, second in itertools.combinations(range(3), 2):
        assert {(values[first], values[second]) for values in fast} == set(itertools.product(AXES[first], AXES[second]))


def test_views_choose_what_has_to_meet():
    """Every value once; and each axis that is a tuple stands for several parameters."""
    views = [lambda letter, left, right: (letter,), lambda letter, left, right: (left, right)]
    everything = covering("abc", [(1, 5), (2, 6)], views=views)
    assert [one.id for one in everything] == ["a-1-5", "a-2-6", "b-1-5", "b-2-6", "c-1-5", "c-2-6"]
    fast = [one.values for one in everything if not is_slow(one)]
    assert len(fast) == 3
    assert {letter for letter, *_ in fast} == set("abc")
    assert {values[1:] for values in fast} == {(1, 5), (2, 6)}


@pytest.mark.parametrize("letter", covering("ab", views=[lambda letter: (letter,)]))
def test_the_result_parametrizes_a_test(letter):
    assert letter in "ab"
