"""The simulation of many GPUs, where the answer is known."""

import pytest

from tests.benchmarks.fleet import Fleet, simulate

EQUAL = Fleet(pictures=6400, gpus=8, spread=0.0, slow=0.0, load=0.0, hours_between_deaths=1e9)


@pytest.mark.parametrize("block", [None, 1, 10])
def test_equal_gpus_without_faults_lose_no_time(block):
    hours, share = simulate(EQUAL, block)
    assert hours == pytest.approx(6400 * 1.5 / 8 / 3600)
    assert share == pytest.approx(1)


def test_fixed_shares_wait_for_a_slow_gpu_and_small_blocks_do_not():
    fleet = Fleet(pictures=64_000, gpus=8, slow=0.3)
    assert simulate(fleet, None)[1] < 0.6
    assert simulate(fleet, 1)[1] > 0.75


def test_a_death_costs_more_with_larger_blocks():
    fleet = Fleet(pictures=64_000, gpus=8, slow=0.0, hours_between_deaths=0.5)
    assert simulate(fleet, 100)[1] < simulate(fleet, 1)[1]
