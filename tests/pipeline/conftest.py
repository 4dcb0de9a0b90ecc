"""Fixtures of the pipeline's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from object_server import ObjectServer, object_server

from pipeline import objects


@pytest.fixture(scope="session")
def s3_server() -> Iterator[ObjectServer]:
    """A real S3-speaking server on loopback; tests share its bucket and keep to a prefix of their own."""
    with object_server() as server:
        yield server


@pytest.fixture
def s3(s3_server: ObjectServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL of the test's own in an object store."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    objects.forget()
    yield f"s3://bucket/{request.node.name}".translate({ord("["): "-", ord("]"): None})
    objects.forget()
