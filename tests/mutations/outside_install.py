"""Small faults in how the package is built, installed and given its extension."""

from tests.mutations.mutation import Mutation

_INSTALL = "tests/install/test_install.py -k"
_BUILD = "tests/openmythos_kernels/runtime/test_build.py -k"

MUTATIONS = [
    Mutation(
        "install: the backend is shown only what build isolation leaves",
        "building/backend.py",
        '_ISOLATION = ("PYTHONPATH", "PYTHONNOUSERSITE")',
        "_ISOLATION = ()",
        f"{_INSTALL} without_a_compiler",
    ),
    Mutation(
        "install: a wheel without the extension is for one Python and platform",
        "building/wheel.py",
        "self.root_is_pure = True",
        "pass",
        f"{_INSTALL} without_pytorch",
    ),
    Mutation(
        "install: an earlier build's extension stays where a build failed",
        "building/extension.py",
        "path.unlink(missing_ok=True)",
        "pass",
        f"{_INSTALL} before",
    ),
    Mutation(
        "install: the source distribution has no headers",
        "MANIFEST.in",
        "graft csrc",
        "recursive-include csrc *.cpp",
        f"{_INSTALL} holds_every_source",
    ),
    Mutation(
        "install: PyTorch is a build requirement",
        "pyproject.toml",
        'requires = ["setuptools>=77"]',
        'requires = ["setuptools>=77", "torch>=2.9"]',
        f"{_INSTALL} requirements",
    ),
    Mutation(
        "install: the sources are left out of the wheel",
        "building/wheel.py",
        "if self.editable_mode:",
        "if not self.editable_mode:",
        f"{_INSTALL} without_a_compiler",
    ),
    Mutation(
        "build: who waited compiles again",
        "openmythos_kernels/runtime/build.py",
        "if not file(folder).exists():  # no other",
        "if True:  # no other",
        f"{_BUILD} waits",
    ),
    Mutation(
        "build: who waited for a failure tries the same again",
        "openmythos_kernels/runtime/build.py",
        "if reason := lock.read():",
        'if reason := "":',
        f"{_BUILD} failure",
    ),
    Mutation(
        "build: changed sources find the old extension",
        "openmythos_kernels/runtime/build.py",
        'digest.update(f"\\0{name}\\0".encode() + path.read_bytes())',
        'digest.update(f"\\0{name}\\0".encode())',
        f"{_BUILD} compiles_once",
    ),
    Mutation(
        "extension: one for another PyTorch is loaded before it is judged",
        "openmythos_kernels/runtime/extension.py",
        'if wrong := _unfit(record.get("torch", torch.__version__), record.get("capability", "")):',
        'if wrong := "":',
        "tests/openmythos_kernels/runtime/test_extension.py -k another",
    ),
    Mutation(
        "extension: the recorded reason is not told",
        "openmythos_kernels/runtime/extension.py",
        'if record.get("reason") else ""',
        'if record.get("no reason") else ""',
        "tests/openmythos_kernels/runtime/test_extension.py -k missing",
    ),
    Mutation(
        "huge pages: names of mapped files are text",
        "openmythos_kernels/runtime/huge_pages.py",
        "text = _MAPS.read_bytes()",
        "text = _MAPS.read_text().encode()",
        "tests/openmythos_kernels/runtime/test_huge_pages.py -k any_name",
    ),
    Mutation(
        "huge pages: names of mapped files may end a line",
        "openmythos_kernels/runtime/huge_pages.py",
        'text.split(b"\\n")',
        "text.splitlines()",
        "tests/openmythos_kernels/runtime/test_huge_pages.py -k any_name",
    ),
]
