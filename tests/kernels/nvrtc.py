"""NVIDIA's runtime compiler, which CuPy uses too; it needs no GPU and no driver."""

import ctypes
import importlib.util
from pathlib import Path


def find():
    """The library of the wheel nvidia-cuda-nvrtc, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations]
    found = [path for folder in folders for path in folder.glob("**/libnvrtc.so.*") if "alt" not in path.name]
    return ctypes.CDLL(str(found[0])) if found else None


def compile_kernel(nvrtc, text, name, architecture):
    """Compile to machine code; returns it and what the compiler said."""
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None) == 0
    options = [f"--gpu-architecture=sm_{architecture}".encode(), b"-std=c++17", b"-ftz=true"]  # CuPy adds the last
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    said = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
    code = _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program) if status == 0 else b""
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code, said


def _read(size_of, content_of, program):
    size = ctypes.c_size_t()
    assert size_of(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert content_of(program, buffer) == 0
    return buffer.raw
