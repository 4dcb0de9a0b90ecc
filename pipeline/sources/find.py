"""Find the studies that a list of INPUTs names, and give each its name.

The result depends on what is on disk, not on the order of the INPUTs: studies come sorted by name, then by
location. Nothing is opened but the metadata of folders that may be OME-Zarr and, where two studies would have
one name, the content of the later one.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from urllib.parse import unquote, urlsplit

from pipeline import objects, store
from pipeline.errors import StudyError, UsageError
from pipeline.sources.base import Found, Kind, Study
from pipeline.sources.names import NIFTI_ENDINGS, VIDEO_ENDINGS, channel_number, study_name
from pipeline.sources.ome_metadata import looks_like_ome_zarr
from pipeline.sources.stream import ByteStream

Candidate = Study | tuple[str, StudyError]

_KINDS_READ = "expected .nii, .nii.gz, an OME-Zarr folder, or a folder of these"
_LATER = "DICOM, video and folders of frames are not supported by this version yet"
_LATER_ENDINGS = (*VIDEO_ENDINGS, ".dcm", ".dicom", ".ima", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def find_studies(inputs: Sequence[str], *, exclude: str | None, channels: bool = True) -> Found:
    """All studies that the INPUTs (files, folders, URLs of local ones or of an object store) name, each once, with
    unique names.

    `exclude` (OUT) is not searched where it lies inside an INPUT, nor is the OUT of another run. `channels`: whether
    files that end in _0000, _0001, ... are channels of one study; masks never are. What cannot become a study is a
    failure beside the others: (the path as the user knows it, StudyError("input")).
    """
    skipped = None if exclude is None else _real(_path_of(exclude))
    studies: list[Study] = []
    failures: list[tuple[str, StudyError]] = []
    for given in dict.fromkeys(inputs):
        for candidate in _candidates(given, skipped, channels):
            if isinstance(candidate, Study):
                studies.append(candidate)
            else:
                failures.append(candidate)
    unique, clashes = _with_unique_names(_each_once(studies))
    return Found(unique, sorted([*failures, *clashes], key=lambda failure: failure[0]))


def _candidates(given: str, skipped: str | None, channels: bool) -> Iterator[Candidate]:
    try:
        path = _path_of(given)
        if _is_result(path, skipped):
            yield given, StudyError("input", "it is the output folder; name the folder of the scans")
            return
        if not _is_folder(path):
            yield _explicit_file(given, path)
            return
    except StudyError as error:
        yield given, error
        return
    except (OSError, ValueError) as error:
        yield given, _unreadable(error)
        return
    empty = True
    for candidate in _explicit_folder(given, path, skipped, channels):
        yield candidate
        empty = False
    if empty:
        yield given, StudyError("input", f"there is no study in this folder: {_KINDS_READ} ({_LATER})")


def _path_of(given: str) -> str:
    """The absolute path of a local INPUT, or its URL in an object store; StudyError for other addresses."""
    try:
        if objects.is_remote(given):
            return "/".join(part for part in objects.bucket_and_key(given) if part)
    except UsageError as error:
        raise StudyError("input", str(error)) from None
    if "://" not in given:
        return os.path.abspath(given)
    url = urlsplit(given)
    if url.netloc not in ("", "localhost"):
        raise StudyError("input", "a file:// URL names a file of this machine: file:///path")
    return os.path.abspath(unquote(url.path, errors="surrogateescape"))


def _real(path: str) -> str:
    """The one name of a place: where links lead to."""
    return path if objects.is_remote(path) else os.path.realpath(path)


def _is_folder(path: str) -> bool:
    """Raises OSError where there is nothing."""
    if not objects.is_remote(path):
        return stat.S_ISDIR(os.stat(path).st_mode)
    if objects.is_object(path):
        return False
    if objects.exists(path):
        return True
    raise FileNotFoundError(errno.ENOENT, "not in the object store")


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in one, sorted, without hidden ones."""
    if objects.is_remote(folder):
        folders, files = objects.listing(folder)
    else:
        names = sorted(os.listdir(folder))
        folders = [name for name in names if os.path.isdir(os.path.join(folder, name))]
        files = [name for name in names if name not in set(folders)]
    return [name for name in folders if name[0] != "."], [name for name in files if name[0] != "."]


def _unreadable(error: Exception) -> StudyError:
    if isinstance(error, objects.ObjectStoreError):
        return StudyError("storage", f"it could not be read: {error.strerror}")
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no usable path"
    return StudyError("input", f"it could not be read: {reason}")


def _explicit_file(given: str, path: str) -> Candidate:
    name = os.path.basename(path)
    if not objects.is_remote(path) and not os.path.isfile(path):
        return given, StudyError("input", "it is neither a regular file nor a folder")
    if name.lower().endswith(NIFTI_ENDINGS):
        return Study(study_name(name), given, (path,), "nifti")
    if name.lower().endswith(_LATER_ENDINGS) or _is_dicom(path):
        return given, StudyError("input", f"{_LATER}; {_KINDS_READ}")
    return given, StudyError("input", f"it is of no known kind: {_KINDS_READ}")


