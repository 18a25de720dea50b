"""The errors of the engine itself; those of options, images and models stand where they are raised.

EngineError
├── StartError     the ranks did not become ready: which one, why, its last words
├── NoRankLeft     every rank has died: each with its reason
└── OutputError    results can't be written where they were asked for
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of what the engine raises when it can't go on; a single image that fails raises nothing."""


class StartError(EngineError):
    """A rank could not start, or was not ready in time; nothing of it is left running."""


class NoRankLeft(EngineError):
    """The last rank died; what was encoded before was handed out already."""


class OutputError(EngineError):
    """A file of results can't be written; the message says which and why."""


# Exit codes of a rank's worker: 0 when it was told to leave, 1 when it can't serve.
NO_HEAD = 74  # nobody to serve was there in time
HEAD_LOST = 75  # it was linked with a head, and is no more
