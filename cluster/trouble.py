"""What can go wrong with workers and nodes: how Ray tells of it, and how we do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pipeline.errors import Cause, StudyError, UsageError

from .actor import Refusal, scrub
from .member import Member


def living_nodes() -> set[str]:
    """Ids of the nodes that Ray takes for alive."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def node_went(member: Member, error: Exception) -> bool:
    """Whether it was the node of `member` that went, as far as Ray knows by now."""
    if getattr(error, "preempted", False) or "its node has died" in str(error):
        return True
    return member.node is not None and member.node not in living_nodes()


def refused(refusal: Refusal) -> Exception:
    """`refusal` as the exception that it stands for."""
    if refusal.cause == "usage":
        return UsageError(refusal.message)
    return StudyError(cast(Cause, refusal.cause), refusal.message)


def cannot_start(error: Exception) -> UsageError:
    """Ray could not make a process for a worker."""
    lines = str(error).strip().splitlines()
    return UsageError(f"a worker could not start on its node: {scrub(lines[-1] if lines else repr(error))}")


def duration(seconds: float) -> str:
    """Such as "4 s" or "10 min"."""
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"


def starved(asks: Mapping[str, float], workers: int, patience: float, *, mid_run: bool) -> Exception:
    """No worker came within `patience` seconds: before the first nothing could start, later it is a failure."""
    import ray

    free = ray.available_resources()
    has = ", ".join(f"{free.get(name, 0):g} {name}" for name in asks)
    needs = " and ".join(f"{count:g} {name}" for name, count in asks.items() if count) or "memory"
    facts = f"each needs {needs}, and the Ray cluster has {has} free"
    within = f"within {duration(patience)} (--wait-minutes)"
    if mid_run:
        words = f"no worker is left and none came {within}: {facts}; run it again when there are machines"
        return StudyError("timeout", words)
    return UsageError(
        f"0 of {workers} workers started {within}: {facts}; ask for less or wait until others have finished"
    )


def epitaph(error: Any) -> str:
    """What Ray knows of a death, in one line without paths."""
    text = str(error)
    for sign, meaning in (
        ("memory pressure", "Ray ended it because its node was out of memory"),
        ("node was terminated", "its node is gone"),
        ("The node", "its node is gone"),
        ("SIGTERM", "it got SIGTERM"),
        ("connection error code 2", "it was killed or crashed in native code (most often: out of memory)"),
    ):
        if sign in text:
            return meaning
    return scrub(text.strip().splitlines()[-1])
