"""What prefect_server() starts: it migrates a database or serves the API, and dies with its parent.

It is run as a file, by a Python that looks for packages neither here nor in the folder the user is in.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import os
import signal
import socket
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="process id to die with")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("migrate", help="make or update the database in PREFECT_HOME")
    serve = commands.add_parser("serve", help="serve the API on a socket that listens already")
    serve.add_argument("descriptor", type=int)
    arguments = parser.parse_args()
    die_with(arguments.parent)
    if arguments.command == "migrate":
        migrate_database()
    else:
        serve_api(arguments.descriptor)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies.

    More exactly: when the thread of the parent ends that started this process.
    """
    set_parent_death_signal = 1
    if ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the kernel knew
        sys.exit(f"the parent process {parent} is gone")


def migrate_database() -> None:
    from prefect.server.database import provide_database_interface

    asyncio.run(provide_database_interface().create_db())


def serve_api(descriptor: int) -> None:
    gc.disable()  # a fifth of the start would go into collecting what the imports make; none of it is garbage
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app()
    gc.freeze()
    gc.enable()
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    main()
