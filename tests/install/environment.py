"""Virtual environments like a user's, in which pip has no index, and PyTorch is present or not."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = sysconfig.get_paths()["purelib"]
HIDDEN = ("PYTHONPATH", "PYTHONNOUSERSITE", "CC", "CXX", "OPENMYTHOS_BUILD")


def checkout(folder: Path) -> Path:
    """Copies the files of the repository that an installation needs, without build products."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("building", "csrc", "openmythos", "openmythos_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json"))
    return folder


def wheel_of(distribution: str, folder: Path) -> None:
    """Repacks an installed distribution as a wheel, so that pip can install it without a network."""
    found = importlib.metadata.distribution(distribution)
    text = found.read_text("WHEEL")
    tag = next(line.partition(": ")[2] for line in text.splitlines() if line.startswith("Tag: "))
    scripts = f"{distribution}-{found.version}.data/scripts"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{distribution}-{found.version}-{tag}.whl", "w") as wheel:
        for path in found.files:
            if path.suffix != ".pyc" and "__pycache__" not in path.parts:
                name = f"{scripts}/{path.name}" if ".." in path.parts else path.as_posix()
                wheel.write(found.locate_file(path), name)


class Environment:
    """A virtual environment; `show_packages` makes the packages of this one visible to it, like those of a system."""

    def __init__(self, folder: Path, *, packages: bool, **variables: str):
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
        self.variables = {
            **{name: value for name, value in os.environ.items() if name not in HIDDEN},
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(folder / "wheels"),
            "OPENMYTHOS_CACHE": str(folder / "cache"),
            **variables,
        }
        for distribution in ("setuptools", "ninja"):
            wheel_of(distribution, folder / "wheels")
        if packages:
            self.show_packages()

    variables = None

    def show_packages(self) -> None:
        (self.site / "system.pth").write_text(SITE)

    def pip(self, *arguments: str) -> str:
        """Runs this environment's pip with the Python of the virtual one, and returns its output."""
        return self.run(str(Path(SITE) / "pip"), *arguments)

    def run(self, *arguments: str, **variables: str) -> str:
        """Runs Python in an empty folder and returns its output and errors, or raises AssertionError with them."""
        environment = None if self.variables is None else {**self.variables, **variables}
        (self.folder / "empty").mkdir(exist_ok=True)
        run = subprocess.run(
            [str(self.python), *arguments],
            cwd=self.folder / "empty",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert run.returncode == 0, run.stdout
        return run.stdout


def sdist(source: Path, folder: Path) -> Path:
    """Builds the source distribution of a checkout."""
    code = (
        f"import sys; sys.path.insert(0, '.'); from building.backend import build_sdist; build_sdist({str(folder)!r})"
    )
    folder.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))
