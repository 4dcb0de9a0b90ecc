"""Ray sessions: a private cluster on this machine, or a place in one that is there. Ended completely."""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from pipeline.errors import UsageError

from . import watchdog
from .actor import scrub
from .home import Home

log = logging.getLogger(__name__)
OBJECT_STORE = 80_000_000  # bytes, about the least that Ray takes: nothing but receipts passes through it
QUIET: dict[str, str | None] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # no rebuilding of environments on the workers
    "RAY_RUNTIME_ENV_HOOK": None,
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Ray's core replaces C handlers when it starts; a command's own Ctrl-C and SIGTERM handling must stay.
SIGNALS = [getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "ABRT", "SEGV", "BUS", "FPE")]


class Session:
    """A connection to Ray for as long as it is open; what it started ends with it, however the driver ends.

    `address` None: a cluster of its own, on this machine only, with a random token, in a folder of mode
    0700. Otherwise "host:port" or "auto": that cluster, never another. Raises UsageError where this cannot
    be.

    Ray is started in a thread that lives until `close`. Its daemons die with the *thread* that started them
    (parent-death signal), and callers, such as a Prefect task, may well run in a thread that ends earlier.
    """

    def __init__(self, address: str | None = None, *, gpu: bool = False, patience: float = 90.0) -> None:
        import ray

        if ray.is_initialized():
            raise UsageError("Ray is already in use here: close that engine or call ray.shutdown()")
        if address is not None:
            _check_address(address)
        self.address, self._gpu = address, gpu
        self._error: BaseException | None = None
        self._opened, self._closing = threading.Event(), threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="ray-session", daemon=True)
        try:
            self._keeper.start()
            if not self._opened.wait(patience):
                raise UsageError(f"Ray {self._where()} did not answer within {patience:.0f} s")
            self._raise_error()
        except BaseException:
            self.close()
            raise

    def _raise_error(self) -> None:
        if self._error is not None:
            reason = _reason(self._error)
            raise UsageError(f"Ray {self._where()} cannot be used: {reason}") from self._error

    def _where(self) -> str:
        return "on this machine" if self.address is None else f"at {self.address}"

    def _keep(self) -> None:
        import ray

        try:
            with _private_home() if self.address is None else _environment(_joining()) as home, _quiet():
                try:
                    with _c_handlers_kept():
                        self._init(home)
                    self._opened.set()
                    self._closing.wait()
                finally:
                    with _c_handlers_kept():
                        ray.shutdown()
        except BaseException as error:
            self._error = error
        finally:
            self._opened.set()

    def _init(self, home: Home | None) -> None:
        import ray

        _refresh_authentication()
        breakpoint_hook = {"PYTHONBREAKPOINT": os.environ.get("PYTHONBREAKPOINT")}  # Ray sets its debugger
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if home is None:
            with _environment(breakpoint_hook):
                ray.init(address=self.address, **common)
            return
        with _environment({watchdog.MARK: home.mark, **breakpoint_hook}):
            ray.init(
                address="local",
                num_cpus=1,  # logical: our actors ask for none, so that any number of them is scheduled
                num_gpus=None if self._gpu else 0,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                _temp_dir=str(home.folder / "r"),  # Ray opens its folder to all: ours around it stays closed
                _node_ip_address="127.0.0.1",  # no looking for an address that others could reach
                **common,
            )

    def close(self) -> None:
        """End the session. What it started has ended when this returns."""
        self._closing.set()
        if self._keeper.ident is not None:
            # A cluster that does not answer may never let go of the thread; nothing of ours is to end there.
            self._keeper.join(60 if self.address is None or self._opened.is_set() else 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _private_home() -> Iterator[Home]:
    """The folder, environment and watchdog of a private cluster; on leaving, nothing of it is left."""
    home = Home()
    try:
        with _environment({**QUIET, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
            yield home
    finally:
        home.close()
        _refresh_authentication()


def _joining() -> dict[str, str | None]:
    """The environment to join a cluster with: the user's; where it says nothing, a token if there is one."""
    token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    mode = "token" if token or (Path.home() / ".ray" / "auth_token").is_file() else "disabled"
    return {**QUIET, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", mode)}


def _check_address(address: str) -> None:
    """Refuse what would start a cluster instead of joining one, and what nobody listens at."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise UsageError(
            f"--address {address}: expected host:port of a Ray head node (the port is mostly 6379), or auto; "
            "ray:// addresses are for clients outside: start the command on a node of the cluster"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--address {address}: no Ray cluster answers there ({reason})") from error


@contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    """Variables of this process and of what it starts; None takes one away. As before on leaving."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _refresh_authentication() -> None:
    """Let Ray's core read RAY_AUTH_MODE and the token again; it keeps what it saw when it was imported."""
    with suppress(ImportError, AttributeError):
        core: Any = import_module("ray._raylet")
        core.Config.initialize("")
        core.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _c_handlers_kept() -> Iterator[None]:
    """Signal handlers as they were. At the C level, since Python's `signal` works in the main thread only.

    Ray's stand for a second or more while it starts. They hand a SIGTERM on to ours, but first set an alarm that would
    abort the process 3 s later: it is turned off here, and where it is early the command has SIGALRM blocked.
    """
    libc = ctypes.CDLL(None)
    kept = [(number, _handler(libc, number)) for number in (*SIGNALS, signal.SIGALRM)]
    try:
        yield
    finally:
        if _handler(libc, signal.SIGALRM).raw != kept[-1][1].raw:
            libc.alarm(0)
        for number, action in kept:
            libc.sigaction(int(number), action, None)


def _handler(libc: ctypes.CDLL, number: int) -> ctypes.Array[ctypes.c_char]:
    action = ctypes.create_string_buffer(512)  # more than a struct sigaction
    libc.sigaction(int(number), None, action)
    return action


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from printing a paragraph to stdout, which may hold a command's JSON, for every worker that
    dies.

    The engine says what came of it. Ray has no setting for this: what prints is replaced while the session
    is open.
    """
    worker: Any = import_module("ray._private.worker")
    printer = getattr(worker, "print_to_stdstream", None)
    try:
        worker.print_to_stdstream = lambda data, *_, **__: log.debug("%s", data.get("lines"))
        yield
    finally:
        worker.print_to_stdstream = printer


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return scrub(lines[0] if lines else type(error).__name__)
