#!/usr/bin/env python3
"""Builds the libraries of the fake CUDA runtime.

usage: build.py TORCH_LIB HEADERS OUT

TORCH_LIB  the folder with libtorch's CPU and CUDA libraries
HEADERS    the folder with CUDA's headers: cuda.h, cuda_runtime_api.h and crt/
OUT        comes out as lib*.so.N, under the names that libtorch asks the loader for

A library consists of the functions written in C beside this script, and of a generated function for
each other function that libtorch leaves undefined. A generated function counts itself if it is work
for the GPU, and otherwise does nothing but log its name. Needs `cc` and `nm`.
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPILE = ["cc", "-std=gnu11", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


@dataclass
class Library:
    """One of NVIDIA's libraries, and which of libtorch's undefined functions belong to it."""

    soname: str
    functions: str  # a regular expression for the start of their names
    sources: list[str] = field(default_factory=list)
    # A generated function whose name matches is work on the stream of the handle, which is its
    # first argument, and is counted by the function `counter`.
    work: str = "$^"
    counter: str = ""


# The first that matches a function has it.
LIBRARIES = [
    Library(
        "libcudart.so.13",
        "cuda|__cuda",
        ["cudart.c", "cudart_device.c", "cudart_memory.c", "cudart_stream.c"],
    ),
    Library("libcublasLt.so.13", "cublasLt", ["cublasLt.c"]),
    Library(
        "libcublas.so.13",
        "cublas",
        ["cublas.c"],
        # Routines for vectors and matrices, such as cublasSgemv_v2, cublasIsamax_v2, cublasDotEx.
        work=r"cublas(I?[SDCZ]|Dot|Nrm2|Scal|Axpy|Gemm)(?!et)\w+",
        counter="fake_cublas_count",
    ),
    Library("libcusparseLt.so.0", "cusparseLt"),
    Library("libcusparse.so.12", "cusparse"),
    Library("libcufft.so.12", "cufft"),
    Library("libcurand.so.10", "curand"),
    Library("libcusolver.so.12", "cusolver"),
    Library("libcufile.so.0", "cuFile"),
    Library("libcupti.so.13", "cupti"),
    Library("libnvrtc.so.13", "nvrtc", ["nvrtc.c"]),
    Library("libnvJitLink.so.13", "nvJitLink"),
    Library(
        "libcudnn.so.9",
        "cudnn",
        ["cudnn.c"],
        work=r"cudnn(BackendExecute|CTCLoss|BatchNorm|Convolution|PoolingF|SpatialTf)\w*",
        counter="fake_cudnn_count",
    ),
    Library("libnccl.so.2", "nccl", ["nccl.c"]),
    Library("libnvshmem_host.so.3", "nvshmem"),
    Library("libcuda.so.1", "cu[A-Z]", ["cuda.c"]),
]


def symbols(option: str, file: Path) -> list[str]:
    """The dynamic or static symbols that `nm` lists, as `name` or `name@version`."""
    command = ["nm", *option.split(), str(file)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [line.split()[-1] for line in lines.splitlines()]


def undefined_functions(torch_lib: Path) -> list[dict[str, str]]:
    """For each of `LIBRARIES`, the functions that libtorch leaves undefined, and their versions."""
    patterns = [re.compile(library.functions) for library in LIBRARIES]
    functions: list[dict[str, str]] = [{} for _ in LIBRARIES]
    for file in sorted(torch_lib.glob("lib*torch*.so")) + sorted(torch_lib.glob("libc*.so")):
        for symbol in symbols("-D --undefined-only", file):
            name, _, version = symbol.partition("@")
            for pattern, found in zip(patterns, functions):
                if pattern.match(name):
                    found[name] = version
                    break
    return functions


def generated_source(library: Library, functions: list[str]) -> str:
    """The C source of the functions that are not written by hand."""
    # Without the headers, whose prototypes would differ.
    lines = [
        '#define API __attribute__((visibility("default")))',
        "extern void fake_log_stub(const char* function);",
        f"extern int {library.counter or 'none'}(const void*, long number, const char* name);",
    ]
    for name in functions:
        if re.match(library.work, name):
            body = f'return {library.counter}(handle, 0, "{name}");'
        else:
            # An NCCL call that returns success would leave wrong numbers: ncclInvalidUsage.
            code = 5 if name.startswith("nccl") else 0
            body = f'(void)handle; fake_log_stub("{name}"); return {code};'
        lines.append(f"API long {name}(const void* handle) {{ {body} }}")
    return "\n".join(lines) + "\n"


def run(command: list[str]) -> None:
    """Runs a compiler."""
    subprocess.run(command, check=True)


def compile_source(source: Path, headers: Path, scratch: Path) -> Path:
    """Compiles one source to an object file."""
    target = scratch / f"{source.stem}.o"
    includes = [f"-I{HERE}", "-isystem", str(headers)]
    run([*COMPILE, *includes, "-c", str(source), "-o", str(target)])
    return target


def link(
    library: Library, objects: list[Path], versions: set[str], out: Path, scratch: Path
) -> None:
    """Links a library. libtorch's reference to a versioned function asks for that version."""
    command = ["cc", "-shared", f"-Wl,-soname,{library.soname}", "-Wl,-z,noexecstack"]
    if len(versions) > 1:
        sys.exit(f"{library.soname}: libtorch asks for the versions {sorted(versions)}")
    for version in versions:
        script = scratch / f"{library.soname}.map"
        script.write_text(f"{version} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={script}")
    runtime = out / LIBRARIES[0].soname
    dependencies = [] if library is LIBRARIES[0] else [str(runtime)]
    target = out / library.soname
    # Written aside, so that a running program keeps the library that it has loaded.
    aside = scratch / library.soname
    run([*command, *map(str, objects), *dependencies, "-o", str(aside), "-ldl", "-lpthread"])
    aside.replace(target)


def build(
    library: Library, functions: dict[str, str], headers: Path, out: Path, scratch: Path
) -> None:
    """Builds one library and reports how many functions it has."""
    objects = [compile_source(HERE / source, headers, scratch) for source in library.sources]
    written = {name for file in objects for name in symbols("-g --defined-only", file)}
    missing = sorted(functions.keys() - written)
    source = scratch / f"generated_{library.soname.split('.')[0]}.c"
    source.write_text(generated_source(library, missing))
    objects.append(compile_source(source, headers, scratch))
    link(library, objects, set(functions.values()) - {""}, out, scratch)
    print(f"{library.soname:21} {len(functions):4} functions, {len(missing):4} generated")


def main() -> int:
    """Arguments in, libraries out."""
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    torch_lib, headers, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=out) as folder:
        scratch = Path(folder)
        jobs = list(zip(LIBRARIES, undefined_functions(torch_lib)))
        # All others are linked against the runtime.
        build(*jobs[0], headers, out, scratch)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: build(*job, headers, out, scratch), jobs[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
