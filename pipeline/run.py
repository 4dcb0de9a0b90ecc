"""One command's work: studies through ingest, plan, blocks and publishing, each on its own fate.

A `Run` is driven by whoever has an engine: `works()` prepares studies as the engine asks for them, `take()` collects
what the blocks became, `settle()` publishes what is whole. Nothing here knows Prefect or Ray.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from . import ledger, ome, results, store
from .engine import Baseline, BlockTask, Engine, Failure, Receipt, Work
from .errors import StudyError
from .grid import Box, Shards
from .ingest import Image, image_url, stage_image
from .job import Job
from .planning import Needs, Plan, make_plan
from .sources import Found, Study, open_source
from .start import Method, memory_budget, new_run_id

logger = logging.getLogger("maskmill")

State = str  # waiting, segmenting, whole, published, failed, interrupted


@dataclass
class Progress:
    """Where one study stands in this run."""

    study: Study
    key: str
    state: State = "waiting"
    image: Image | None = None
    plan: Plan | None = None
    pending: set[int] = field(default_factory=set)
    blocks: int = 0
    reused: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    cause: str | None = None
    message: str | None = None
    attempts: int = 1
    record: dict[str, Any] | None = None


class Run:
    """The state of one run. `published` maps a study's name to (key, record) of what OUT held at the start."""

    def __init__(
        self, job: Job, method: Method, found: Found, published: dict[str, tuple[str, dict[str, Any]]]
    ) -> None:
        assert job.out is not None
        self.job, self.method, self.out = job, method, job.out
        self.id = new_run_id()
        self.published = published
        self.stop = threading.Event()
        self.began = time.time()
        self.studies = [
            Progress(study, ledger.location_key(study.source)) for study in self._chosen(found.studies)
        ]
        self.inputs_failed = found.failures
        self.by_key: dict[str, list[Progress]] = {}
        self.ready: deque[Progress] = deque()  # whole, to be published
        self.baseline: Baseline | None = None
        self.budget, self.workers = 0, 1
        self.runtime_hash = method.spec.runtime.hash

    # -- preparing -------------------------------------------------------------------------------------------------

    def measure(self, engine: Engine) -> None:
        """Let the engine's workers say what they take before any block: plans stand on it."""
        self.workers = engine.workers
        self.budget = memory_budget(self.job, engine.workers)
        self.baseline = engine.measure(self.method.window, len(self.method.card.channels))

    def _chosen(self, studies: list[Study]) -> list[Study]:
        """The studies this run takes up: all, or with `retry_failed` those that failed before."""
        if not self.job.retry_failed:
            return studies
        failed = {
            record["study"]
            for key in ledger.keys(self.out)
            if (record := ledger.read_failed(ledger.folder(self.out, key))) is not None
        }
        return [study for study in studies if study.name in failed]

    def works(self) -> Iterator[Work]:
        """Prepare study after study; yield its blocks, small ones of several studies together up to a batch."""
        waiting: list[BlockTask] = []
        tiles = 0
        for progress in self.studies:
            if self.stop.is_set():
                return
            for task in self._prepared(progress):
                waiting.append(task)
                tiles += task.grid.count(task.shards.box_of(task.range))
                if tiles >= self.method.spec.runtime.batch:
                    yield tuple(waiting)
                    waiting, tiles = [], 0
        if waiting:
            yield tuple(waiting)

    def _prepared(self, progress: Progress) -> list[BlockTask]:
        try:
            return self._prepare(progress)
        except StudyError as error:
            self._fail(progress, error)
        except OSError as error:
            self._fail(progress, StudyError("storage", f"reading or writing failed: {error.strerror}"))
        except Exception as error:  # a fault of ours must not cost the other studies their night
            logger.exception("preparing failed", extra={"key": progress.key})
            self._fail(progress, StudyError("crash", f"preparing failed: {type(error).__name__}"))
        return []

    def _prepare(self, progress: Progress) -> list[BlockTask]:
        study, out = progress.study, self.out
        began = time.perf_counter()
        image, staged = stage_image(
            out, study, volume=self.job.volume, link=self.job.images == "link"
        )
        location = progress.key
        progress.image = image
        progress.key = ledger.study_key(image.content, self.method.model_hash, self.method.settings)
        self._check_channels(image)
        self._make_room(progress, staged)
        ledger.clear_failed(ledger.folder(out, location))
        progress.seconds["ingest"] = time.perf_counter() - began
        for warning in image.header.warnings:
            logger.warning(warning, extra={"key": progress.key})

        twins = self.by_key.setdefault(progress.key, [])
        twins.append(progress)
        held = ledger.published(ledger.folder(out, progress.key), study.name)
        if held is not None and self.published.get(study.name, ("",))[0] == progress.key:
            progress.record, progress.reused, progress.state = held, True, "whole"
            self.ready.append(progress)
            return []
        if len(twins) > 1:  # the same content under another name: computed once
            if twins[0].state == "published":
                self._become_whole(progress)
            return []
        if ledger.published_names(ledger.folder(out, progress.key)):
            self._become_whole(progress)
            return []
        return self._plan(progress)

    def _check_channels(self, image: Image) -> None:
        wanted = len(self.method.card.channels)
        if image.header.channels != wanted:
            raise StudyError(
                "input",
                f"the study has {image.header.channels} channel(s), the model {self.method.card.name} takes {wanted} "
                f"({', '.join(self.method.card.channels)})",
            )

    def _make_room(self, progress: Progress, staged: str | None) -> None:
        """Give the image its name; what stood there of other content moves aside, of other settings is withdrawn."""
        name, image = progress.study.name, progress.image
        assert image is not None
        held = self.published.get(name)
        if held is not None and held[1]["content"] != image.content:
            results.move_aside(self.out, name, image.group, held[1]["content"])
            logger.info("content changed: the older result moved aside", extra={"key": progress.key})
        elif held is not None and held[0] != progress.key:
            results.withdraw(self.out, name, held[0], image.group, self.method.card.name)
        if staged is not None:
            store.delete(image.group)
            store.move(staged, image.group)

    def _plan(self, progress: Progress) -> list[BlockTask]:
        began = time.perf_counter()
        image, method = progress.image, self.method
        assert image is not None
        assert self.baseline is not None
        progress.plan = plan_study(
            image, method, self.baseline, self.budget, self._workers_for_one()
        )
        missing = self._open_ledger(progress)
        tasks = []
        folder = ledger.folder(self.out, progress.key)
        for index, block in enumerate(progress.plan.blocks):
            todo = tuple(s for s in progress.plan.shards.indices(block) if s in missing)
            if todo:
                tasks.append(self._task(progress, index, block, todo, folder))
        progress.pending = {task.index for task in tasks}
        progress.state = "segmenting"
        progress.seconds["plan"] = time.perf_counter() - began
        logger.info(
            "planned",
            extra={"key": progress.key, "tiles": progress.plan.grid.tiles, "blocks": len(tasks)},
        )
        if not tasks:
            self._become_whole(progress)
        return tasks

    def _workers_for_one(self) -> int:
        """Whole studies to workers first; only where there are fewer studies than workers are studies shared."""
        return max(1, -(-self.workers // max(1, len(self.studies))))

    def _open_ledger(self, progress: Progress) -> set[tuple[int, int, int]]:
        """Go on with what is marked under this runtime, else begin anew; gives the shards that are missing."""
        image, plan = progress.image, progress.plan
        assert image is not None
        assert plan is not None
        folder = ledger.folder(self.out, progress.key)
        labels = store.join(image.group, "labels", self.method.card.name, "0")
        held = ledger.read_plan(folder)
        if (
            held is not None
            and held["runtime_hash"] == self.runtime_hash
            and held["study"] == progress.study.name
            and store.exists(store.join(labels, "zarr.json"))
        ):
            return set(plan.shards.indices()) - set(ledger.markers(folder, self.runtime_hash))
        store.delete(store.join(folder, "done"))
        ome.list_labels(image.group, [n for n in ome.labels_listed(image.group) if n != self.method.card.name])
        store.delete(store.join(image.group, "labels", self.method.card.name))
        create_labels(image, self.method, plan.shards, labels)
        ledger.write_plan(
            folder,
            {
                "study": progress.study.name,
                "content": image.content,
                "model": self.method.model_facts,
                "settings": self.method.settings,
                "runtime": self.method.spec.runtime.to_json(),
                "runtime_hash": self.runtime_hash,
                "shape": list(plan.grid.shape),
                "shards": plan.shards.total,
            },
        )
        return set(plan.shards.indices())

    def _task(
        self, progress: Progress, index: int, block: Box, todo: tuple[tuple[int, int, int], ...], folder: str
    ) -> BlockTask:
        image, plan = progress.image, progress.plan
        assert image is not None
        assert plan is not None
        return BlockTask(
            key=progress.key,
            index=index,
            image=image.level0,
            labels=store.join(image.group, "labels", self.method.card.name, "0"),
            ledger=folder,
            statistics=image.statistics,
            grid=plan.grid,
            shards=plan.shards,
            range=block,
            missing=todo,
            stitch=self.method.stitch,
            fill="reflect" if any(self.method.margin) else "zero",
        )

    # -- collecting ------------------------------------------------------------------------------------------------

    def take(self, outcome: Receipt | Failure) -> None:
        """Book one block's end."""
        progress = self.by_key[outcome.key][0]
        if isinstance(outcome, Failure):
            if progress.state != "failed":
                self._fail(progress, StudyError(outcome.cause, outcome.message), outcome.attempts)
            return
        progress.blocks += 1
        progress.seconds["segment"] = progress.seconds.get("segment", 0.0) + outcome.seconds
        progress.peak_rss_bytes = max(progress.peak_rss_bytes, outcome.peak_rss_bytes)
        progress.pending.discard(outcome.index)
        logger.info(
            "block done",
            extra={"key": outcome.key, "block": outcome.index, "tiles": outcome.tiles, "seconds": outcome.seconds},
        )
        if not progress.pending and progress.state == "segmenting":
            self._become_whole(progress)

    def _become_whole(self, progress: Progress) -> None:
        progress.state = "whole"
        self.ready.append(progress)

    def settle(self, publish: Callable[[Progress], None]) -> None:
        """Publish everything that is whole, then the twins that waited for it."""
        while self.ready:
            progress = self.ready.popleft()
            publish(progress)
            twins = self.by_key.get(progress.key, [])
            if twins and twins[0] is progress and progress.state == "published":
                for twin in twins[1:]:
                    if twin.state == "waiting":
                        self._become_whole(twin)

    def publish(self, progress: Progress) -> None:
        """Publish one whole study; a failure here is that study's alone."""
        try:
            self._publish(progress)
        except StudyError as error:
            self._fail(progress, error)
        except OSError as error:
            self._fail(progress, StudyError("storage", f"publishing failed: {error.strerror}"))

    def _publish(self, progress: Progress) -> None:
        labels = self.labels_of(progress)
        if progress.reused:
            results.export(labels, self.job.formats, only_missing=True)
            progress.state = "published"
            return
        self._copy_from_twin(labels)
        progress.record = results.publish(
            labels,
            self.job.formats,
            {
                "seconds": progress.seconds,
                "peak_rss_bytes": progress.peak_rss_bytes,
                "run": self.id,
                "warnings": list(progress.image.header.warnings) if progress.image else [],
            },
        )
        progress.state = "published"
        logger.info("published", extra={"key": progress.key})

    def _copy_from_twin(self, labels: results.Labels) -> None:
        """Labels of the same content that were made under another name are copied, not computed."""
        plan = ledger.read_plan(labels.ledger)
        if plan is None or plan["study"] == labels.study:
            return
        source = store.join(image_url(self.out, plan["study"]), "labels", labels.name, "0")
        store.delete(store.join(labels.group, "0"))
        store.copy(source, store.join(labels.group, "0"))

    def labels_of(self, progress: Progress) -> results.Labels:
        """The label image of a study, for publishing or exporting it."""
        image, method = progress.image, self.method
        assert image is not None
        # A study that was published before keeps the runtime it was made under.
        plan = ledger.read_plan(ledger.folder(self.out, progress.key)) or {}
        return results.Labels(
            out=self.out,
            study=progress.study.name,
            key=progress.key,
            content=image.content,
            image=image.group,
            model=method.model_facts,
            settings=method.settings,
            structures=method.structures,
            runtime=plan.get("runtime", method.spec.runtime.to_json()),
            runtime_hash=plan.get("runtime_hash", self.runtime_hash),
            shape=image.header.shape,
            channel_axis=image.header.has_channel_axis,
            affine=image.header.affine,
            nifti=image.header.nifti,
        )

    def _fail(self, progress: Progress, error: StudyError, attempts: int = 1) -> None:
        progress.state, progress.cause, progress.message = "failed", error.cause, error.message
        progress.attempts = attempts
        logger.error(error.message, extra={"key": progress.key, "cause": error.cause})
        ledger.write_failed(
            ledger.folder(self.out, progress.key),
            {
                "study": progress.study.name,
                "cause": error.cause,
                "message": error.message,
                "attempts": attempts,
                "run": self.id,
            },
        )
        for twin in self.by_key.get(progress.key, [])[1:]:
            if twin.state == "waiting" and twin is not progress:
                twin.state, twin.cause, twin.message = "failed", error.cause, error.message

    def close(self) -> None:
        """What has no end by now was interrupted."""
        for progress in self.studies:
            if progress.state not in ("published", "failed"):
                progress.state = "interrupted"


def plan_study(image: Image, method: Method, baseline: Baseline, budget: int, workers: int) -> Plan:
    """The plan of one ingested study."""
    array = ome.open_array(image.level0)
    return make_plan(
        image.header.shape,
        ome.shard_shape(image.header.shape),
        method.window,
        method.overlap,
        method.margin,
        needs=needs_of(image.header.channels, array.dtype.itemsize, array.chunks[-3:], method),
        baseline=baseline,
        budget=budget,
        workers=workers,
    )


def needs_of(channels: int, itemsize: int, chunk: tuple[int, ...], method: Method) -> Needs:
    return Needs(
        channels=channels,
        classes=method.classes,
        image_itemsize=itemsize,
        image_chunk=(chunk[0], chunk[1], chunk[2]),
        label_itemsize=label_dtype(method).itemsize,
        on_device=method.spec.runtime.device != "cpu",
    )


def label_dtype(method: Method) -> Any:
    import numpy as np

    return np.dtype(np.uint8 if max(method.structures, default=0) <= 255 else np.uint16)


def create_labels(image: Image, method: Method, shards: Shards, url: str) -> None:
    """The empty level 0 of a label image, not yet listed for readers."""
    lead = (1,) if image.header.has_channel_axis else ()
    names = ome.axis_names(image.header.has_channel_axis)
    ome.create_array(url, (*lead, *shards.shape), shards.shard, label_dtype(method), names)


def plan_only(study: Study, method: Method, baseline: Baseline, budget: int, workers: int) -> Plan:
    """The plan of a study from its header alone: nothing is read or written."""
    with open_source(study, volume=method.volume) as source:
        header = source.header
    shards = ome.image_shard_shape(header.shape, header.channels, header.dtype.itemsize)
    return make_plan(
        header.shape,
        ome.shard_shape(header.shape),
        method.window,
        method.overlap,
        method.margin,
        needs=needs_of(header.channels, header.dtype.itemsize, ome.chunk_shape(shards), method),
        baseline=baseline,
        budget=budget,
        workers=workers,
    )
