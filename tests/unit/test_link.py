"""A session with Ray that was lost is made anew, once, however many calls were in it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from graft.training import link
from graft.training.link import RayLink


def test_a_call_that_tells_late_of_a_lost_session_does_not_end_the_one_made_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sessions = 0
    lost, late = threading.Event(), threading.Event()

    def init(**_: object) -> None:
        nonlocal sessions
        sessions += 1

    monkeypatch.setattr(link.ray, "is_initialized", lambda: sessions > 0)
    monkeypatch.setattr(link.ray, "init", init)
    monkeypatch.setattr(link.ray, "shutdown", lambda: None)
    it = RayLink("ray://head:10001")

    def fails() -> None:
        raise ConnectionError("The session is lost.")

    def fails_late() -> None:
        lost.set()
        late.wait(10)
        raise ConnectionError("The session is lost.")

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(it.ask, fails_late)
        assert lost.wait(10)
        with pytest.raises(ConnectionError):
            it.ask(fails)
        assert it.ask(lambda: sessions) == 2
        late.set()
        with pytest.raises(ConnectionError):
            slow.result(10)
    assert it.ask(lambda: sessions) == 2
    with pytest.raises(ConnectionError):
        it.ask(fails)
    assert it.ask(lambda: sessions) == 3
