#!/usr/bin/env python3
"""Fetches libtorch from the `torch` wheel with the user's own pip and unpacks what a Rust program
needs of it.

usage: libtorch.py VERSION [DIR [--cuda]] [--fake-cuda FOLDER]

DIR comes out as `torch/{lib,include,share}` beside `nvidia/*/lib`, because the libraries look for
each other along that path. Without `--cuda` only the CPU library and the two CUDA libraries it is
linked against are kept.

FOLDER comes out as what tests/fake_cuda needs: libtorch's own CUDA libraries in `torch/lib`, CUDA's
headers in `include`, NVRTC in `nvrtc`, and at last the version in `DOWNLOAD`. One download serves
both folders. Exit codes: 0 done; 1 pip, the network or the disk failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# The C++ libraries in the wheels for different versions of Python are the same, so the host's own
# version does not matter; and pip before 25 does not know that a newer manylinux takes wheels of
# the older ones.
TARGET = ["--python-version", "3.12", "--platform", "manylinux2014_x86_64"]
for minor in range(28, 16, -1):
    TARGET += ["--platform", f"manylinux_2_{minor}_x86_64"]

PYTHON_ONLY = ("libtorch_python", "libtorch_global_deps", "libshm")
CUDA_ONLY = ("libtorch_cuda", "libtorch_nvshmem", "libc10_cuda", "libcaffe2_nvrtc")
# `libtorch_cpu.so` is linked against these two even where it never calls them.
NEEDED_BY_CPU = ("nvidia-cuda-runtime", "nvidia-cuda-cupti")
CUDA_RUNTIME = "nvidia-cuda-runtime"
# The headers that those of the CUDA runtime include. The torch wheel does not pin them.
CUDA_CRT, CUDA_CRT_VERSION = "nvidia-cuda-crt", "13.0.88"
NVRTC = "nvidia-cuda-nvrtc"

REQUIREMENT = re.compile(
    r"^Requires-Dist: ([\w.-]+)(?:\[([^]]*)\])?==([^;\s]+)\s*(?:;(.*))?$", re.MULTILINE
)


class Failed(Exception):
    """One message for the user."""


def fetch(requirement, scratch):
    """Downloads one wheel, without what it depends on, and returns its path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary=:all:",
    ]
    command += [*TARGET, "--disable-pip-version-check", "--dest", str(scratch), requirement]
    if not sys.stderr.isatty():
        command.insert(4, "--quiet")
    # pip writes a wheel to its temporary folder first: keep it on the disk whose space was checked.
    done = subprocess.run(command, stdout=sys.stderr, env=os.environ | {"TMPDIR": str(scratch)})
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise Failed(
            f"pip could not download `{requirement}` (its own message is above)\n"
            "hint: check the network and the index that pip is configured for; a pip before 20.3 "
            "is too old (`python3 -m pip --version`); or set BIREME_LIBTORCH to a libtorch that is "
            "already there"
        )
    print(f"setup: {wheels[0].stat().st_size / 1e6:7.1f} MB  {requirement}", file=sys.stderr)
    return wheels[0]


def requirements(wheel):
    """The exact pins in the wheel's metadata: (name, extras, version, marker)."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return REQUIREMENT.findall(archive.read(name).decode())


def unpack(wheel, into, wanted):
    """Unpacks the members that `wanted` accepts."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if wanted(name)]
        archive.extractall(into, members)
    return members


def unpack_headers(wheel, into, scratch):
    """Unpacks the folder `include` of a CUDA wheel into `into`."""
    with tempfile.TemporaryDirectory(dir=scratch) as aside:
        unpack(wheel, aside, lambda name: "/include/" in name)
        for include in Path(aside).glob("nvidia/*/include"):
            shutil.copytree(include, into, dirs_exist_ok=True)


def libraries_of_torch(cuda):
    """Which members of the torch wheel a Rust program links against or loads."""
    unwanted = PYTHON_ONLY if cuda else PYTHON_ONLY + CUDA_ONLY

    def wanted(name):
        if name.startswith("torch/lib/"):
            library = name.removeprefix("torch/lib/")
            return "/" not in library and ".so" in library and not library.startswith(unwanted)
        return name.startswith(("torch/include/", "torch/share/"))

    return wanted


