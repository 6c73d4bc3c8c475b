"""Build the native core with the package; an installation without a C++ compiler goes on without.

All other settings are in pyproject.toml.
"""

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path(__file__).parent / "src" / "retort" / "ops" / "native"


def _builder() -> ModuleType:
    """``build.py`` by its path: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("retort_native_build", NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Compile the core where setuptools would put an extension module."""

    def build_extension(self, ext: Extension) -> None:
        builder = _builder()
        try:
            builder.build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except builder.BuildError as error:
            warnings.warn(f"native core not built, PyTorch will do its work: {error}", stacklevel=1)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class PlatformWheel(bdist_wheel):
    """The library calls no Python function: one wheel serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("retort.ops.native.libretort", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
