"""One study from its source to block tasks: ingest, key, room in OUT, plan, ledger."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from . import ledger, locks, ome, results, store
from .engine import BlockTask, Kind
from .errors import StudyError
from .grid import Shards, Triple
from .ingest import Image, known_content, stage_image
from .method import Method
from .planning import Plan
from .sources import Header
from .study_plan import label_dtype, plan_shape, read_header
from .verify import damaged

if TYPE_CHECKING:
    from segmodels.runtime import Runtime

    from .progress import Progress
    from .run import Run

logger = logging.getLogger("maskmill")


def take_in(run: Run, progress: Progress) -> bool:
    """Read one study, find its key and give it its place in OUT; says whether blocks have to be planned.

    They have not where the same result stands in OUT already, or is being made under another name. Raises StudyError.
    """
    began = time.perf_counter()
    _check_channels(run.method, read_header(progress.study, run.method))
    link = run.job.images == "link"
    image, staged = stage_image(run.out, progress.study, volume=run.job.volume, link=link, stop=run.stop)
    progress.image = image
    progress.key = ledger.study_key(image.content, run.method.model_hash, run.method.settings)
    with locks.alone(store.join(run.out, "images"), run.stop):
        _make_room(run, progress, image, staged)
    run.forget_failures(progress)
    progress.seconds["ingest"] = time.perf_counter() - began
    for warning in image.header.warnings:
        logger.warning(warning, extra={"key": progress.key})
    return not _is_known(run, progress, image)


def _check_channels(method: Method, header: Header) -> None:
    wanted = method.card.channels
    if header.channels != len(wanted):
        raise StudyError(
            "input",
            f"the study has {header.channels} channel(s), the model {method.card.name} takes "
            f"{len(wanted)} ({', '.join(wanted)})",
        )


def _make_room(run: Run, progress: Progress, image: Image, staged: str | None) -> None:
    """Give the image its name; what stood there of other content moves aside, of other settings is withdrawn."""
    name = progress.study.name
    held = run.published.get(name)
    linked = store.is_link(image.group) and staged is None
    if held is not None and held[1]["content"] != image.content and not linked:
        results.move_aside(run.out, name, image.group, held[1]["content"])
        logger.info("content changed: the older result moved aside", extra={"key": progress.key})
    elif held is not None and held[0] != progress.key:
        results.withdraw(run.out, name, held[0], image.group, run.method.card.name)
    if staged is not None:
        if known_content(run.out, progress.study) == image.content:  # another command was quicker
            store.delete(staged)
            return
        store.delete(image.group)
        store.move(staged, image.group)


def _is_known(run: Run, progress: Progress, image: Image) -> bool:
    """Whether the result is there, or comes from another study of this run with the same content."""
    twins = run.by_key.setdefault(progress.key, [])
    twins.append(progress)
    name, model = progress.study.name, run.method.card.name
    record = ledger.published(ledger.folder(run.out, progress.key), name)
    if record is not None and results.stands(run.out, name, progress.key, model):
        if results.is_stored(record, store.join(image.group, "labels", model)):
            progress.record, progress.reused = record, True
            run.become_whole(progress)
            return True
        logger.warning("labels that were published are damaged: they are made again", extra={"key": progress.key})
        ome.list_labels(image.group, [n for n in ome.labels_listed(image.group) if n != model])
    # Its labels were damaged or taken away: they are made again, and until then it is not published.
    ledger.forget_published(ledger.folder(run.out, progress.key), name)
    if len(twins) > 1:
        run.twins.append(progress)
    elif results.standing(run.out, progress.key, model) is not None:
        run.become_whole(progress)
    else:
        return False
    return True


def plan_blocks(run: Run, progress: Progress, kind: Kind) -> list[BlockTask]:
    """Plan a study that was taken in for one kind of worker; gives the blocks that are not done yet.

    Raises StudyError.
    """
    began = time.perf_counter()
    image = progress.image
    assert image is not None
    array = ome.open_array(image.level0)
    chunk = (int(array.chunks[-3]), int(array.chunks[-2]), int(array.chunks[-1]))
    runtime = progress.under or kind.runtime
    plan = plan_shape(
        image.header,
        chunk,
        run.method,
        run.engine(),
        kind,
        run.baselines,
        budget=run.budget(kind),
        workers=run.workers_for_one(kind),
        on_device=runtime.device != "cpu",
        smallest=progress.saving,
    )
    progress.in_smallest = plan.smallest
    run.claim(progress)
    missing = _open_ledger(run, progress, image, plan, runtime)
    tasks = []
    for index, block in enumerate(plan.blocks, progress.numbered):
        todo = tuple(shard for shard in plan.shards.indices(block) if shard in missing)
        if todo:
            tasks.append(
                BlockTask(
                    key=progress.key,
                    index=index,
                    image=image.level0,
                    labels=_labels_url(image, run.method),
                    ledger=ledger.folder(run.out, progress.key),
                    statistics=image.statistics,
                    lattice=plan.lattice,
                    grid=plan.grid,
                    shards=plan.shards,
                    range=block,
                    missing=todo,
                    stitch=run.method.tiling.stitch,
                    fill=run.method.tiling.fill,
                    runtime=kind.runtime.hash,
                    under=progress.under,
                )
            )
    progress.numbered += len(plan.blocks)
    progress.pending = {task.index for task in tasks}
    progress.state = "segmenting"
    progress.seconds["plan"] = time.perf_counter() - began
    logger.info("planned", extra={"key": progress.key, "tiles": plan.grid.tiles, "blocks": len(tasks)})
    if not tasks:
        run.become_whole(progress)
    return tasks


def _labels_url(image: Image, method: Method) -> str:
    return store.join(image.group, "labels", method.card.name, "0")


def _open_ledger(run: Run, progress: Progress, image: Image, plan: Plan, runtime: Runtime) -> set[Triple]:
    """Go on with what is marked under this runtime and still whole, else begin anew; gives the shards that are missing.

    Raises StudyError where another command is at work on this study under another runtime.
    """
    method, study = run.method, progress.study.name
    folder, labels = ledger.folder(run.out, progress.key), _labels_url(image, method)
    held = ledger.read_plan(folder)
    claim = progress.claim
    assert claim is not None
    if (
        held is not None
        and (held["runtime_hash"], held["study"]) == (runtime.hash, study)
        and ome.made_for(labels) == progress.key
    ):
        claim.share()
        marked = ledger.markers(folder, runtime.hash)
        for index in list(damaged(labels, plan.shards, marked)):
            logger.warning("a label shard is damaged: it is made again", extra={"key": progress.key})
            ledger.unmark(folder, index)
            del marked[index]
        return set(plan.shards.indices()) - marked.keys()
    if not claim.first:
        raise StudyError(
            "storage",
            "another command is at work on this study under another runtime (threads, precision, device): run this "
            "again when that has ended",
        )
    store.delete(store.join(folder, "done"))
    ome.list_labels(image.group, [n for n in ome.labels_listed(image.group) if n != method.card.name])
    store.delete(store.join(image.group, "labels", method.card.name))
    _create_labels(image.header, method, plan.shards, labels, progress.key)
    ledger.write_plan(
        folder,
        {
            "study": study,
            "content": image.content,
            "model": method.model_facts,
            "settings": method.settings,
            "runtime": runtime.to_json(),
            "runtime_hash": runtime.hash,
            "shape": list(plan.shards.shape),
            "shards": plan.shards.total,
        },
    )
    claim.share()
    return set(plan.shards.indices())


def _create_labels(header: Header, method: Method, shards: Shards, url: str, key: str) -> None:
    """The empty level 0 of a label image, not yet listed for readers. It says whose it is: see `ome.made_for`."""
    lead = (1,) if header.has_channel_axis else ()
    ome.create_array(
        url,
        (*lead, *shards.shape),
        shards.shard,
        label_dtype(method),
        ome.axis_names(header.has_channel_axis),
        {"maskmill": {"key": key}},
    )
