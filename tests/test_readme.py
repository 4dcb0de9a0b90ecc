"""README and docs: what they tell people to type is typed here, what they name exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *(f"docs/{n}.md" for n in ("models", "nightly", "cluster", "phantoms", "training")))
PAGES = [str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
SCRIPT = Path(sys.executable).with_name("maskmill")


def blocks(document: str) -> Iterator[tuple[list[str], str]]:
    """Words after the fence ("sh", "python not-run", ...) and text of each fenced block."""
    text = (ROOT / document).read_text()
    for words, body in re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield words.split(), body


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with scans/, data/images/ and data/masks/ in it, as the documents assume."""
    for number in range(2):
        voxels = np.random.default_rng(number).normal(100, 20, (40, 30, 20)).astype(np.int16)
        path = tmp_path / "scans" / f"site{number}" / "t1.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 2, 1])), path)
    for number in range(3):
        mask = np.zeros((40, 40, 24), np.uint8)
        mask[8:24, 10:30, 6:18], mask[12:18, 14:22, 9:14] = 1, 2
        voxels = np.random.default_rng(number).normal(60, 10, mask.shape) + 40 * mask
        for part, data in (("images", voxels.astype(np.int16)), ("masks", mask)):
            path = tmp_path / "data" / part / f"case{number}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    return tmp_path


SLOW = ("docs/training.md",)  # it trains


@pytest.mark.parametrize(
    "document", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in DOCUMENTS]
)
def test_what_the_documents_say_to_type_works(document: str, folder: Path) -> None:
    ran = 0
    for words, body in blocks(document):
        if words == ["sh"]:
            for line in body.splitlines():
                command = shlex.split(line, comments=True)
                if command[:1] == ["maskmill"]:
                    run([str(SCRIPT), *command[1:]], folder)
                elif command[:1] == ["make"]:
                    run(["make", "-n", *command[1:]], ROOT)
                else:
                    assert command[:1] in ([], ["."]), f"{document}: what is to be done with {line!r}?"
        elif words == ["yaml", "job.yaml"]:
            (folder / "job.yaml").write_text(re.sub(r"minutes: [0-9.]+", "steps: 2", body))
        elif words == ["python"]:
            run([sys.executable, "-c", body], folder)
        else:
            check_unrun(words, body)
        ran += 1
    assert ran


def run(command: list[str], folder: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def check_unrun(words: list[str], body: str) -> None:
    """What cannot be run here: its flags and settings exist, its code compiles."""
    if words[0] == "python":
        compile(body, "document", "exec")
    elif words[0] == "yaml":
        import yaml

        from pipeline.job import make_job

        make_job(yaml.safe_load(body))
    elif words[0] in ("sh", "crontab", "ini"):
        for command, rest in re.findall(r"\bmaskmill (segment|evaluate) (.*)", body):
            help_text = subprocess.run([SCRIPT, command, "--help"], capture_output=True, text=True, check=True).stdout
            for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest.partition("#")[0]):
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_text), f"{flag} is no flag of {command}"
    else:
        raise AssertionError(f"a block of kind {words} is not checked")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for path, test in re.findall(
        r"((?:tests|pipeline|segmodels|cluster|flows|benchmarks)/[\w/]+\.py)(?:::(\w+))?", text
    ):
        assert (ROOT / path).is_file(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def test_make_knows_what_the_documents_call() -> None:
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for targets in re.findall(r"`make ([a-z ]+)", (ROOT / page).read_text()):
            assert set(targets.split()) <= known, targets


def test_every_guarantee_names_its_test() -> None:
    guarantees = (ROOT / "README.md").read_text().split("## Guarantees")[1].split("\n## ")[0]
    rows = [line for line in guarantees.splitlines() if line.startswith("| **")]
    assert len(rows) == 7
    assert all("tests/" in row for row in rows)


def test_the_memory_formula_of_the_documents_is_the_one_that_runs() -> None:
    """The table of docs/engine.md, evaluated, against `arrays_bytes`."""
    from pipeline.grid import Shards
    from pipeline.lattice import Lattice
    from pipeline.planning import Extent, Needs, arrays_bytes
    from pipeline.tiling import Tiling, make_grid

    cells = re.findall(r"^\| [\w ]+ \| ([^|]+) \|[^|]*\|$", (ROOT / "docs/engine.md").read_text(), re.MULTILINE)
    formulas = [c for c in cells if c.strip() not in ("bytes", "---")]
    assert len(formulas) == 13
    shape, window, margin = (300, 400, 500), (60, 70, 80), (4, 4, 4)
    lattice = Lattice(shape, (200, 300, 400), orders=(3, 3, 3))
    grid, shards = make_grid(lattice, Tiling(window, 0.5, margin)), Shards(shape, (64, 128, 128))
    needs = Needs(2, 5, 2, (64, 64, 64), 1, False, fitted_values=999, uncertainty_fields=2, half=True)
    z, y, x = Extent(128, 86), Extent(128, 97), Extent(256, 206)
    p, q = (n + 2 * (t - 1) + 8 for n, t in ((97, 62), (206, 72)))
    values = {
        "C": 2, "K": 5, "d": 60, "D": 52, "R": 128, "S": 86, "H": 128, "W": 256, "P": 97, "Q": 206, "p": p, "q": q,
        "h": lattice.reach(1, p), "w": lattice.reach(2, q), "s": 2, "r": 64, "k": 64**3, "l": 1, "T": 52 * 62 * 72,
        "v": 999, "U": 2, "f": 1, "t": 26,
    }  # fmt: skip
    total = sum(eval(python_of(formula), {"min": min}, dict(values)) for formula in formulas)  # noqa: S307  our own text
    assert sum(arrays_bytes(z, y, x, lattice, grid, shards, needs)) == total


def python_of(formula: str) -> str:
    """`4 C d h w` as `4*C*d*h*w`; `x` and a space multiply."""
    text = re.sub(r"\s+x\s+", " ", formula.strip())
    return re.sub(r"(?<=[\w)])\s+(?=[\w(])", "*", text)
