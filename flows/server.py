"""A Prefect server of one's own, for as long as one command runs.

Two commands never share a database, and nothing of a server outlives its command, however that ends: the
database is a private copy of a migrated one, and the server gets the parent-death signal (Linux).
"""

from __future__ import annotations

import fcntl
import http.client
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from .settings import DATABASE, prefect_client, server_environment

START_SECONDS = 120.0  # of patience: a start takes about 2 s, on a busy machine much more
STOP_SECONDS = 5.0
FLUSH_SECONDS = 5.0
LOOK_SECONDS = 0.25
RESTARTS = 5
HOME_PREFIX = "maskmill-prefect-"

logger = logging.getLogger(__name__)


class ServerError(Exception):
    """The Prefect server of this command did not start; the message quotes the end of its log."""


@contextmanager
def prefect_server(home: Path | None = None) -> Iterator[str]:
    """Give this process a Prefect API of its own and yield its URL; afterwards nothing of it is left.

    Inside, Prefect talks to this server and to no other: the user's PREFECT_* variables are hidden, and given
    back at the end. Enter it from the main thread and, where there is a choice, before prefect is imported:
    threads that Prefect did not start see the settings of the import.

    Args:
        home: the folder of this user, where a migrated database is kept (1 MB per Prefect version); default
            MASKMILL_HOME. The first command takes about 6 s longer, because it makes that database.

    Raises:
        ServerError: the server did not start.
        RuntimeError: entered from another thread than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            f"prefect_server() was entered from thread {threading.current_thread().name!r}; enter it from "
            "the main thread, because the server dies with the thread that started it"
        )
    _sweep()
    with _private_home() as private, socket.create_server(("127.0.0.1", 0)) as listener:
        # Bound here and handed over: no other program can take the port, and a request waits for the server.
        port, descriptor = listener.getsockname()[1], listener.fileno()
        password = f"maskmill:{secrets.token_hex(16)}"  # other users of this machine reach its loopback too
        url = f"http://127.0.0.1:{port}/api"
        _bring_database(private, _template(home))
        with (
            _child(["serve", str(descriptor)], private, password, (descriptor,)) as server,
            prefect_client(private, url, password),  # imports prefect while the server starts
        ):
            listener.close()
            _wait_until_ready(server, port, private)
            with _kept_alive(server, port, private, password):
                try:
                    yield url
                finally:
                    _flush()


# --------------------------------------------------------------------------------------- the private home


@contextmanager
def _private_home() -> Iterator[Path]:
    """A new folder (0700), locked while this process lives, removed at the end.

    In the temporary folder and not in the user's, because SQLite's write-ahead log needs a local disk.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=HOME_PREFIX))
        lock = _lock(path)
        if lock is not None and path.exists():
            break
        if lock is not None:  # the sweep of another command was quicker than our lock
            os.close(lock)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _sweep() -> None:
    """Remove the homes of killed commands: those that nobody holds the lock of."""
    for path in Path(tempfile.gettempdir()).glob(f"{HOME_PREFIX}*"):
        if (lock := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder; None if another process holds it, or it is gone, or not ours to open.

    The kernel gives a lock back when its holder dies. That says more than a process id and its start time: it
    also holds between containers that share a temporary folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


# ---------------------------------------------------------------------------------- the migrated database


def _template(home: Path | None) -> Path:
    """Where the migrated database of this user and Prefect version is kept."""
    if home is None:
        from segmodels.home import home as users_home

        home = users_home()
    folder = home / "prefect" / version("prefect")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / DATABASE


def _bring_database(private: Path, template: Path) -> None:
    """Copy the migrated database; the first command makes it, in its private home, and leaves a copy."""
    database = private / DATABASE
    if template.exists():
        shutil.copyfile(template, database)
        return
    with _child(["migrate"], private) as migration:
        try:
            code = migration.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
    if code != 0:
        raise ServerError(_why(f"the migration of a new database {_ended(code)}", private))
    partial = template.with_name(f"{DATABASE}.{secrets.token_hex(4)}")
    shutil.copyfile(database, partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(template)  # whole or not at all; of two commands at once either's will do


# --------------------------------------------------------------------------------------- the child process


@contextmanager
def _child(
    arguments: list[str], private: Path, password: str = "", descriptors: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Run server_process.py in a process that ends with this one.

    It has a session of its own (a terminal's Ctrl-C is for us, who still have states to report), and it
    stands in its private home, where no .env and no prefect.toml of the folder the user is in is found.
    """
    program = Path(__file__).resolve().with_name("server_process.py")
    with (private / "server.log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", str(program), "--parent", str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=private,
            env=server_environment(private, password),
            pass_fds=descriptors,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
        child.kill()
        child.wait()


@contextmanager
def _kept_alive(server: subprocess.Popen[bytes], port: int, private: Path, password: str) -> Iterator[None]:
    """Start the server again where it listened, should it die: no night is lost because Prefect's books are.

    Prefect's clients ask again for a minute, which bridges the gap. From a thread that lives as long as the
    server is needed, because it would die with the thread that started it.
    """
    end = threading.Event()

    def lives(child: subprocess.Popen[bytes]) -> bool:
        while not end.wait(LOOK_SECONDS):
            if child.poll() is not None:
                return False
        return True

    def keep() -> None:
        child, again = server, 0
        while not lives(child) and again < RESTARTS:
            again += 1
            logger.warning("the Prefect server %s; it is started again", _ended(child.returncode))
            with ExitStack() as stack, suppress(OSError):  # somebody took the port
                listener = stack.enter_context(socket.create_server(("127.0.0.1", port)))
                arguments = ["serve", str(listener.fileno())]
                child = stack.enter_context(_child(arguments, private, password, (listener.fileno(),)))
                listener.close()
                if lives(child):
                    return

    keeper = threading.Thread(target=keep, name="prefect-server", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        end.set()
        keeper.join()


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, private: Path) -> None:
    """Ask once: the socket keeps the question until the server accepts it, and closes if the server dies."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    try:
        connection.request("GET", "/api/ready")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        with suppress(subprocess.TimeoutExpired):
            server.wait(1)
        raise ServerError(_why(f"the server {_ended(server.returncode)}", private)) from error
    finally:
        connection.close()
    if status != 200:
        remedy = "remove the folder 'prefect' in MASKMILL_HOME, from which it was copied, and try again"
        raise ServerError(_why(f"its database cannot be used (status {status}); {remedy}", private))


def _ended(code: int | None) -> str:
    return f"was not ready after {START_SECONDS:.0f} s" if code is None else f"ended with exit code {code}"


def _why(what: str, private: Path) -> str:
    lines = (private / "server.log").read_text(errors="replace").strip().splitlines()[-15:]
    log = "\n".join(f"    {line}" for line in lines) or "    (empty)"
    return f"Prefect did not start: {what}. The end of the server's log:\n{log}"


def _flush() -> None:
    """Send what Prefect's threads still hold, else at exit they look for a server that is gone."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    workers = (APILogWorker, EventsWorker)
    for worker in workers:
        logging.getLogger(worker.__name__).setLevel(logging.ERROR)  # that it is "still processing" is no news
    for worker in workers:
        worker.drain_all(timeout=FLUSH_SECONDS)
