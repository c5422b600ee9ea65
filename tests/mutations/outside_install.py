"""Small faults in how the package is built and installed, and in how it finds its extension."""

from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "install: the build backend sees only the isolated environment",
        "building/backend.py",
        '_ISOLATION = ("PYTHONPATH", "PYTHONNOUSERSITE")',
        "_ISOLATION = ()",
        "tests/install/test_install.py -k without_a_compiler",
    ),
    Mutation(
        "install: a wheel without the extension is tied to one Python and platform",
        "building/wheel.py",
        "self.root_is_pure = True",
        "pass",
        "tests/install/test_install.py -k without_pytorch",
    ),
    Mutation(
        "install: the extension of an earlier build remains after a failed build",
        "building/extension.py",
        "path.unlink(missing_ok=True)",
        "pass",
        "tests/install/test_install.py -k before",
    ),
    Mutation(
        "install: the source distribution lacks headers",
        "MANIFEST.in",
        "graft csrc",
        "recursive-include csrc *.cpp",
        "tests/install/test_install.py -k has_every_source",
    ),
    Mutation(
        "install: PyTorch is a build requirement",
        "pyproject.toml",
        'requires = ["setuptools>=77"]',
        'requires = ["setuptools>=77", "torch>=2.9"]',
        "tests/install/test_install.py -k build_requirement",
    ),
    Mutation(
        "install: the wheel lacks the C++ sources",
        "building/wheel.py",
        "if self.editable_mode:",
        "if not self.editable_mode:",
        "tests/install/test_install.py -k without_a_compiler",
    ),
    Mutation(
        "build: a process that waited for the lock compiles again",
        "openmythos_kernels/runtime/build.py",
        "if not file(folder).exists():  # no other",
        "if True:  # no other",
        "tests/openmythos_kernels/runtime/test_build.py -k waits",
    ),
    Mutation(
        "build: a process that waited for a failed build repeats it",
        "openmythos_kernels/runtime/build.py",
        "if reason := lock.read():",
        'if reason := "":',
        "tests/openmythos_kernels/runtime/test_build.py -k failure",
    ),
    Mutation(
        "build: changed sources load the old extension",
        "openmythos_kernels/runtime/build.py",
        'digest.update(f"\\0{name}\\0".encode() + path.read_bytes())',
        'digest.update(f"\\0{name}\\0".encode())',
        "tests/openmythos_kernels/runtime/test_build.py -k compiles_once",
    ),
    Mutation(
        "extension: one built for another PyTorch is loaded without a check",
        "openmythos_kernels/runtime/extension.py",
        'if wrong := _unfit(record.get("torch", torch.__version__), record.get("capability", "")):',
        'if wrong := "":',
        "tests/openmythos_kernels/runtime/test_extension.py -k another",
    ),
    Mutation(
        "extension: the recorded reason is not shown",
        "openmythos_kernels/runtime/extension.py",
        'if record.get("reason") else ""',
        'if record.get("no reason") else ""',
        "tests/openmythos_kernels/runtime/test_extension.py -k missing",
    ),
    Mutation(
        "huge pages: names of mapped files must be valid text",
        "openmythos_kernels/runtime/huge_pages.py",
        "text = _MAPS.read_bytes()",
        "text = _MAPS.read_text().encode()",
        "tests/openmythos_kernels/runtime/test_huge_pages.py -k any_name",
    ),
    Mutation(
        "huge pages: a line break in the name of a mapped file ends the line",
        "openmythos_kernels/runtime/huge_pages.py",
        'text.split(b"\\n")',
        "text.splitlines()",
        "tests/openmythos_kernels/runtime/test_huge_pages.py -k any_name",
    ),
]
