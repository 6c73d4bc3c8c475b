"""Errors that a user can act on: one line that names what was wrong and the next step."""

from __future__ import annotations


class RetortError(Exception):
    """Base of every error that is the caller's to fix; the command line exits with code 2 on it."""


class ConfigurationError(RetortError, ValueError):
    """An argument, a configuration key or an input row is wrong; the message names it."""


class UnsupportedModelError(RetortError, NotImplementedError):
    """A model uses a feature that the packed forward does not handle; the message names it."""


class RewindError(RetortError, ValueError):
    """A row cannot go back that far; the message names the earliest reachable length."""
