"""Signals that ask to end, and those that are left alone."""

from __future__ import annotations

import signal

import pytest

from fastformer.core.signals import Ended, asking
from fastformer.train.stop import Stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_at_once_only_what_has_nothing_to_save(number, request):
    given, before = signal.getsignal(number), signal.default_int_handler
    request.addfinalizer(lambda: signal.signal(number, given))
    signal.signal(number, before)  # under nohup these tests are given a SIGHUP that is ignored
    with Stop() as stop:
        stop.at_once = False
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.asked and stop.agreed()
        stop.at_once = True
        with pytest.raises(Ended):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_closed_terminal_is_ignored_where_nohup_says_so(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    assert signal.SIGHUP not in asking()
