#!/usr/bin/env python3
"""Compiles the CUDA kernels with NVRTC, which needs no GPU, and prints their registers.

usage: nvrtc_check.py NVRTC_LIB_DIR KERNELS_DIR

NVRTC_LIB_DIR holds `libnvrtc.so.*` and `libnvrtc-builtins.so.*`, as in the wheel
`nvidia-cuda-nvrtc` under `nvidia/cu13/lib`. Every kernel is compiled for each architecture, with
the options of src/kernels/cuda.rs. Exit codes: 0 done; 1 NVRTC is missing, a source does not
compile, or a kernel spills registers or has a stack frame.
"""

import argparse
import ctypes
import re
import sys
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
OPTIONS = ("--fmad=false", "-default-device", "-std=c++17", "--ptxas-options=-v")

# What ptxas prints about one kernel.
PROPERTIES = re.compile(
    r"Function properties for (?P<name>\w+)\s+(?:ptxas\s*\.?\s*)?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
)


class Failed(Exception):
    """One message for the user."""


def load(folder):
    """Loads NVRTC and the built-in functions that it searches for."""
    for name in ("libnvrtc-builtins.so.*", "libnvrtc.so.*"):
        paths = [path for path in sorted(folder.glob(name)) if ".alt." not in path.name]
        if not paths:
            raise Failed(f"`{folder}` has no `{name}`")
        library = ctypes.CDLL(str(paths[-1]), ctypes.RTLD_GLOBAL)
    return library


def compile_log(nvrtc, path, architecture):
    """The log of a source that compiles."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source, name = path.read_bytes(), path.name.encode()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name, 0, None, None)
    if created != 0:
        raise Failed(f"{path}: nvrtcCreateProgram returned {created}")
    options = [f"--gpu-architecture={architecture}".encode(), *map(str.encode, OPTIONS)]
    array = (ctypes.c_char_p * len(options))(*options)
    compiled = nvrtc.nvrtcCompileProgram(program, len(options), array)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode()
    if compiled != 0:
        raise Failed(f"{path} does not compile for {architecture}:\n{text}")
    return text


def check(nvrtc, path, architecture):
    """Prints one line for each kernel of a source. Returns how many have spills or a stack
    frame."""
    log = compile_log(nvrtc, path, architecture)
    found = list(PROPERTIES.finditer(log))
    if len(found) != path.read_text().count("__global__"):
        raise Failed(f"{path}: the log of ptxas was not understood:\n{log}")
    n_failed = 0
    for kernel in found:
        problems = [
            f"{int(kernel[group])} bytes of {what}"
            for group, what in (
                ("stack", "stack frame"),
                ("stores", "spill stores"),
                ("loads", "spill loads"),
            )
            if int(kernel[group]) > 0
        ]
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        shared = f", {shared[1]} bytes of shared memory" if shared else ""
        registers = f"{kernel['registers']} registers{shared}"
        verdict = ", ".join(problems) if problems else "no spills"
        print(f"{architecture:7} {kernel['name']:18} {registers}, {verdict}")
        n_failed += bool(problems)
    return n_failed


def main():
    """Arguments in, a table of kernels out."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("nvrtc_lib_dir", type=Path)
    arguments.add_argument("kernels_dir", type=Path)
    args = arguments.parse_args()
    name = Path(__file__).name
    try:
        nvrtc = load(args.nvrtc_lib_dir)
        sources = sorted(args.kernels_dir.glob("*.cu"))
        if not sources:
            raise Failed(f"`{args.kernels_dir}` has no `*.cu`")
        n_failed = sum(check(nvrtc, path, arch) for path in sources for arch in ARCHITECTURES)
    except Failed as error:
        sys.exit(f"{name}: {error}")
    if n_failed > 0:
        sys.exit(f"{name}: {n_failed} kernels spill registers or have a stack frame")


if __name__ == "__main__":
    main()
