"""What goes wrong in the plugin stays in it: it is logged, and vLLM's own call is made all the same, once.

What vLLM raises itself is never caught here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any

from transport import RateLimit

_log = logging.getLogger("vllm.tensorferry")
_warnings = RateLimit()

failures: Counter[str] = Counter()  # how often each part failed in this process; for people


class Harmless:
    """Around what is ours in a hook: an exception ends here, with its traceback in the log, once in 30 s.

    tensors: whether some go vLLM's way then.
    """

    def __init__(self, part: str, *, tensors: bool = True) -> None:
        self._part = part
        self._so = "; tensors go vLLM's way" if tensors else ""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        failures[self._part] += 1
        name = type(error).__name__
        text = f"tensorferry: {self._part} failed: {name}: {error}{self._so}"
        _warnings.tell(partial(_log.error, exc_info=error), text, self._part, name)
        return True


class Around:
    """A context of ours around a call of vLLM's; where it can't be made or entered, the call is made without.

    make: gives the context, or None when there is nothing to do.
    """

    def __init__(self, part: str, make: Callable[[], AbstractContextManager[None] | None]) -> None:
        self._harmless = Harmless(part)
        self._make = make
        self._context: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        with self._harmless:
            context = self._make()
            if context is not None:
                context.__enter__()
                self._context = context

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._context is not None:
            with self._harmless:
                self._context.__exit__(kind, error, trace)


def pick(given: tuple[Any, ...], what: str, fits: Callable[[Any], bool]) -> Any:
    """The argument that fits, wherever this vLLM has it. LookupError when there is none."""
    for value in given:
        if fits(value):
            return value
    raise LookupError(f"there is no {what} among the arguments")


def forget() -> None:
    """Say again what was said. For tests."""
    global _warnings
    _warnings = RateLimit()
    failures.clear()