def cuda_pins(torch_wheel, scratch):
    """The CUDA libraries that the torch wheel pins, those behind its `cuda-toolkit` bundle
    included."""
    pins = []
    for name, extras, version, _ in requirements(torch_wheel):
        if name == "cuda-toolkit":
            bundle = fetch(f"{name}=={version}", scratch / "bundle")
            chosen = set(extras.split(","))
            for part, _, part_version, marker in requirements(bundle):
                if set(re.findall(r"extra == ['\"]([\w-]+)['\"]", marker)) & chosen:
                    pins.append((part, part_version))
            bundle.unlink()
        elif name.startswith("nvidia-"):
            pins.append((name, version))
    return sorted(set(pins))


def cuda_library(name):
    """Whether a member of a CUDA wheel is a library."""
    return "/lib/" in name and ".so" in name


def fetch_fake_cuda(torch_wheel, pins, version, folder, scratch):
    """Fills the folder for the fake CUDA runtime."""
    (folder / "DOWNLOAD").unlink(missing_ok=True)
    shutil.rmtree(folder / "torch", ignore_errors=True)
    shutil.rmtree(folder / "include", ignore_errors=True)
    wanted = [f"torch/lib/{library}.so" for library in CUDA_ONLY]
    members = unpack(torch_wheel, folder, lambda name: name in wanted)
    if len(members) != len(wanted):
        raise Failed(f"the wheel of torch {version} that pip found lacks one of {wanted}")
    runtime_version = dict(pins).get(CUDA_RUNTIME, "")
    if runtime_version.split(".")[:2] != CUDA_CRT_VERSION.split(".")[:2]:
        raise Failed(
            f"torch {version} needs {CUDA_RUNTIME} {runtime_version or 'of an unknown version'}, "
            f"whose headers do not fit {CUDA_CRT} {CUDA_CRT_VERSION}"
        )
    for name, pin in ((CUDA_RUNTIME, runtime_version), (CUDA_CRT, CUDA_CRT_VERSION)):
        wheel = fetch(f"{name}=={pin}", scratch)
        unpack_headers(wheel, folder / "include", scratch)
        wheel.unlink()
    # The compiler of kernels, in a folder of its own: the fake stands for all other libraries.
    compiler = fetch(f"{NVRTC}=={dict(pins)[NVRTC]}", scratch)
    unpack(compiler, folder / "nvrtc", lambda name: name.endswith(".so.13") or "builtins" in name)
    (folder / "DOWNLOAD").write_text(f"{version}\n")


def fetch_libtorch(torch_wheel, pins, version, folder, with_cuda, scratch):
    """Fills the folder with what a Rust program needs. Deletes the wheel to free its space."""
    members = unpack(torch_wheel, folder, libraries_of_torch(with_cuda))
    torch_wheel.unlink()
    needed = "torch/lib/libtorch_cuda.so" if with_cuda else "torch/lib/libtorch_cpu.so"
    if needed not in members:
        raise Failed(
            f"the wheel of torch {version} that pip found has no `{needed}`\n"
            "hint: the index that pip is configured for may serve builds for another device"
        )
    for name, pin in pins:
        if with_cuda or name.startswith(NEEDED_BY_CPU):
            wheel = fetch(f"{name}=={pin}", scratch)
            unpack(wheel, folder, cuda_library)
            wheel.unlink()
    if not with_cuda:
        # The real `libtorch.so` only ties both devices together, and would ask the loader for
        # `libtorch_cuda.so`.
        link = folder / "torch/lib/libtorch.so"
        link.unlink()
        link.symlink_to("libtorch_cpu.so")
    # torch-sys compares this with the version it was made for.
    (folder / "torch/build-version").write_text(f"{version}\n")


def main():
    """Arguments in, unpacked folders out."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("version")
    arguments.add_argument("dir", type=Path, nargs="?")
    arguments.add_argument("--cuda", action="store_true")
    arguments.add_argument("--fake-cuda", type=Path, metavar="FOLDER")
    args = arguments.parse_args()
    folders = [folder for folder in (args.dir, args.fake_cuda) if folder]
    if not folders:
        arguments.error("DIR, or `--fake-cuda FOLDER`, or both are needed")

    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="wheels-", dir=folders[0]))
    (scratch / "bundle").mkdir()
    try:
        wheel = fetch(f"torch=={args.version}", scratch)
        pins = cuda_pins(wheel, scratch)
        if args.fake_cuda:
            # `fetch` expects no other wheel in its folder.
            (scratch / "headers").mkdir()
            fetch_fake_cuda(wheel, pins, args.version, args.fake_cuda, scratch / "headers")
        if args.dir:
            fetch_libtorch(wheel, pins, args.version, args.dir, args.cuda, scratch)
    except (Failed, OSError, zipfile.BadZipFile) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
