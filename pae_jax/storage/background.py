"""`Saving`: a stage that is written in the background, while its caller goes on.

Orbax's `save_async` would return before we have synced, read back and renamed what it writes. So the whole of `save`
runs in a thread of its own, and gives the same promises.
"""

from __future__ import annotations

import atexit
import os
import threading
import warnings
from collections.abc import Callable

# This thread pool, of which Orbax makes use, closes at the interpreter's exit: `_end` must be registered after it.
from concurrent.futures import thread as _thread_pool  # noqa: F401
from pathlib import Path

from pae_jax.errors import CheckpointError, PaeError
from pae_jax.storage.shield import Decision, until

_LAST: dict[int, Saving] = {}  # by thread: what it saves, until somebody has waited for it


class Saving:
    """A stage that is being written in the background: what `save(..., wait=False)` returns.

    Of each thread one stage at a time is written. Its next `save` waits for it; so does the interpreter's exit.
    An error is never lost: whoever waits first raises it, `wait`, the next `save` of the same thread, or the
    interpreter's exit, as a `RuntimeWarning`.

    Attributes:
      path: the folder of the stage.

    Example: see `save`.
    """

    def __init__(self, path: Path, write: Callable[[Decision], None]):
        self.path, self._decision, self._ended = path, Decision(), threading.Event()
        self._error: BaseException | None = None
        self._owner, self._process = threading.get_ident(), os.getpid()
        thread = threading.Thread(target=self._run, args=(write,), name=f"saving {path.name}", daemon=True)
        try:
            thread.start()
            _LAST[self._owner] = self
        except BaseException:  # an interrupt in between
            self._decision.stop()
            raise

    def __repr__(self) -> str:
        return f"Saving({str(self.path)!r}, done={self.done})"

    @property
    def done(self) -> bool:
        """Whether nothing is written any more: the stage is there, or `wait` raises."""
        return self._ended.is_set()

    def wait(self) -> None:
        """Return once the stage is on the disk. Ctrl-C stops the writing: no stage is written then.

        Raises:
          CheckpointError: as for `save`; or an interrupt has stopped it.
        """
        if self._process != os.getpid():
            raise CheckpointError(f"{self.path} is written by the process that this one was forked from. Wait there.")
        try:
            until(self._ended)
        except BaseException:
            self._decision.stop()
            self._ended.wait()
            raise
        finally:
            if _LAST.get(self._owner) is self:
                _LAST.pop(self._owner, None)
        if self._error is not None:
            raise self._error

    def _run(self, write: Callable[[Decision], None]) -> None:
        try:
            write(self._decision)
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()


def wait_for_last(following: Path) -> None:
    """Wait for what this thread saves in the background; raise its error, if nobody has raised it yet."""
    last = _LAST.get(threading.get_ident())
    if last is None:
        return
    try:
        last.wait()
    except PaeError as error:
        error.add_note(f"Nobody had waited for it, so {following} is not written either. Save that again.")
        raise


def _end() -> None:
    """Wait at the interpreter's exit for all that is written."""
    errors = []
    for saving in list(_LAST.values()):
        try:
            saving.wait()
        except Exception as error:
            errors.append(str(error))
    if errors:
        warnings.warn(
            f"stages that nobody waited for were not saved: {'; '.join(errors)}", RuntimeWarning, stacklevel=1
        )


os.register_at_fork(after_in_child=_LAST.clear)  # the threads are the parent's
atexit.register(_end)  # too late to write; warns of what threads lost that outlived the main thread
# Private in Python; what is public, `atexit`, runs after the thread pools have closed, and Orbax cannot write then.
threading._register_atexit(_end)  # pyright: ignore[reportAttributeAccessIssue]
