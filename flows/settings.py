"""Prefect for a one-shot command: offline, quiet, with JSON results, and hiding the set-up of the user."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

DATABASE = "prefect.db"

# Nothing leaves the building: no analytics, no telemetry, no package installed on the fly.
OFFLINE = {
    "DO_NOT_TRACK": "1",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_RUNNER_AUTO_INSTALL_DEPENDENCIES": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
}

# A run needs the API and the recorder of task runs; what watches over deployments and history only costs.
IDLE_SERVICES = (
    "CANCELLATION_CLEANUP",
    "CLEANUP_RECONCILER",
    "EVENT_PERSISTER",
    "FOREMAN",
    "LATE_RUNS",
    "PAUSE_EXPIRATIONS",
    "REPOSSESSOR",
    "SCHEDULER",
    "TRIGGERS",
)
SERVER = {
    "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",  # its database is a copy of a migrated one
    "PREFECT_SERVER_EVENTS_STREAM_OUT_ENABLED": "false",
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    "PREFECT_SERVER_UI_ENABLED": "false",
    **{f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in IDLE_SERVICES},
}

# Prefect's chatter stays off the terminal, its warnings do not; what our packages log goes to the API.
CLIENT = {
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "cluster,flows,pipeline,segmodels",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
}


def server_environment(home: Path, password: str) -> dict[str, str]:
    """All environment variables of a server whose files are in `home`."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return others | OFFLINE | SERVER | _places(home) | {"PREFECT_SERVER_API_AUTH_STRING": password}


@contextmanager
def prefect_client(home: Path, url: str, password: str) -> Iterator[None]:
    """Have Prefect in this process use one server and no other; the user's PREFECT_* variables are hidden."""
    settings = OFFLINE | CLIENT | _places(home) | _without_proxy()
    settings |= {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": password}
    with _environment(settings):  # as the import sees it, so the whole process does
        from prefect.context import use_profile
        from prefect.logging.configuration import setup_logging
        from prefect.settings import Profile, temporary_settings
    try:
        with (
            _environment(settings),
            # A Prefect that was imported long before reads the environment again.
            use_profile(Profile(name="maskmill", settings={}), include_current_context=False),
            # Heartbeats are for schedulers, and their thread delays the end of a run by up to a second.
            # No environment variable can say "none".
            temporary_settings(updates={"flows.heartbeat_frequency": None}),
        ):
            setup_logging()
            for name in ("flow_runs", "task_runs"):  # of our own flow: what went wrong in it is ours to say
                logging.getLogger(f"prefect.{name}").propagate = False
            yield
    finally:
        setup_logging()


def _places(home: Path) -> dict[str, str]:
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / DATABASE}",
    }


def _without_proxy() -> dict[str, str]:
    """A hospital's proxy is not on the way to our own loopback address."""
    direct = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1")))
    return {"NO_PROXY": direct, "no_proxy": direct}


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Hide all PREFECT_* variables and set these, for a while."""
    touched = settings.keys() | {name for name in os.environ if name.startswith("PREFECT_")}
    before = {name: os.environ.pop(name, None) for name in touched}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
