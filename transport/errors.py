"""The errors that leave this package: one tree, one leaf for each thing a caller can do about it.

TransportError
├── Full            later: something is used up for now; `.delivered` and `.failed` name peers
├── TooLarge        never: it exceeds a limit of the configuration
├── Closed          you: this endpoint is closed, or was made in another process
├── PeerGone        them: a peer is unknown, died, left or was replaced; `.delivered`, `.failed`
├── ProtocolError   bad input: what a peer sent does not hold what it must
│   └── GivenUp     nobody: the sender failed while it wrote the message; `receive` never raises it
└── Timeout         the time given ran out (also a builtin TimeoutError)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class TransportError(Exception):
    """Base of everything that `transport` raises on purpose, argument errors excepted."""


class _PerPeer(TransportError):
    """An error of a send to several peers: who has the message and who has not."""

    def __init__(
        self, message: str, *, delivered: Sequence[str] = (), failed: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.delivered: tuple[str, ...] = tuple(delivered)
        self.failed: dict[str, str] = dict(failed or {})


class Full(_PerPeer):
    """Nothing was sent to the peers in `.failed`, since space or a budget is used up; try later."""


class PeerGone(_PerPeer):
    """The peers in `.failed` are unknown, dead, gone or replaced; `.delivered` have the message."""


class TooLarge(TransportError):
    """The message exceeds a limit of the configuration, which the text names, and never fits."""


class Closed(TransportError):
    """This endpoint was closed, or belongs to another process (it was inherited by a fork)."""


class ProtocolError(TransportError):
    """A peer sent what does not hold what it must; the text says what, never the bytes."""


class GivenUp(ProtocolError):
    """A message whose sender failed while it wrote the tensors, and was told so: nobody gets it.

    For backends; `receive` goes on with the next message.
    """


class Timeout(TransportError, TimeoutError):
    """The time given ran out; the text says who was waited for and for what."""


def detached(error: TransportError) -> TransportError:
    """The error for keeping: without traceback and cause, whose frames hold all that was to be sent.

    An error that is kept in one of those frames would wait, with body and loans, for the garbage collector.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
