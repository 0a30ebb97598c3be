"""Ctrl-C waits where something is put back, and comes through where something takes long."""

import signal
import threading

import pytest

from mlx_tune.interrupts import interruptible, uninterrupted


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_comes_when_the_block_has_ended():
    done = []

    def work():
        with uninterrupted():
            ctrl_c()
            done.append(1)
        done.append(2)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]


def test_an_interrupt_comes_at_once_where_it_may():
    done = []

    def work():
        with uninterrupted():
            try:
                with interruptible():
                    ctrl_c()
                    done.append("not reached")
            finally:
                ctrl_c()
                done.append("put back")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["put back"]


def test_one_that_waited_comes_before_anything_long_begins():
    done = []

    def work():
        with uninterrupted():
            ctrl_c()
            with interruptible():
                done.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == []


def test_blocks_nest():
    done = []

    def work():
        with uninterrupted(), interruptible():
            with uninterrupted():
                ctrl_c()
                done.append("inner")
            done.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner"]


def test_the_blocks_own_exception_is_seen_and_the_handler_is_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="mine"), uninterrupted(), interruptible():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_programs_own_handler_is_asked():
    received = []
    before = signal.signal(signal.SIGINT, lambda *args: received.append(args))
    try:
        with uninterrupted():
            ctrl_c()
            assert received == []
        assert [args[0] for args in received] == [signal.SIGINT]
        with uninterrupted(), interruptible():
            ctrl_c()
            assert len(received) == 2
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_program_that_ignores_interrupts_or_dies_of_them_goes_on_to(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with uninterrupted(), interruptible():
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_receive_none_and_need_nothing():
    seen = []

    def work():
        with uninterrupted(), interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_outside_of_a_block_an_interrupt_comes_as_ever():
    with pytest.raises(KeyboardInterrupt), interruptible():
        ctrl_c()