def _is_dicom(path: str) -> bool:
    with ByteStream(path) as stream:
        return stream.read(132)[128:] == b"DICM"


def _explicit_folder(given: str, path: str, skipped: str | None, channels: bool) -> Iterator[Candidate]:
    if looks_like_ome_zarr(path):
        yield Study(study_name(os.path.basename(path)), given, (path,), "ome-zarr")
        return
    yield from _search(given, path, "", skipped, channels, seen=set())


def _is_result(path: str, out: str | None) -> bool:
    """Whether a path is OUT or one of the images and masks in it: a run does not read what it writes."""
    if out is None:
        return False
    real = _real(path)
    results = (os.path.join(out, "images"), os.path.join(out, "masks"))
    return real in (out, *results) or real.startswith(tuple(folder + os.sep for folder in results))


def _search(
    given: str, top: str, inside: str, skipped: str | None, channels: bool, seen: set[str]
) -> Iterator[Candidate]:
    """Everything below `top/inside`, sorted; each real folder once, so that loops of links end."""
    folder = os.path.join(top, inside) if inside else top
    shown = os.path.join(given, inside) if inside else given
    real = _real(folder)
    if real in seen or real == skipped:
        return
    seen.add(real)
    try:
        folders, files = _entries(folder)
    except OSError as error:
        yield shown, _unreadable(error)
        return
    # Where a run wrote its results, its images and masks are no new studies of the folder around it.
    if inside and "ledger" in folders and store.exists(store.join(folder, "ledger", "out.json")):
        return
    scans = [name for name in files if name.lower().endswith(NIFTI_ENDINGS)]
    yield from _nifti_studies(top, inside, shown, scans, channels)
    for entry in folders:
        path, name = os.path.join(folder, entry), os.path.join(inside, entry)
        if looks_like_ome_zarr(path):
            if _real(path) != skipped:
                yield Study(study_name(name), os.path.join(given, name), (path,), "ome-zarr")
        else:
            yield from _search(given, top, name, skipped, channels, seen)


def _nifti_studies(top: str, inside: str, shown: str, files: list[str], channels: bool) -> Iterator[Candidate]:
    """The NIfTI files of one folder: channels of one study if all are numbered (and may be), else a study each."""
    folder = os.path.join(top, inside) if inside else top
    numbers = [channel_number(name) for name in files]
    if not channels or not files or None in numbers:
        for name in files:
            path = os.path.join(folder, name)
            if not objects.is_remote(path) and not os.path.isfile(path):  # a broken link, a pipe
                yield os.path.join(shown, name), StudyError("input", "it is not a file that can be read")
            else:
                yield Study(study_name(os.path.join(inside, name)), os.path.join(shown, name), (path,), "nifti")
        return
    by_number = sorted(zip((n for n in numbers if n is not None), files, strict=True))
    if [number for number, _ in by_number] != list(range(len(files))):
        given = ", ".join(f"_{number:04d}" for number, _ in by_number[:8]) + (", ..." if len(files) > 8 else "")
        yield (
            shown,
            StudyError(
                "input",
                f"all NIfTI files of this folder are numbered as channels of one study, but with {given}; "
                f"expected _0000 to _{len(files) - 1:04d}, each once (one folder per study)",
            ),
        )
        return
    name = study_name(inside or os.path.basename(top), whole=True)
    yield Study(name, shown, tuple(os.path.join(folder, file) for _, file in by_number), "nifti")


def _each_once(studies: list[Study]) -> list[Study]:
    """One study per real location (the first by name), sorted by name, then location."""
    first: dict[tuple[Kind, tuple[str, ...]], Study] = {}
    for study in sorted(studies, key=_order):
        first.setdefault((study.kind, _location(study)), study)
    return sorted(first.values(), key=_order)


def _order(study: Study) -> tuple[str, tuple[str, ...]]:
    return study.name, _location(study)


def _location(study: Study) -> tuple[str, ...]:
    return tuple(_real(part) for part in study.parts)


def _with_unique_names(studies: list[Study]) -> tuple[list[Study], list[tuple[str, StudyError]]]:
    """Where several studies share a name, the later ones get `-` and 6 hex digits of their content."""
    from pipeline.sources import digest_of

    taken = {study.name for study in studies}
    seen: set[str] = set()
    unique: list[Study] = []
    failures: list[tuple[str, StudyError]] = []
    for study in studies:
        if study.name not in seen:
            seen.add(study.name)
            unique.append(study)
            continue
        try:
            name = base = f"{study.name}-{digest_of(study)[:6]}"
        except StudyError as error:
            failures.append((study.source, error))
            continue
        copies = 1
        while name in taken:  # the same bytes again, or somebody's own file of that name
            copies += 1
            name = f"{base}-{copies}"
        taken.add(name)
        unique.append(Study(name, study.source, study.parts, study.kind))
    return sorted(unique, key=_order), failures
