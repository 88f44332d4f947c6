"""Builds the C++ library ``batchnorm._C``; everything else about the package stands in pyproject.toml.

The library is optional. Where it cannot be compiled the package installs without it, runs on the reference
implementation, and says so: the reason is left in ``_native_build.txt`` beside the modules, for ``batchnorm
selftest`` to show.
"""

from __future__ import annotations

import copy
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
# The kernels are compiled once for each of these, and one of the results is chosen when the program runs: a binary
# built with -march=native could not be given to anyone. The other sources stay with what every processor has.
X86_SETS = {
    "kernels_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
FLAGS = [
    *("-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"),
    "-Wno-maybe-uninitialized",  # raised inside GCC's own AVX-512 header
]
NOTE = "_native_build.txt"
# torch 2.10, the oldest version supported, as its headers spell it: 0x MM mm pp 00 00 00 00 00.
TARGET_VERSION = "0x020a000000000000"


class OptionalBuildExtension(BuildExtension):
    """Builds what can be built, and leaves a note about what could not."""

    failure = ""

    def run(self) -> None:
        """Build, and leave a note in place of the library where that fails."""
        super().run()
        # Only now does the path say where the library belongs: an editable build makes it elsewhere and copies it.
        library = Path(self.get_ext_fullpath("batchnorm._C"))
        note = library.parent / NOTE
        note.unlink(missing_ok=True)
        if not library.exists():
            text = f"the C++ library could not be compiled: {self.failure or 'the compiler failed'}"
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(text + "\n", encoding="utf-8")
            print(f"warning: {text}; batchnorm will run on its reference implementation", file=sys.stderr)

    def build_extensions(self) -> None:
        """Compile and link; whatever a missing or broken compiler raises, the package installs."""
        # The kernels of each set take as long as everything else: they are compiled side by side.
        with ThreadPoolExecutor() as pool:
            try:
                self._compile_instruction_sets(pool)
                super().build_extensions()
            except Exception as error:  # noqa: BLE001 - see above
                self.failure = (str(error).splitlines() or [type(error).__name__])[0]

    def _compile_instruction_sets(self, pool: ThreadPoolExecutor) -> None:
        """Each set's kernels with flags of their own, as objects that the extension is linked with."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return
        link = self.compiler.link_shared_object
        compiler = copy.copy(self.compiler)  # of their own: torch changes this one while it compiles
        started = [
            pool.submit(
                compiler.compile,
                [f"csrc/{name}.cpp"],
                output_dir=self.build_temp,
                extra_postargs=["-fPIC", *FLAGS, *flags],
            )
            for name, flags in X86_SETS.items()
        ]

        def link_when_compiled(objects: list[str], *arguments: Any, **options: Any) -> None:
            compiled = [path for each in started for path in each.result()]
            link([*objects, *compiled], *arguments, **options)

        self.compiler.link_shared_object = link_when_compiled


def extension() -> Any:
    """One library of all sources, for torch's and Python's stable interfaces."""
    return CppExtension(
        "batchnorm._C",
        # Relative, as setuptools demands; sorted, so that a build is reproducible.
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp") if path.stem not in X86_SETS),
        # All that is compiled in, by whatever route: what a change rebuilds, and what a source distribution holds.
        depends=sorted(
            str(path.relative_to(ROOT))
            for path in [*(ROOT / "csrc").glob("*.*"), *(ROOT / "csrc" / "kernels").glob("*.*")]
        ),
        define_macros=[("TORCH_TARGET_VERSION", TARGET_VERSION), ("Py_LIMITED_API", "0x030A0000")],
        extra_compile_args=FLAGS,
        # Named, because the extension calls torch only and its own loader would not look for it.
        libraries=["torch_cpu"],
        py_limited_api=True,
        optional=True,
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": OptionalBuildExtension.with_options(use_ninja=False)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
