"""zarr's store over obstore, below a key and with our OSErrors: what reads and writes arrays knows no obstore."""

from __future__ import annotations

from typing import Any

from zarr.storage import ObjectStore

from .objects import opened, tried_async


def zarr_objects(url: str, *, read_only: bool = False) -> Objects:
    """What is below a URL as a store for zarr. Stores of one bucket share its connections."""
    bucket, key = opened(url)
    return Objects(bucket, key, read_only=read_only)


class Objects(ObjectStore):  # type: ignore[misc]
    """Keys are taken below `at`: zarr is not told of the path above, or it would make groups along it."""

    def __init__(self, store: Any, at: str, *, read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self.at = at

    def with_read_only(self, read_only: bool = False) -> Any:
        return type(self)(self.store, self.at, read_only=read_only)

    def __eq__(self, other: object) -> bool:
        return bool(super().__eq__(other)) and self.at == getattr(other, "at", None)

    def _key(self, key: str) -> str:
        return f"{self.at}/{key}".rstrip("/")

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        return await tried_async(lambda: super(Objects, self).get(self._key(key), prototype, byte_range))

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
        ranges = [(self._key(key), byte_range) for key, byte_range in key_ranges]
        return await tried_async(lambda: super(Objects, self).get_partial_values(prototype, ranges))

    async def exists(self, key: str) -> bool:
        return bool(await tried_async(lambda: super(Objects, self).exists(self._key(key))))

    async def getsize(self, key: str) -> int:
        return int(await tried_async(lambda: super(Objects, self).getsize(self._key(key))))

    async def set(self, key: str, value: Any) -> None:
        await tried_async(lambda: super(Objects, self).set(self._key(key), value))

    async def delete(self, key: str) -> None:
        await tried_async(lambda: super(Objects, self).delete(self._key(key)))

    async def delete_dir(self, prefix: str) -> None:
        for path in await self._below(prefix):
            await self.delete(path)

    async def list_prefix(self, prefix: str) -> Any:
        for path in await self._below(prefix):
            yield path

    async def list_dir(self, prefix: str) -> Any:
        at = self._key(prefix)
        found = await tried_async(lambda: self.store.list_with_delimiter_async(at))
        for path in [*found["common_prefixes"], *(item["path"] for item in found["objects"])]:
            yield path.rstrip("/").rpartition("/")[2]

    async def _below(self, prefix: str) -> list[str]:
        at = self._key(prefix)
        found = await tried_async(lambda: self.store.list(at).collect_async())
        return [item["path"][len(self.at) + 1 :] for item in found]
