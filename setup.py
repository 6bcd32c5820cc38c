import os
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDERS = ["engine", "kernels", "training", "benchmarks"]
packages = [*FOLDERS, *(f"{folder}.{package}" for folder in FOLDERS for package in find_packages(folder))]
packages.append("training.nnunet_trainers")  # nnU-Net looks into it, and wants no package there
packages.append("engine.nnunet.startup")  # Python looks into it when it starts under `nnturbo run`

compilation = SimpleNamespace(**runpy.run_path("kernels/compilation.py"))
TAGS = {
    "linux-x86_64": "manylinux_2_17_x86_64",
    "linux-aarch64": "manylinux_2_17_aarch64",
    "windows-x86_64": "win_amd64",
    "darwin-aarch64": "macosx_11_0_arm64",
}
TARGET = os.environ.get("NNTURBO_TARGET")
"""One of these, to build a wheel for another machine, with a compiler for it in CXX."""


class WithKernels(build_py):
    """Puts the library of kernels beside the Python files; an editable install compiles it when it is first used."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        system, processor = TARGET.split("-") if TARGET else compilation.here()
        path = Path(self.build_lib, "nnturbo", "kernels", compilation.library_name(system))
        for earlier in path.parent.glob("*nnturbo_kernels.*"):  # of another target
            earlier.unlink()
        try:
            command = compilation.compiler()
            if command is None:
                raise OSError("there is no C++ compiler")
            compilation.compile_kernels(command, path, system=system, processor=processor)
        except OSError as error:
            if TARGET:
                raise
            self.warn(f"without the native backend, which is the fastest one on a CPU: {error}")


class WheelOfPlatform(bdist_wheel):
    """Names a wheel that has a library by its system and processor; any Python takes it."""

    def get_tag(self):
        has_library = any(Path(self.bdist_dir, "nnturbo", "kernels").glob("*nnturbo_kernels.*"))
        if not has_library:
            return super().get_tag()
        self.root_is_pure = False
        return "py3", "none", TAGS[TARGET] if TARGET else super().get_tag()[2]


# On an index, links to files of the repository lead nowhere.
readme = re.sub(r"\[([^]]+)\]\((?!https:)[^)]+\)", r"\1", Path("README.md").read_text(encoding="utf-8"))

setup(
    long_description=readme,
    long_description_content_type="text/markdown",
    packages=["nnturbo", *(f"nnturbo.{package}" for package in packages)],
    package_dir={"nnturbo": "nnturbo", **{f"nnturbo.{package}": package.replace(".", "/") for package in packages}},
    package_data={
        "nnturbo": ["py.typed"],
        "nnturbo.engine.jobs": ["report.html"],
        "nnturbo.kernels": ["cuda/*", "cpu/*"],
    },
    cmdclass={"build_py": WithKernels, "bdist_wheel": WheelOfPlatform},
    # An editable install is a folder of links, which type checkers follow and no folder of the same name hides.
    options={"editable_wheel": {"mode": "strict"}},
)
