"""The command line. Flags become a job; what is wrong becomes one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pipeline.errors import StudyError, UsageError
from pipeline.objects import ObjectStoreError

# typer carries its own copy of click or uses an installed one, by version; its public classes tell which.
CommandLineError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

INTERRUPTED = 130

# numpy's BLAS takes a thread per core by default, beside those that --threads counts, and where the system refuses it
# one it waits for that for ever (seen on a machine that had reached its limit of threads).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

app = typer.Typer(
    name="maskmill",
    help="Scans into masks and measurements, in bulk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models_app = typer.Typer(help="The models there are.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models_app, name="models")

Inputs = Annotated[list[str] | None, typer.Argument(help="files, folders or OME-Zarr images", show_default=False)]
Model = Annotated[str | None, typer.Option("-m", "--model", help="a name from `models list`, or a model folder")]
JobFile = Annotated[str | None, typer.Option("-j", "--job", help="a YAML file of settings; flags override it")]
EngineName = Annotated[str | None, typer.Option(help="ray (default) or serial")]
Workers = Annotated[int | None, typer.Option(help="default: one per GPU, else one")]
Threads = Annotated[int | None, typer.Option(help="per worker; default: all cores")]
Address = Annotated[str | None, typer.Option(help="a Ray cluster to join")]
GpusPerWorker = Annotated[float | None, typer.Option(help="a share such as 0.5; default: 1 where there are GPUs")]
StallMinutes = Annotated[
    float | None, typer.Option(help="without progress after which a worker hangs; default: 10, more for slow batches")
]
WaitMinutes = Annotated[float | None, typer.Option(help="for machines; default: 2, on a joined cluster 15")]
Memory = Annotated[str | None, typer.Option(help="per worker, such as 4GiB; default: 80 % of the machine's")]
Stitch = Annotated[str | None, typer.Option(help="gaussian, constant, nnunet, exact, ...; default: the card's")]
Overlap = Annotated[float | None, typer.Option(help="0 to below 1; default: the card's")]
Tile = Annotated[str | None, typer.Option(help="Z,Y,X; default: the card's")]
Mirroring = Annotated[
    bool | None,
    typer.Option("--mirroring/--no-mirroring", help="average over flips along the card's mirror_axes; default: yes"),
]
Precision = Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16")]
Backend = Annotated[
    str | None, typer.Option(help="torch, inductor, openvino or auto: the fastest that `tune` measured")
]
Fallback = Annotated[str | None, typer.Option(help="cpu: what a GPU has no memory for is made on the CPU")]
Limit = Annotated[int | None, typer.Option(help="only the first N studies")]
Classes = Annotated[int | None, typer.Option(help="clusters of kmeans")]
Volume = Annotated[int | None, typer.Option(help="which volume of a 4-D image, from 0")]
Part = Annotated[
    str | None, typer.Option(help="I/N: take up the I-th of N shares of the studies; N commands fill one OUT")
]
Json = Annotated[bool, typer.Option("--json", help="end stdout with one line of JSON")]


@app.command()
def segment(
    inputs: Inputs = None,
    model: Model = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="where results go")] = None,
    job: JobFile = None,
    reference: Annotated[str | None, typer.Option(help="folder of reference masks")] = None,
    engine: EngineName = None,
    workers: Workers = None,
    threads: Threads = None,
    address: Address = None,
    gpus_per_worker: GpusPerWorker = None,
    stall_minutes: StallMinutes = None,
    wait_minutes: WaitMinutes = None,
    memory: Memory = None,
    stitch: Stitch = None,
    overlap: Overlap = None,
    tile: Tile = None,
    mirroring: Mirroring = None,
    precision: Precision = None,
    backend: Backend = None,
    fallback: Fallback = None,
    formats: Annotated[str | None, typer.Option(help="comma-separated; default: nifti")] = None,
    images: Annotated[str | None, typer.Option(help="copy (default), or link OME-Zarr inputs")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="withdraw differing results")] = None,
    retry_failed: Annotated[bool | None, typer.Option("--retry-failed", help="only what failed")] = None,
    limit: Limit = None,
    part: Part = None,
    classes: Classes = None,
    volume: Volume = None,
    as_json: Json = False,
) -> None:
    """Segment scans: masks, metrics and a report go to OUT. Run it again to go on where it stopped."""
    settings = _settings(locals())
    from .main_job import segment_command

    raise typer.Exit(segment_command(settings, as_json=as_json))


@app.command()
def plan(
    inputs: Inputs = None,
    model: Model = None,
    job: JobFile = None,
    engine: EngineName = None,
    workers: Workers = None,
    threads: Threads = None,
    address: Address = None,
    gpus_per_worker: GpusPerWorker = None,
    stall_minutes: StallMinutes = None,
    wait_minutes: WaitMinutes = None,
    memory: Memory = None,
    stitch: Stitch = None,
    overlap: Overlap = None,
    tile: Tile = None,
    mirroring: Mirroring = None,
    precision: Precision = None,
    backend: Backend = None,
    limit: Limit = None,
    classes: Classes = None,
    volume: Volume = None,
    as_json: Json = False,
) -> None:
    """Say what `segment` would do: tiles, blocks, waste, projected memory and time. Nothing is written."""
    settings = _settings(locals())
    from .main_job import plan_command

    raise typer.Exit(plan_command(settings, as_json=as_json))


@app.command()
def tune(as_json: Json = False) -> None:
    """Measure once what is fast on this machine; `--precision auto`, `--backend auto` and `--threads` read it."""
    from .tune import tune_command

    raise typer.Exit(tune_command(as_json=as_json))


@app.command()
def train(
    job: Annotated[str, typer.Argument(help="a YAML file: data, labels, network, recipe; see docs/training.md")],
    out: Annotated[str, typer.Option("-o", "--out", help="the model folder to make")],
    engine: EngineName = None,
    threads: Annotated[int | None, typer.Option(help="default: all cores")] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Train a network on images and masks; a model folder comes out. Run it again to go on where it stopped."""
    from pipeline.job import read_job_file

    flags = {"engine": engine, "threads": threads, "address": address}
    settings = read_job_file(job) | {name: value for name, value in flags.items() if value is not None}
    from .train_job import train_command

    raise typer.Exit(train_command(settings, out, as_json=as_json))


