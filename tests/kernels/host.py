"""The CUDA kernels, compiled for the CPU and launched there by the library's own launching code."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache, lru_cache
from pathlib import Path

from nnturbo.kernels import loader

HERE = Path(__file__).parent
# Each sum and product rounded for itself, as the kernels ask a GPU to.
FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unknown-pragmas",
         "-Werror", "-fPIC", "-pthread")  # fmt: skip
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")

ONE_PIECE_A_BLOCK = (
    "resample_axis", "instance_norm_sums", "instance_norm_scales", "instance_norm_apply", "convolve",
    "convolve_points", "upsample",
)  # fmt: skip
"""Kernels whose blocks do what their number says; the others' go on until nothing is left."""

compiler = shutil.which("g++")


class HostKernels:
    """In the place of `loader.launch`.

    Args:
        folder: Where libraries are built.
        options: More of the compiler's.
        threads: Of a block, unless a launch says; fewer than on a GPU, since each is a thread here.
    """

    def __init__(self, folder, options=(), threads=(8, 2)):
        self.folder = Path(folder)
        self.options = options
        self.threads = threads
        self.launches = 0

    def __call__(self, kernel, dtype, arguments, *, device, blocks, lines=None, threads=None, shared_bytes=0):
        assert shared_bytes <= 48 * 1024
        assert 0 < blocks < 2**31
        library = self._library(kernel, dtype, lines)
        values = (ctypes.c_longlong * len(arguments))(*arguments)
        # One line after another needs no more rows of threads than these.
        blocks = blocks if kernel in ONE_PIECE_A_BLOCK else min(blocks, 3)
        library.launch(values, blocks, *(threads or self.threads), ctypes.c_size_t(shared_bytes))
        self.launches += 1

    @cache  # noqa: B019, lives as long as the tests
    def _library(self, kernel, dtype, lines):
        before, after = f'#include "host.h"\n#define KERNEL {kernel}\n', '\n#include "host_end.h"\n'
        stem = self.folder / f"{kernel}-{str(dtype).removeprefix('torch.')}-{lines}"
        stem.with_suffix(".cpp").write_text(before + loader.source(kernel, dtype, lines) + after)
        self._compile_header()
        self._compile("-shared", f"-I{HERE}", stem.with_suffix(".cpp"), "-o", stem.with_suffix(".so"))
        return ctypes.CDLL(str(stem.with_suffix(".so")))

    @cache  # noqa: B019, lives as long as the tests
    def _compile_header(self):
        """Compile once what is most of each kernel's compiling; the compiler finds it beside the kernels."""
        shutil.copy(HERE / "host.h", self.folder)
        self._compile("-x", "c++-header", self.folder / "host.h", "-o", self.folder / "host.h.gch")

    def _compile(self, *arguments):
        # What watches this process's memory is not for the compiler.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        subprocess.run([compiler, *FLAGS, *self.options, *map(str, arguments)], check=True, env=environment)


@lru_cache(maxsize=1)
def host_kernels():
    """Without sanitizers, built once."""
    return HostKernels(tempfile.mkdtemp(prefix="nnturbo-kernels-"))
