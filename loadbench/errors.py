"""The errors a user may see: one line each, and the exit code it ends in. Nothing else may reach the terminal."""

from __future__ import annotations


class LoadbenchError(Exception):
    """Something the user can put right. The message is one line: where, what was expected, what was found."""

    exit_code = 2


class UsageError(LoadbenchError):
    """The scenario, a flag or a path is wrong."""


class TargetError(LoadbenchError):
    """The endpoint or the model cannot be served."""

    exit_code = 3
