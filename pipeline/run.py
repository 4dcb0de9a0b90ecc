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
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from . import ledger, locks, results, store
from .again import begin_again, begun_under, choose_kind, save_memory
from .engine import BlockTask, Engine, Failure, Kind, Outcome, Receipt, Stranded, Work
from .errors import Interrupted, StudyError, UsageError
from .ingest import image_url
from .job import Job
from .logs import LastLines
from .method import Method
from .prepare import plan_blocks, take_in
from .progress import Progress
from .sources import Found, Study
from .sources.names import study_name
from .start import new_run_id
from .study_plan import Baselines, tiles_of

if TYPE_CHECKING:
    from segmodels.runtime import Runtime

logger = logging.getLogger("maskmill")

PATIENCE_SECONDS = 5.0  # with a study that is being read when the run is to end


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
        self.gave_up = False
        self.began = time.time()
        self.failed_before = ledger.all_failed(self.out)
        self.last_lines = LastLines()
        self.studies = [Progress(study, ledger.location_key(study.source)) for study in self._chosen(found.studies)]
        self.inputs_failed = found.failures
        self.by_key: dict[str, list[Progress]] = {}
        self.ready: deque[Progress] = deque()  # whole, to be published
        self.twins: list[Progress] = []  # of the same content as another study: they wait for it
        self.queue = deque(self.studies)  # what is still to be prepared
        self.baselines: Baselines = {}
        self.workers = 1
        self._preparing = threading.Lock()  # held while a study is read: engines may do that in another thread
        self._engine: Engine | None = None
        self._start: Callable[[], Engine]

    # -- preparing -------------------------------------------------------------------------------------------------

    def workers_on_demand(self, start: Callable[[], Engine]) -> None:
        """How to start the workers, once the first study needs a plan."""
        self._start = start

    def engine(self) -> Engine:
        """The workers, started if need be."""
        if self._engine is None:
            self._engine = self._start()
            self.workers = self._engine.workers
        return self._engine

    def budget(self, kind: Kind) -> int:
        """Bytes one worker of the kind may use: --memory, else its part of its machine's memory."""
        return self.job.memory or kind.memory

    def _chosen(self, studies: list[Study]) -> list[Study]:
        """The studies this run takes up: all, or with `retry_failed` those that failed before; the first `limit`."""
        if self.job.retry_failed:
            studies = [study for study in studies if study.name in self.failed_before]
        return studies[: self.job.limit]

    def works(self) -> Iterator[Work]:
        """Prepare study after study; yield its blocks, small ones of several studies together up to a batch.

        A work is of one kind. Call it again when it has ended: stranded studies may have come into the queue.
        """
        waiting: list[BlockTask] = []
        tiles = 0
        while self.queue and not self.stop.is_set():
            with self._preparing:
                tasks = self._prepared(progress := self.queue.popleft())
            for task in tasks:
                if waiting and (waiting[0].runtime, waiting[0].under) != (task.runtime, task.under):
                    yield tuple(waiting)
                    waiting, tiles = [], 0
                waiting.append(task)
                tiles += task.tiles
                assert progress.kind is not None
                if tiles >= (task.under or progress.kind.runtime).batch:
                    yield tuple(waiting)
                    waiting, tiles = [], 0
        if waiting and not self.stop.is_set():
            yield tuple(waiting)

    def _prepared(self, progress: Progress) -> list[BlockTask]:
        """The blocks of one study that are not done yet; none where it needs no work or was set aside."""
        needed = bool(progress.numbered)  # it was read before
        if not needed:
            with self._set_aside(progress, "reading"):
                needed = take_in(self, progress)
        if not needed or self.stop.is_set():
            return []
        held = None
        with self._set_aside(progress, "planning"):
            held = begun_under(self, progress)
        if progress.state == "failed":
            return []
        self.engine()  # a failure of the workers is the run's, not this study's
        if self.stop.is_set():  # asked to end while Ray was starting: a model is not loaded any more
            return []
        kind = progress.kind = choose_kind(self, progress, held)
        tasks: list[BlockTask] = []
        with self._set_aside(progress, "planning"):
            tasks += plan_blocks(self, progress, kind)
        return tasks

    def claim(self, progress: Progress) -> None:
        progress.claim = None  # of an earlier beginning: it would stand in the way of its own successor
        progress.claim = locks.Claim(ledger.folder(self.out, progress.key), self.stop)

    @contextmanager
    def _set_aside(self, progress: Progress, stage: str) -> Iterator[None]:
        """What goes wrong inside is this study's failure and costs no other study its night."""
        try:
            yield
        except Interrupted:
            pass
        except StudyError as error:
            self.fail(progress, error)
        except OSError as error:
            self.fail(progress, StudyError("storage", f"{stage} failed: {error.strerror or 'i/o error'}"))
        except Exception as error:
            logger.exception("%s failed", stage, extra={"key": progress.key})
            self.fail(progress, StudyError("crash", f"{stage} failed: {type(error).__name__}"))

    def workers_for_one(self, kind: Kind) -> int:
        """Whole studies to workers first; only where there are fewer studies than workers are studies shared."""
        return max(1, -(-kind.workers // max(1, len(self.studies))))

    def estimate(self) -> None:
        """Count the tiles that lie ahead, from the headers, so that progress has a whole to be a part of."""
        for progress in self.studies:
            with suppress(StudyError, OSError):  # what is wrong with it is said when it is prepared
                progress.tiles = tiles_of(progress.study, self.method)

    @property
    def tiles_expected(self) -> int:
        return sum(progress.tiles for progress in self.studies)

    def fraction_done(self) -> float:
        """Share of the tiles that are behind us, 0 to 1; a study that has its end counts whole."""
        total = self.tiles_expected
        done = sum(p.tiles if p.state in ("published", "failed") else min(p.tiles, p.tiles_done) for p in self.studies)
        return done / total if total else 1.0

    # -- collecting ------------------------------------------------------------------------------------------------

    def take(self, outcome: Outcome) -> None:
        """Book one block's end."""
        progress = self.by_key[outcome.key][0]
        if isinstance(outcome, Stranded):
            begin_again(self, progress, outcome.runtime)
            return
        progress.pending.discard(outcome.index)
        if isinstance(outcome, Failure):
            if outcome.cause == "memory" and save_memory(self, progress):
                progress.state = "saving"
            elif progress.state != "failed":
                self.fail(progress, StudyError(outcome.cause, outcome.message), outcome.attempts)
        else:
            self._book(progress, outcome)
        if not progress.pending and progress.state == "segmenting":
            self.become_whole(progress)
        elif not progress.pending and progress.state == "saving":  # nothing of it is on its way any more
            progress.state, progress.tiles_done = "waiting", 0
            self.queue.append(progress)

    def _book(self, progress: Progress, outcome: Receipt) -> None:
        progress.blocks += 1
        progress.tiles_done += outcome.tiles
        progress.seconds["segment"] = progress.seconds.get("segment", 0.0) + outcome.seconds
        progress.peak_rss_bytes = max(progress.peak_rss_bytes, outcome.peak_rss_bytes)
        logger.info(
            "block done",
            extra={
                "key": outcome.key,
                "block": outcome.index,
                "tiles": outcome.tiles,
                "seconds": outcome.seconds,
            },
        )

    def become_whole(self, progress: Progress) -> None:
        progress.state = "whole"
        self.ready.append(progress)

    def settle(self, publish: Callable[[Progress], None]) -> None:
        """Publish everything that is whole, then the studies of the same content that waited for it."""
        while self.ready or self._twins_due():
            if self.ready:
                publish(self.ready.popleft())
            for twin in self._twins_due():
                self.twins.remove(twin)
                first = self.by_key[twin.key][0]
                if first.state == "published":
                    self.become_whole(twin)
                elif first.cause is not None and first.message is not None:
                    self.fail(twin, StudyError(first.cause, first.message))

    def _twins_due(self) -> list[Progress]:
        return [t for t in self.twins if self.by_key[t.key][0].state in ("published", "failed")]

    def publish(self, progress: Progress) -> None:
        """Publish one whole study; a failure here is that study's alone."""
        with self._set_aside(progress, "publishing"):
            labels = self.labels_of(progress)
            with locks.alone(labels.group, self.stop):
                self._publish(progress, labels)

    def _publish(self, progress: Progress, labels: results.Labels) -> None:
        if not progress.reused and results.stands(self.out, labels.study, labels.key, labels.name):
            progress.record = ledger.published(labels.ledger, labels.study)
            if progress.record is not None:  # another command was quicker
                progress.state = "published"
                return
        if progress.reused:
            results.export_missing(labels, self.job.formats)
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
        self.last_lines.forget(progress.key)

    def _copy_from_twin(self, labels: results.Labels) -> None:
        """Labels of the same content that stand published under another name are copied, not computed."""
        twin = results.standing(self.out, labels.key, labels.name, but=labels.study)
        if twin is None:
            return
        source = store.join(image_url(self.out, twin), "labels", labels.name, "0")
        store.delete(store.join(labels.group, "0"))
        store.copy(source, store.join(labels.group, "0"))

    @property
    def runtime(self) -> Runtime:
        """The runtime of the first study that was planned, else what this machine's would be."""
        return next((p.kind.runtime for p in self.studies if p.kind), self.method.spec.runtime)

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
            runtime=plan.get("runtime", self.runtime.to_json()),
            runtime_hash=plan.get("runtime_hash", self.runtime.hash),
            shape=image.header.shape,
            channel_axis=image.header.has_channel_axis,
            affine=image.header.affine,
            nifti=image.header.nifti,
        )

    def fail(self, progress: Progress, error: StudyError, attempts: int = 1) -> None:
        progress.state, progress.cause, progress.message = "failed", error.cause, error.message
        progress.attempts = attempts
        logger.error(error.message, extra={"key": progress.key, "cause": error.cause})
        record = {
            "study": progress.study.name,
            "cause": error.cause,
            "message": error.message,
            "attempts": attempts,
            "run": self.id,
            "log": self.last_lines.of(progress.key),
        }
        with suppress(OSError):  # a full disk must not end the night: the summary says it all the same
            ledger.write_failed(ledger.folder(self.out, progress.key), record)
            self.forget_failures(progress)

    def forget_failures(self, progress: Progress) -> None:
        """What a study failed of before, when it had other content or its content could not be read."""
        for key in self.failed_before.pop(progress.study.name, []):
            if key != progress.key:
                ledger.clear_failed(ledger.folder(self.out, key))

    def give_up(self, error: StudyError | UsageError) -> None:
        """The workers were lost and cannot be had again: what has no end by now has failed of that."""
        if self.stop.is_set():  # interrupted before: `close` says so
            return
        self.gave_up = True
        self.stop.set()
        with self._reading_ended():
            for progress in self.studies:
                if progress.state not in ("published", "failed"):
                    cause = error.cause if isinstance(error, StudyError) else "crash"
                    self.fail(progress, StudyError(cause, f"the workers were lost: {error}"))

    @contextmanager
    def _reading_ended(self) -> Iterator[None]:
        """After `stop` was set, wait for the study that is being read: its state must not change under our eyes."""
        waited = self._preparing.acquire(timeout=PATIENCE_SECONDS)
        try:
            yield
        finally:
            if waited:
                self._preparing.release()

    def close(self) -> None:
        """What has no end by now was interrupted; an INPUT that is no study stands in the ledger as failed too."""
        # With parts, an INPUT's failure may be another command's to tell.
        ours = set(self.job.inputs) if self.job.part is None else {source for source, _ in self.inputs_failed}
        for given in ours - {progress.study.source for progress in self.studies}:
            with suppress(OSError):  # storage that is gone by now must not take the summary along
                ledger.clear_failed(ledger.folder(self.out, ledger.location_key(given)))
        for source, error in self.inputs_failed:
            record = {"study": study_name(source.rstrip("/").rpartition("/")[2]), "attempts": 1, "run": self.id}
            record |= {"cause": error.cause, "message": error.message}
            with suppress(OSError):
                ledger.write_failed(ledger.folder(self.out, ledger.location_key(source)), record)
        with self._reading_ended():
            for progress in self.studies:
                if progress.state not in ("published", "failed"):
                    progress.state = "published" if progress.reused else "interrupted"
                progress.claim = None
