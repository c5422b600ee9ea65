"""`pip install .` as a new user runs it: with a compiler, without one, without PyTorch, from a source distribution."""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from tests.install.environment import ROOT, Environment, checkout, sdist

# Prints which backends run a small model after the swap, and how far its logits are from those before.
MODEL = """
import warnings, torch, openmythos_kernels
from openmythos import MythosConfig, OpenMythos
torch.manual_seed(0)
model = OpenMythos(MythosConfig(
    vocab_size=37, dim=24, n_heads=2, n_kv_heads=1, max_seq_len=24, max_loop_iters=2, prelude_layers=1, coda_layers=1,
    kv_lora_rank=10, q_lora_rank=9, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5, n_experts=5,
    n_shared_experts=1, n_experts_per_tok=2, expert_dim=7, lora_rank=3)).eval()
ids = torch.arange(18).view(2, 9)
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    before = model(ids)
    openmythos_kernels.accelerate(model)
    apart = (model(ids) - before).abs().max().item()
print("file", openmythos_kernels.__file__)
print("warnings", len(caught), *[str(w.message) for w in caught])
print("backends", *sorted({row.backend for row in openmythos_kernels.report(model)}))
print("apart", apart)
"""

DESCRIBE_AND_BUILD = """
from openmythos_kernels.runtime import info
print(info.describe(), flush=True)
try:
    openmythos_kernels.build()
except RuntimeError as error:
    print("build:", error)
"""


def rows(text: str) -> dict[str, str]:
    return dict(line.partition(" ")[::2] for line in text.splitlines() if " " in line)


def installed(environment: Environment) -> Path:
    return environment.site / "openmythos_kernels"


def record(environment: Environment) -> dict:
    return json.loads((installed(environment) / "_build.json").read_text())


@pytest.fixture
def source(tmp_path):
    return checkout(tmp_path / "checkout")


def test_source_distribution_has_every_source(source, tmp_path):
    with tarfile.open(sdist(source, tmp_path / "dist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        path.relative_to(source).as_posix()
        for pattern in ("csrc/**/*.*", "building/*.py", "openmythos*/**/*.*", "setup.py", "pyproject.toml", "README.md")
        for path in source.glob(pattern)
    }
    assert len(wanted) > 100 and wanted <= names, wanted - names


def test_pytorch_is_no_build_requirement():
    from setuptools.compat.py310 import tomllib

    from building.extension import OLDEST_TORCH

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not [name for name in project["build-system"]["requires"] if "torch" in name]
    assert f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}" in project["project"]["dependencies"]


def test_without_a_compiler(source, tmp_path):
    """`info` shows the reason; a single warning gives the reason and says how to build later."""
    environment = Environment(tmp_path, packages=True, CC="/no/compiler", CXX="/no/compiler")
    said = environment.pip("install", "--no-deps", str(source))
    assert "0_without_cpp_extension-py3-none-any.whl" in said, said
    said = environment.run(
        "-c", f"{MODEL}\n{DESCRIBE_AND_BUILD}"
    )  # in one process, since importing PyTorch takes most of the time
    ran, reason = rows(said), "there is no C++ compiler that runs (/no/compiler: No such file or directory)"
    assert (
        ran["file"].startswith(str(environment.site)) and ran["backends"] == "reference" and float(ran["apart"]) < 1e-6
    )
    assert ran["warnings"].startswith("1 ") and reason in ran["warnings"] and "build()" in ran["warnings"]
    info, _, built = said.partition("build: ")
    assert (
        "NOT loaded" in info and f"reason  the C++ extension was not built when this was installed: {reason}" in info
    ), info
    assert built.startswith(reason), built


def test_without_pytorch(source, tmp_path):
    """Nothing is downloaded to compile against; once PyTorch is installed, the reason is shown."""
    environment = Environment(tmp_path, packages=False)
    said = environment.pip("install", "--no-deps", str(source))
    assert "0_without_cpp_extension-py3-none-any.whl" in said, said
    for file in (file for package in ("openmythos", "openmythos_kernels") for file in (source / package).rglob("*.*")):
        assert (environment.site / file.relative_to(source)).is_file(), file
    environment.show_packages()
    info = environment.run("-m", "openmythos_kernels", "info")
    assert (
        "there was no PyTorch in the environment that it was built in; openmythos_kernels.build() compiles it" in info
    )


def test_a_failed_build_removes_the_extension_built_before(source, tmp_path):
    """Both in the build folder and in place."""
    environment = Environment(tmp_path, packages=True, CXX="/no/compiler")
    suffix = environment.run("-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").strip()
    for arguments, target in (
        ("build", "build/lib.old/openmythos_kernels"),
        ("build_ext --inplace", "openmythos_kernels"),
    ):
        file = source / target / f"_C{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"of other sources")
        code = f"import os, runpy, sys; os.chdir({str(source)!r}); sys.argv = ['setup.py', *{arguments.split()}]"
        code += "\nif sys.argv[1] == 'build': sys.argv += ['--build-lib', 'build/lib.old']"
        said = environment.run("-c", f"{code}\nrunpy.run_path('setup.py', run_name='__main__')")
        assert "was NOT built" in said and not file.exists(), said
        assert "no C++ compiler" in json.loads(file.with_name("_build.json").read_text())["reason"]


@pytest.mark.slow  # compiles everything
def test_a_source_distribution_becomes_an_extension(source, tmp_path):
    """The archive is built into a wheel against the installed PyTorch, and a model runs on its C++ kernels."""
    # What is compiled counts here, not how fast it runs: without optimization that takes two thirds of the time.
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/bash\nexec c++ "${@/#-O3/-O0}"\n')
    compiler.chmod(0o755)
    environment = Environment(tmp_path, packages=True, CXX=str(compiler))
    said = environment.pip("install", "--no-deps", str(sdist(source, tmp_path / "dist")))
    assert f"1_cpp_extension_for_torch_{torch.__version__.partition('+')[0]}-cp" in said, said
    ran = rows(environment.run("-c", MODEL))
    assert ran["file"].startswith(str(environment.site)) and ran["warnings"] == "0"
    assert "cpu" in ran["backends"].split() and float(ran["apart"]) < 1e-4
    made_for = record(environment)
    assert made_for["torch"] == torch.__version__ and made_for["reason"] == ""
    # The same file, recorded as built for another PyTorch, is not loaded.
    (installed(environment) / "_build.json").write_text(json.dumps({**made_for, "torch": "2.8.0"}))
    assert "was built for torch 2.8.0 but torch" in environment.run("-m", "openmythos_kernels", "info")


@pytest.mark.slow  # compiles everything
def test_an_installation_without_extension_can_build_it_later(source, tmp_path):
    """`OPENMYTHOS_BUILD=1` builds into the cache at the first import; later processes find the extension there."""
    environment = Environment(tmp_path, packages=False)
    environment.pip("install", "--no-deps", str(source))
    environment.show_packages()
    said = environment.run("-c", MODEL, OPENMYTHOS_BUILD="1")
    assert "compiling the C++ extension for torch" in said and "bindings.cpp" in said and "is ready after" in said, said
    for text in (said, environment.run("-c", MODEL)):
        ran = rows(text)
        assert ran["warnings"] == "0" and "cpu" in ran["backends"].split() and float(ran["apart"]) < 1e-4
    assert str(tmp_path / "cache") in environment.run("-m", "openmythos_kernels", "info")
