"""Errors that are the user's to repair: a clear text on stderr, no traceback, an exit code of their own."""

from __future__ import annotations


class UserError(Exception):
    """Failed while running; the text says what to do about it."""

    exit_code = 1


class ConfigurationError(UserError):
    """A study file, an option or an argument is wrong."""

    exit_code = 2


class NoFeasibleCandidateError(UserError):
    """Nothing in the space, or nothing that was tried, meets the constraints."""

    exit_code = 3


class UnusableEnvironmentError(UserError):
    """This machine lacks something that was asked for: a package, a GPU, a place to write."""

    exit_code = 4
