"""Work that an interrupt cannot stop halfway."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def shielded(work: Callable[[], T], stop: Callable[[], None] | None = None) -> T:
    """Do work in a thread of its own, where no Ctrl-C arrives; return what it returns, raise what it raises.

    Args:
      work: what to do.
      stop: called when an interrupt arrives, which then goes on once the work has ended; a second interrupt does not
        wait. None lets the first go on at once, for work that changes nothing.
    """
    ended, results, errors = threading.Event(), list[T](), list[BaseException]()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        until(ended)
    except BaseException:
        if stop is not None:
            stop()
            if _begun(thread):
                ended.wait()
        raise
    if errors:
        raise errors.pop()
    return results.pop()


def until(event: threading.Event) -> None:
    """Wait for an event. An interrupt that arrives just before Python blocks is noticed a second later at most."""
    while not event.wait(1.0):
        pass


def _begun(thread: threading.Thread) -> bool:
    """Say whether a thread has begun; an interrupt may come while it is started."""
    for _ in range(50):
        if thread.ident is not None:
            return True
        time.sleep(0.01)
    return False


class Decision:
    """Whether work may be published: once it is stopped it may not, and once it is published it cannot be stopped."""

    def __init__(self) -> None:
        self._mutex, self._stopped = threading.Lock(), False

    def stop(self) -> None:
        """Publish nothing from now on."""
        with self._mutex:
            self._stopped = True

    def publish(self, act: Callable[[], Any]) -> bool:
        """Act, unless it was stopped; return whether it acted."""
        with self._mutex:
            if not self._stopped:
                act()
            return not self._stopped
