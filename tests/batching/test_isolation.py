"""Trials in processes of their own."""

import psutil
import pytest

from mlx_tune.batching import autobatch
from mlx_tune.batching.isolation import IsolatedProbe, load_factory
from mlx_tune.errors import InvalidArgumentError, TrialError

BUDGET = 16_000_000


def test_a_child_measures_what_this_process_would():
    probe = IsolatedProbe("small_steps:factory", BUDGET, 120)
    trial = probe.trial(2, None, 1)[-1]
    assert trial.fits
    assert 2 * 100 * 256 * 4 < trial.peak_bytes <= BUDGET
    assert probe.throttle.worst  # and what it learned of limits comes back


def test_a_child_that_is_killed_does_not_fit():
    trial = IsolatedProbe("small_steps:killed_from_three", BUDGET, 120).trial(3, None, 1)[-1]
    assert not trial.fits
    assert trial.reason == "its process was ended by SIGKILL"


def test_a_child_that_hangs_is_ended():
    trial = IsolatedProbe("small_steps:hangs", BUDGET, 1).trial(3, None, 1)[-1]
    assert not trial.fits
    assert trial.reason == "its process took longer than trial_timeout=1.00 s and was ended"
    assert psutil.Process().children(recursive=True) == []


def test_the_childs_own_error_is_told():
    with pytest.raises(
        TrialError, match=r"(?s)batch size 1 failed.*small_steps:broken.*ValueError: the factory's own words"
    ):
        IsolatedProbe("small_steps:broken", BUDGET, 120).trial(1, None, 1)


@pytest.mark.slow
def test_a_search_goes_around_sizes_that_kill():
    result = autobatch(isolate="small_steps:killed_from_three", budget=BUDGET, max_batch=4, steps=1, progress=False)
    assert result.batch_size == 2
    assert any(trial.reason == "its process was ended by SIGKILL" for trial in result.trials)


def test_a_factory_that_is_not_there_is_named():
    with pytest.raises(InvalidArgumentError, match=r"module 'small_steps' has no function 'nothing'"):
        load_factory("small_steps:nothing")
