"""The two ways in which something a user gave can be wrong."""

from __future__ import annotations

from typing import Literal

Cause = Literal["input", "geometry", "model", "memory", "storage", "timeout", "crash"]


class StudyError(Exception):
    """One study cannot be segmented; the others go on.

    `cause` is the typed reason that the tables and the summary carry; the message says what was given, what
    was expected and what to do. The message must not name the input's path or quote its header: it goes into
    logs and the ledger, which hold study keys only.
    """

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(cause, message)
        self.cause: Cause = cause
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interrupted(Exception):  # noqa: N818  it is no error
    """The run was asked to stop while a study was being read: the study is neither done nor failed."""


class UsageError(Exception):
    """Nothing could start: flags, job file, MODEL or OUT are not usable (exit code 2)."""
