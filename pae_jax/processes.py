"""`Processes`: several processes that share a call. One answers for all, and the failure of one ends all."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax

from pae_jax.comparing import difference
from pae_jax.errors import ArgumentError, PaeError, ProcessError

T = TypeVar("T")

BEGIN = 300.0
"""Seconds in which all processes must make the same call; as long as `jax.distributed.initialize` waits for them."""
GRACE = 10.0
"""Seconds that a process has to raise the failure of another; one that is stuck in a collective is ended then."""
_POLL = 0.5
_LOST = ("gloo", "nccl", "connection", "socket closed", "unavailable", "heartbeat")  # words of XLA's network
_AGAIN = "Start all processes again with the same call; with a run folder it goes on from its last stage."
_CALLS = itertools.count(1)  # numbers the joint calls of this process, which are the same in every process


@dataclass(frozen=True)
class Processes:
    """The processes that share one call; they make the same calls of its methods in the same order.

    One process has nobody to ask: every method is trivial then.

    Attributes:
      members: their numbers by `jax.process_index`; the first one writes, and answers for all.
      call: name of the joint call, the same in all of them.
    """

    members: tuple[int, ...] = (0,)
    call: str = ""
    _turns: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return len(self.members) == 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.alone or jax.process_index() == self.members[0]

    def agree(self, what: str, value: T) -> T:
        """Return the value of the first process: JSON, the same bits everywhere."""
        return self.ask(what, lambda: value)

    def ask(self, what: str, work: Callable[[], T]) -> T:
        """Return what the first process finds by work that it alone does: JSON.

        Args:
          what: what is asked; the others must ask the same.
          work: is called in the first process.

        Raises:
          ProcessError: another process failed, or asks something else.
        """
        if self.alone:
            return work()
        key = f"{self.call}/answers/{next(self._turns)}"
        if self.first:
            text = json.dumps([what, work()])
            self.require_well()
            _service().key_value_set(key, text)
        else:
            text = self._waited(key)
        asked, answer = json.loads(text)
        if asked != what:
            raise ProcessError(
                f"process {jax.process_index()} is at {what!r} and process {self.members[0]} at {asked!r}: they were "
                f"not given the same call. {_AGAIN}"
            )
        return answer

    def require_same(self, what: str, mine: Any) -> None:
        """Raise `ProcessError` in all processes if JSON differs in one; that one names the first leaf that differs."""
        if self.alone:
            return
        found = difference(self.agree(what, mine), json.loads(json.dumps(mine)))
        if found is not None:
            name, theirs, own = found
            raise ProcessError(
                f"{what}: '{name}' is {own!r} in process {jax.process_index()} and {theirs!r} in process "
                f"{self.members[0]}. Give every process the same model, data, recipe, key and kind of machine."
            )
        self.meet(f"same/{next(self._turns)}")

    def meet(self, where: str, seconds: float | None = None) -> None:
        """Wait until every process is here; `ProcessError` after so many seconds, None waits as long as all live."""
        if self.alone:
            return
        if not self.first:
            _service().key_value_set(f"{self.call}/{where}/{jax.process_index()}", "here")
            self._waited(f"{self.call}/{where}/all", seconds)
            return
        for other in self.members[1:]:
            self._waited(f"{self.call}/{where}/{other}", seconds)
        _service().key_value_set(f"{self.call}/{where}/all", "here")

    def require_well(self) -> None:
        """Raise `ProcessError` if another process has failed."""
        failure = self._failure()
        if failure:
            raise ProcessError(failure)

    def _waited(self, key: str, seconds: float | None = None) -> str:
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                return _service().blocking_key_value_get(key, int(1000 * _POLL))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            self.require_well()
            if end is not None and time.monotonic() >= end:
                raise ProcessError(
                    f"process {jax.process_index()} waited {seconds:g} s for the others to make the same call. "
                    f"{_AGAIN} Or pass devices of this process alone."
                )

    def _failure(self) -> str:
        """Return what another process said of its failure; "" without one."""
        try:
            number, text = json.loads(_service().key_value_try_get(f"{self.call}/failed"))
        except jax.errors.JaxRuntimeError:
            return ""
        return "" if number == jax.process_index() else f"process {number} failed: {text} {_AGAIN}"

    def _tell(self, error: BaseException) -> None:
        """Let the others know that this process fails, unless one has said so of itself."""
        words = type(error).__name__, str(error).split("\n")[0][:500].rstrip(".")
        said = ": ".join(word for word in words if word) + "."
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _service().key_value_set(f"{self.call}/failed", json.dumps([jax.process_index(), said]))

    def _lost(self, error: BaseException) -> ProcessError | None:
        """Return the failure of another process that an error of the network tells of; None for any other error."""
        if isinstance(error, PaeError) or not isinstance(error, (jax.errors.JaxRuntimeError, ValueError)):
            return None  # XLA raises its own as either of these
        if not any(word in str(error).lower() for word in _LOST):
            return None
        time.sleep(_POLL)
        said = f"another process has ended: {str(error).splitlines()[0][:300]} {_AGAIN}"
        return ProcessError(self._failure() or said)

    def _watch(self, ended: threading.Event) -> None:
        """End this process if another one failed and this one does not notice: a collective waits for ever."""
        while not ended.wait(_POLL):
            failure = self._failure()
            if failure and not ended.wait(GRACE):
                print(f"pae_jax.ProcessError: {failure}", file=sys.stderr, flush=True)
                goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)  # or the others wait for it
                goodbye.start()
                goodbye.join(GRACE)
                os._exit(1)


@contextlib.contextmanager
def together(what: str, devices: Iterable[Any] | None, seconds: float = BEGIN) -> Iterator[Processes]:
    """Yield the processes that own some devices, for one call that each of them makes.

    An error in one of them, Ctrl-C too, is a `ProcessError` in the others. One that cannot raise it because it waits
    on a device for what never comes is ended after `GRACE` seconds. JAX ends those that wait for a killed process.

    Args:
      what: the call, the same in all of them.
      devices: what shares the work; None for this process alone.
      seconds: in which all of them must make the call.

    Raises:
      ArgumentError: none of the devices is of this process, or the processes cannot talk.
      ProcessError: another process failed, did not make the call, or made another one.
    """
    me = jax.process_index()
    members = (me,) if devices is None else tuple(sorted({device.process_index for device in devices}))
    if me not in members:
        raise ArgumentError(f"process {me} has no device in the mesh, which has those of processes {list(members)}")
    if len(members) == 1:
        yield Processes(members)
        return
    if _service() is None:
        raise ArgumentError("the mesh has devices of several processes; begin with jax.distributed.initialize")
    number, ended = next(_CALLS), threading.Event()
    processes = Processes(members, f"pae_jax/{number}")
    threading.Thread(target=processes._watch, args=(ended,), daemon=True).start()
    try:
        processes.meet("begin", seconds)
        if processes.first:
            _service().key_value_delete(f"pae_jax/{number - 1}/")
        processes.agree(what, None)
        processes.meet("same call")
        yield processes
        processes.meet("end")
    except BaseException as error:
        lost = processes._lost(error)
        processes._tell(lost or error)
        if lost is not None:
            raise lost from error
        raise
    finally:
        ended.set()


def _service() -> Any:
    # Private in JAX; its public calls (`multihost_utils`) wait without end, and say nothing of an error elsewhere.
    from jax._src import distributed

    return distributed.global_state.client
