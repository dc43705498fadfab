#!/usr/bin/env python3
"""Builds the CUDA kernels as a library for the CPU, on which the fake CUDA runtime runs them.

usage: emulate.py KERNELS_DIR OUT [--test]

Writes `OUT/libfake_kernels.so` from all `KERNELS_DIR/*.cu`. It exports

    int fake_kernel_params(const char* name, size_t* sizes, int capacity)
        number of parameters of the kernel and their sizes in bytes; -1 for an unknown kernel
    int fake_kernel_run(const char* name, unsigned gx, unsigned gy, unsigned gz,
                        unsigned bx, unsigned by, unsigned bz, size_t shared_bytes, void** params)
        runs a grid of (gx, gy, gz) blocks of (bx, by, bz) threads; 0 on success

With `--test` it builds the kernels and `kernels_test.cpp` with the sanitizers for addresses and
undefined behaviour instead, and runs the test in the natural and in random orders of threads.
Exit codes: 0 done; 1 a kernel was not understood, the compiler or the test failed.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Results must not depend on the host's instructions: no fused multiply-adds, as on the GPU.
# Kernels read floats as vectors, which strict aliasing would not allow.
FLAGS = ["-std=c++17", "-g", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-unused-function", "-fvisibility=hidden", "-fPIC"]
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\((?P<bounds>[^)]*)\)\s*)?'
    r"(?P<name>\w+)\s*\((?P<params>[^)]*)\)"
)
DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+([\w ]+?)\s+(\w+)\s*\[\s*\]\s*;")
PARAM = re.compile(r"^(?P<type>.*?[\s*])(?P<name>\w+)$", re.DOTALL)


class Failed(Exception):
    """One message for the user."""


def without_comments(source):
    """The source with each comment replaced by its line breaks, so that lines keep their
    numbers."""
    return re.sub(
        r"//[^\n]*|/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), source, flags=re.DOTALL
    )


def kernels(source):
    """The kernels of a source: (name, types of its parameters, largest block)."""
    for match in KERNEL.finditer(without_comments(source)):
        types = []
        for param in filter(None, map(str.strip, match["params"].split(","))):
            parts = PARAM.match(param)
            if parts is None:
                raise Failed(f"`{match['name']}`: the parameter `{param}` has no name")
            words = parts["type"].replace("__restrict__", " ").split()
            types.append(" ".join(words))
        yield match["name"], types, (match["bounds"] or "1024").split(",")[0].strip()


def generate(sources):
    """The translation unit with all kernels and their registry."""
    unit = [f'#include "{HERE / "emulator.h"}"', ""]
    runs, rows = [], []
    for path in sources:
        text = path.read_text()
        found = list(kernels(text))
        if text.count("__global__") != len(found):
            raise Failed(f"{path}: a kernel is not of the form `{KERNEL_FORM}`")
        space = path.stem + "_cu"
        body = DYNAMIC_SHARED.sub(r"\1* \2 = fake_cuda::dynamic_shared<\1>();", text)
        unit += [f"namespace {space} {{", f'#line 1 "{path}"', body, f"}}  // namespace {space}"]
        for name, types, bounds in found:
            values = (f"*static_cast<{kind}*>(params[{i}])" for i, kind in enumerate(types))
            sizes = ", ".join(f"sizeof({kind})" for kind in types)
            runs.append(
                f"static void run_{name}([[maybe_unused]] void** params) "
                f"{{ {space}::{name}({', '.join(values)}); }}"
            )
            rows.append(f'    {{"{name}", run_{name}, {bounds}, {{{sizes}}}}},')
    return "\n".join([*unit, '#line 1 "registry"', *runs, REGISTRY.format(rows="\n".join(rows))])


KERNEL_FORM = 'extern "C" __global__ void [__launch_bounds__(N)] NAME(PARAMS)'

REGISTRY = """
namespace {{
struct Kernel {{
  const char* name;
  void (*run)(void** params);
  unsigned max_threads;
  std::vector<size_t> sizes;
}};

const Kernel* find(const char* name) {{
  static const std::vector<Kernel> kernels = {{
{rows}
  }};
  for (const Kernel& kernel : kernels) {{
    if (strcmp(kernel.name, name) == 0) return &kernel;
  }}
  return nullptr;
}}
}}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int fake_kernel_params(const char* name, size_t* sizes, int capacity) {{
  const Kernel* kernel = find(name);
  if (kernel == nullptr) return -1;
  int n = static_cast<int>(kernel->sizes.size());
  for (int i = 0; i < n && i < capacity; i++) sizes[i] = kernel->sizes[i];
  return n;
}}

EXPORT int fake_kernel_run(const char* name, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                           unsigned by, unsigned bz, size_t shared_bytes, void** params) {{
  const Kernel* kernel = find(name);
  if (kernel == nullptr) return -1;
  return fake_cuda::launch(kernel->name, {{gx, gy, gz}}, {{bx, by, bz}}, kernel->max_threads,
                           shared_bytes, [=] {{ kernel->run(params); }});
}}
"""


def run(command, **settings):
    """Runs a command whose failure ends this script."""
    done = subprocess.run(list(map(str, command)), check=False, **settings)
    if done.returncode != 0:
        raise Failed(f"`{Path(command[0]).name}` failed with exit code {done.returncode}")


def test(unit, out):
    """Builds and runs the test of the kernels."""
    program = out / "kernels_test"
    run(["g++", *FLAGS, *SANITIZERS, unit, HERE / "kernels_test.cpp", "-o", program])
    # Kernels run on stacks of their own, which the check for uses after return does not know.
    settings = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    settings.pop("FAKE_CUDA_SHUFFLE", None)
    run([program], env=settings)
    for seed in ("1", "2"):
        print(f"threads in random order, seed {seed}:", flush=True)
        run([program], env=settings | {"FAKE_CUDA_SHUFFLE": seed})


def main():
    """Arguments in, a library or the verdict of the test out."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("kernels_dir", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--test", action="store_true")
    args = arguments.parse_args()

    sources = sorted(args.kernels_dir.resolve().glob("*.cu"))
    try:
        if not sources:
            raise Failed(f"`{args.kernels_dir}` has no `*.cu`")
        args.out.mkdir(parents=True, exist_ok=True)
        unit = args.out / "kernels.cpp"
        unit.write_text(generate(sources))
        if args.test:
            test(unit, args.out)
        else:
            library = args.out / "libfake_kernels.so"
            # Written aside, so that a process that has the old library open keeps it.
            aside = library.with_suffix(".new")
            run(["g++", *FLAGS, "-O2", "-shared", unit, "-o", aside])
            aside.replace(library)
    except Failed as error:
        sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    main()
