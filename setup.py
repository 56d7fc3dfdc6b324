"""Builds the C++ kernels with the package; everything else stands in pyproject.toml.

Without a C++ compiler the package installs all the same and runs in torch, which `hymba info` then says.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/hymba/ops/native")

spec = importlib.util.spec_from_file_location("hymba_native_build", NATIVE / "build.py")
assert spec is not None
assert spec.loader is not None
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)


class BuildKernels(build_ext):
    """Compile the kernels' shared libraries to where the package looks for them."""

    def run(self) -> None:
        """Build into the source tree for an editable installation, else into the wheel."""
        target = NATIVE if self.inplace or self.editable_mode else Path(self.build_lib) / "hymba/ops/native"
        try:
            kernels.build(target.resolve())
        except kernels.BuildError as error:
            print(f"warning: installing without the C++ kernels: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """Return the files that were built, for the list of installed ones."""
        built = (Path(self.build_lib) / "hymba/ops/native" / f"hymba_{level}.so" for level in kernels.levels())
        return [str(path) for path in built if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Return nothing: in an editable installation the libraries lie in the source tree already."""
        return {}


# The extension makes setuptools run the command above and mark the wheel with the platform.
setup(ext_modules=[Extension("hymba.ops.native.kernels", sources=[])], cmdclass={"build_ext": BuildKernels})