@app.command()
def evaluate(
    masks: Annotated[str, typer.Argument(help="masks made by anyone: NIfTI or OME-Zarr, a file or a folder")],
    references: Annotated[str, typer.Argument(help="reference masks of the same names")],
    out: Annotated[str, typer.Option("-o", "--out", help="where OUT/metrics goes")],
    labels: Annotated[str | None, typer.Option(help='JSON with names, {"1": "liver"}; default: all labels')] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="take the names from this model's card")] = None,
    tolerance: Annotated[float, typer.Option(help="of the surface Dice, in mm")] = 1.0,
    memory: Annotated[str | None, typer.Option(help="such as 4GiB; default: 80 % of the machine's")] = None,
    as_json: Json = False,
) -> None:
    """Score masks against references: overlap, surface distances, components, means with confidence intervals."""
    from .evaluate import evaluate_command

    code = evaluate_command(
        masks, references, out, labels=labels, model=model, tolerance=tolerance, memory=memory, as_json=as_json
    )
    raise typer.Exit(code)


@app.command()
def status(
    out: Annotated[str, typer.Argument(help="a folder that `segment` wrote to")],
    as_json: Json = False,
) -> None:
    """Say what is in OUT: published, failed with its cause, interrupted with its progress."""
    from .status import status_command

    raise typer.Exit(status_command(out, as_json=as_json))


@app.command()
def demo(
    out: Annotated[str, typer.Option("-o", "--out", help="where results go")] = "demo-out",
    engine: EngineName = None,
) -> None:
    """Segment a real MR brain and three simulated CT scans, and say what was found and how good it is."""
    from .demo import demo_command

    raise typer.Exit(demo_command(out, engine or "ray"))


@app.command()
def phantom(
    out: Annotated[str, typer.Option("-o", "--out", help="folder for images/, labels/ and truth.csv")],
    count: Annotated[int, typer.Option(min=1, help="how many")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the first; the others follow")] = 0,
    shape: Annotated[str | None, typer.Option(help="Z,Y,X; default: 128,96,128")] = None,
    spacing: Annotated[str | None, typer.Option(help="mm, one number or Z,Y,X; default: the body fits")] = None,
    orientation: Annotated[str, typer.Option(help="of the voxel axes x,y,z, such as LPS")] = "RAS",
    tilt: Annotated[str | None, typer.Option(help="degrees about z,y,x by which the voxel axes are turned")] = None,
    format: Annotated[str, typer.Option(help="nifti or omezarr")] = "nifti",
    as_json: Json = False,
) -> None:
    """Make simulated CT scans with exact masks and volumes. Run it again: it makes what is missing."""
    settings = {name: value for name, value in locals().items() if value is not None and name != "as_json"}
    from .phantom import phantom_command

    raise typer.Exit(phantom_command(settings, as_json=as_json))


@models_app.command("list")
def models_list(as_json: Json = False) -> None:
    """Models and architectures that a name suffices for."""
    from .models import list_command

    list_command(as_json=as_json)


@models_app.command("show")
def models_show(name: str) -> None:
    """The facts about one model, architecture or model folder."""
    from .models import show_command

    show_command(name)


@models_app.command("check")
def models_check(path: str) -> None:
    """Check a model folder: card, weights, one tile through the network."""
    from .models import check_command

    check_command(path)


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The job file's settings with the flags that were given on top."""
    from pipeline.job import read_job_file

    given = {name: value for name, value in arguments.items() if value is not None and name not in ("as_json", "job")}
    if not given.get("inputs"):
        given.pop("inputs", None)
    settings = read_job_file(arguments["job"]) if arguments["job"] else {}
    settings |= given
    for name, flag in (("inputs", "INPUT"), ("model", "-m MODEL"), ("out", "-o OUT")):
        if name not in settings and name in arguments:
            raise UsageError(f"give {flag} (or {name!r} in a job file)")
    return settings


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; errors become one line on stderr and the exit code of the contract."""
    from segmodels.errors import ModelError

    try:
        code = command()
    except (UsageError, ModelError) as error:
        print(f"maskmill: {error}", file=sys.stderr)
        return 2
    except ObjectStoreError as error:  # before anything began: what a run meets is told study by study
        print(f"maskmill: {error.strerror}", file=sys.stderr)
        return 2
    except CommandLineError as error:  # typer's own: an unknown flag, a missing value
        error.show()
        return error.exit_code
    except StudyError as error:
        print(f"maskmill: {error.cause}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if code == INTERRUPTED:  # which typer also makes of Ctrl-C, without a word
        print("maskmill: interrupted; run it again to go on", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The script `maskmill`."""
    signal.signal(signal.SIGTERM, _interrupt)
    # While Ray starts its handler gets a SIGTERM first, and sets an alarm to abort this process in the midst of ending.
    # Blocked before there are threads, it is blocked in all of them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    sys.exit(guarded(lambda: app(standalone_mode=False)))


if __name__ == "__main__":
    main()
