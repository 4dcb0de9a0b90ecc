"""The project around the code: set-up without CUDA, nothing left out unseen, packages that import late."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# These tests may run under make and in CI, whose variables are not for what they start.
PLAIN = {
    name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MASKMILL_", "GPU", "TORCH"))
}


def make_says(tmp_path: Path, *variables: str) -> list[str]:
    """The pip commands that `make setup` would run in a new environment."""
    command = ["make", "-n", "setup", f"VENV={tmp_path / 'venv'}", *variables]
    done = subprocess.run(command, cwd=ROOT, env=PLAIN, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "pip" in line and " install " in line]


def test_without_a_gpu_only_a_cpu_torch_is_asked_for(tmp_path: Path) -> None:
    *torch, rest = make_says(tmp_path, "GPU=no")
    assert len(torch) == 2
    assert all(re.search(r'"torch==[0-9.]+\+cpu"', line) for line in torch)
    assert '--index-url "https://download.pytorch.org/whl/cpu"' in torch[1]
    assert '-e ".[test]"' in rest
    assert "-c constraints.txt" in rest


def test_the_index_of_torch_can_be_named(tmp_path: Path) -> None:
    *torch, _ = make_says(tmp_path, "GPU=no", "TORCH_INDEX=https://mirror.example/cpu")
    assert '--index-url "https://mirror.example/cpu"' in torch[1]
    assert "download.pytorch.org" not in "".join(torch)


def test_with_a_gpu_torch_comes_in_the_build_that_was_asked_for(tmp_path: Path) -> None:
    torch, _ = make_says(tmp_path, "GPU=yes")
    assert re.search(r'"torch==[0-9.]+"', torch)
    assert "index-url" not in torch
    torch, _ = make_says(tmp_path, "GPU=yes", "TORCH_INDEX=https://download.pytorch.org/whl/cu128")
    assert '--extra-index-url "https://download.pytorch.org/whl/cu128"' in torch


def test_a_build_of_the_wrong_kind_ends_the_set_up(tmp_path: Path) -> None:
    """pip runs for real here, with nowhere to look: what is said must tell what to set."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    nowhere = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PATH": "/usr/bin:/bin"}
    for gpu in ("no", "yes"):
        command = ["make", "setup", f"VENV={venv}", f"GPU={gpu}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=nowhere)
        assert done.returncode != 0
        assert "set TORCH_INDEX" in done.stderr
        assert f"GPU={'no' if gpu == 'yes' else 'yes'}" in done.stderr
        assert not list(venv.glob(".torch-*"))
        assert not (venv / ".installed").exists()


def test_every_dependency_is_pinned_once() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    names = [pin.partition("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(set(names)) == len(names)
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["test"]
    asked += project["optional-dependencies"]["openvino"]
    packages = {re.match(r"[A-Za-z0-9-]+", one)[0].lower() for one in asked}  # type: ignore[index]
    assert packages - {"maskmill"} <= set(names)  # `test` asks for its other extras
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton"))]


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--nothing-left-out"], 1)])
def test_a_skipped_test_is_named_and_fails_where_nothing_may_be_left_out(
    tmp_path: Path, options: list[str], code: int
) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_runs(): pass\ndef test_cannot(): pytest.skip('no telescope is installed')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *options]
    done = subprocess.run(
        [*command, "-c", "/dev/null", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, env=PLAIN
    )
    assert "left out: 1 test: no telescope is installed" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout.splitlines()[-1]
    assert done.returncode == code


def test_a_missing_gpu_is_no_reason_to_fail(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_cannot(): pytest.skip('no GPU')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nothing-left-out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=PLAIN)
    assert "left out: 1 test: no GPU" in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("package", ["segmodels", "pipeline", "cluster", "flows"])
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    heavy = "{'torch', 'ray', 'prefect', 'zarr', 'monai', 'scipy'}"
    code = f"import sys, {package}; print(sorted(m for m in sys.modules if m in {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
