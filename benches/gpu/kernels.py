"""The program's own CUDA kernels against f64, and their speed and that of the head.

    python benches/gpu/kernels.py check|speed|head|launch|launch-head --root ROOT [--out OUT]
        [--small] [--stage NAME]

Compiles ROOT/src/kernels/cuda/*.cu with NVRTC and the options of `nvrtc.rs` and launches the
kernels through the CUDA driver, without PyTorch:

    check        on odd sizes and unaligned buffers, compared with NumPy in f64; every output begins
                 as NaN, and the bytes around every buffer must stay as they are
    speed        milliseconds by the events of the driver, and bytes a second
    head         milliseconds and TFLOP/s of the loss over the catalogue with its gradients, in
                 PyTorch: the operations of the program, and flash attention; and the speed of large
                 products and copies
    launch       one launch each of three kernels, for a profiler
    launch-head  one pass over the head, for a profiler

Appends a line of JSON for each figure to OUT/results.jsonl, or prints it. Exit code 1 if a
comparison fails.
"""

import argparse
import ctypes
import importlib.util
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy

F32, F64, I32, I64 = numpy.float32, numpy.float64, numpy.int32, numpy.int64
THREADS = 256
GUARD = 256  # bytes around a buffer
PATTERN = 0xA5
MAX_PARTIALS = 1024
KEPT_STEPS = 32
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8

MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, MAJOR, MINOR = 97, 75, 76
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class Recorder:
    """Appends records of a stage to a file, or prints them."""

    def __init__(self, out, stage):
        self.file, self.stage = out and Path(out) / "results.jsonl", stage

    def __call__(self, **fields):
        line = json.dumps({"stage": self.stage, **fields})
        print(line, flush=True)
        if self.file:
            with self.file.open("a") as file:
                file.write(line + "\n")


def wheels_folder():
    """Where PyTorch is installed, without importing it."""
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parent.parent if found else None


class Nvrtc:
    """CUDA's compiler at run time."""

    def __init__(self, root):
        self.library = self.load()
        self.sources = sorted((root / "src/kernels/cuda").glob("*.cu"))
        text = (root / "src/kernels/cuda/nvrtc.rs").read_text()
        listed = re.search(r"const OPTIONS: [^=]*= \[(.*?)\];", text, re.DOTALL)
        self.options = re.findall(r'"([^"]+)"', listed[1])

    @staticmethod
    def load():
        """The NVRTC on the loader's path, or that beside PyTorch."""
        paths, wheels = ["libnvrtc.so.13"], wheels_folder()
        if wheels:
            folder = wheels / "nvidia/cu13/lib"
            # NVRTC finds its built-in functions by their name, if they are loaded already.
            for builtins in folder.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))
            paths.insert(0, str(folder / "libnvrtc.so.13"))
        errors = []
        for path in paths:
            try:
                return ctypes.CDLL(path)
            except OSError as error:
                errors.append(str(error))
        raise OSError("; ".join(errors))

    def read(self, program, size_function, function):
        size = ctypes.c_size_t()
        size_function(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        function(program, text)
        return text

    def compile(self, source, architecture):
        """Machine code, as the driver loads it."""
        library, program = self.library, ctypes.c_void_p()
        text, name = source.read_bytes(), source.name.encode()
        assert library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None) == 0
        options = [f"--gpu-architecture={architecture}", *self.options]
        array = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        if library.nvrtcCompileProgram(program, len(options), array) != 0:
            log = self.read(program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
            sys.exit(f"{source.name} does not compile:\n{log.value.decode()}")
        return self.read(program, library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)


class Gpu:
    """The first GPU, its memory and the project's kernels."""

    def __init__(self, root):
        self.driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        attribute = lambda number: self.attribute(number, device)
        self.architecture = f"sm_{attribute(MAJOR)}{attribute(MINOR)}"
        nvrtc, self.functions, self.code = Nvrtc(root), {}, []
        for source in nvrtc.sources:
            code, module = nvrtc.compile(source, self.architecture), ctypes.c_void_p()
            self.code.append(code)
            self.call("cuModuleLoadData", ctypes.byref(module), code)
            text = re.sub(r"//[^\n]*", "", source.read_text())
            for name in re.findall(r"__global__\s+void\s+(?:__\w+__\(\d+\)\s*)?(\w+)\(", text):
                function = ctypes.c_void_p()
                self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
                self.functions[name] = function
        self.call(
            "cuFuncSetAttribute",
            self.functions["sort_rows"],
            MAX_DYNAMIC_SHARED_SIZE_BYTES,
            attribute(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        )

    def attribute(self, number, device):
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    def call(self, name, *arguments):
        code = getattr(self.driver, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name} failed with {code}")

    def wait(self):
        self.call("cuCtxSynchronize")

    def launch(self, name, blocks, threads, *arguments, shared=0):
        """Queues a kernel. Buffers are passed as addresses, numbers as their types."""
        values = [
            ctypes.c_uint64(value.address if isinstance(value, Buffer) else 0)
            if value is None or isinstance(value, Buffer)
            else value
            for value in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        sizes = [ctypes.c_uint(n) for n in (*blocks, 1, *threads, 1, shared)]
        function = self.functions[name]
        self.call("cuLaunchKernel", function, *sizes, None, pointers, None)

    def milliseconds(self, work, repeats=20):
        """Of the median call of `work`, by events."""
        events = [ctypes.c_void_p() for _ in range(repeats + 1)]
        for event in events:
            self.call("cuEventCreate", ctypes.byref(event), 0)
        work()
        for event in events[:-1]:
            self.call("cuEventRecord", event, None)
            work()
        self.call("cuEventRecord", events[-1], None)
        self.wait()
        try:
            elapsed = self.driver.cuEventElapsedTime_v2
        except AttributeError:
            elapsed = self.driver.cuEventElapsedTime
        found, times = ctypes.c_float(), []
        for start, end in zip(events, events[1:]):
            assert elapsed(ctypes.byref(found), start, end) == 0
            times.append(found.value)
        return max(statistics.median(times), 1e-6)


class Buffer:
    """An array in device memory between guard bytes. `shift` elements spoil the alignment."""

    def __init__(self, gpu, array, shift=0):
        self.gpu, self.shape, self.kind = gpu, array.shape, array.dtype
        self.before, self.n_bytes = GUARD + shift * array.itemsize, array.nbytes
        whole = numpy.full(self.before + self.n_bytes + GUARD, PATTERN, numpy.uint8)
        whole[self.before : self.before + self.n_bytes] = (
            numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8)
        )
        self.start, self.n_whole = ctypes.c_uint64(), len(whole)
        gpu.call("cuMemAlloc_v2", ctypes.byref(self.start), ctypes.c_size_t(len(whole)))
        pointer = whole.ctypes.data_as(ctypes.c_void_p)
        gpu.call("cuMemcpyHtoD_v2", self.start, pointer, ctypes.c_size_t(len(whole)))
        self.address = self.start.value + self.before

    def read(self):
        """The array; fails if a guard byte has changed."""
        whole = numpy.empty(self.n_whole, numpy.uint8)
        pointer = whole.ctypes.data_as(ctypes.c_void_p)
        self.gpu.wait()
        self.gpu.call("cuMemcpyDtoH_v2", pointer, self.start, ctypes.c_size_t(self.n_whole))
        end = self.before + self.n_bytes
        guards = numpy.concatenate([whole[: self.before], whole[end:]])
        assert (guards == PATTERN).all(), "a kernel wrote outside of its buffer"
        return whole[self.before : end].copy().view(self.kind).reshape(self.shape)

    def __del__(self):
        self.gpu.driver.cuMemFree_v2(self.start)


def nans(*shape, kind=F32):
    return numpy.full(shape, numpy.nan if kind in (F32, F64) else -77, kind)


def linear_grid(n, max_blocks=1 << 20):
    """Blocks and threads of kernels that take four elements a thread, as in cuda.rs."""
    return (min(max(-(-n // (4 * THREADS)), 1), max_blocks), 1), (THREADS, 1)


def row_grid(n_rows, n_columns, rows_each=1):
    """Blocks and threads of kernels with columns along x and rows along y, as in cuda.rs."""
    along_x = min(1 << (max(n_columns, 1) - 1).bit_length(), THREADS)
    along_y = THREADS // along_x
    blocks = (-(-n_columns // along_x), min(max(-(-n_rows // (along_y * rows_each)), 1), 65_535))
    return blocks, (along_x, along_y)


def difference(found, expected):
    """The norm of the difference over the norm of what was expected; infinite for NaN."""
    found, expected = found.astype(F64), expected.astype(F64)
    apart = numpy.linalg.norm(found - expected)
    relative = float(apart / max(numpy.linalg.norm(expected), 1e-30)) if apart else 0.0
    return relative if numpy.isfinite(relative) else float("inf")


@dataclass
class Checks:
    """Runs comparisons and records them."""

    gpu: Gpu
    record: Recorder
    random: numpy.random.Generator
    n_failed: int = 0

    def compare(self, kernel, case, limit, **pairs):
        """Records the largest of the differences of (found, expected)."""
        differences = {name: difference(*pair) for name, pair in pairs.items()}
        worst = max(differences, key=differences.get)
        error = differences[worst]
        passed = error <= limit
        self.n_failed += not passed
        self.record(
            kind="kernel",
            kernel=kernel,
            case=case,
            error=error if numpy.isfinite(error) else "inf",
            of=worst,
            limit=limit,
            passed=passed,
        )

    def normal(self, *shape):
        return self.random.standard_normal(shape).astype(F32)

    def buffers(self, *arrays, shift=0):
        return [Buffer(self.gpu, array, shift) for array in arrays]

    def sum_of_squares(self, n, shift):
        x = self.normal(n)
        blocks, threads = linear_grid(n, MAX_PARTIALS)
        x_buffer, partial = Buffer(self.gpu, x, shift), Buffer(self.gpu, nans(blocks[0], kind=F64))
        self.gpu.launch("sum_of_squares", blocks, threads, x_buffer, ctypes.c_int64(n), partial)
        found = partial.read().sum(keepdims=True)
        expected = (x.astype(F64) ** 2).sum(keepdims=True)
        self.compare("sum_of_squares", f"{n}, shift {shift}", 1e-12, sum=(found, expected))

    def finish_step(self, is_finite):
        squares, extra = self.random.random(700), F32(3.0)
        n_targets, max_norm, decay, rate, t = 1201, 0.5, 0.25, 7e-4, 6
        loss = 8000.0 if is_finite else float("nan")
        scalars, own_loss = numpy.array([loss, n_targets, 0, 1], F32), numpy.array([loss / 2], F32)
        read = self.buffers(squares, numpy.array([extra]), own_loss, numpy.array([rate, 0.05], F64))
        scalars_buffer = Buffer(self.gpu, scalars)
        kept = [F64([t - 1]), nans(1), F32([-1, -1]), nans(6, kind=F64)]
        n_steps, scale, adamw_rates, outcome = self.buffers(*map(numpy.array, kept))
        history = Buffer(self.gpu, numpy.zeros(2 + 4 * KEPT_STEPS))
        self.gpu.launch(
            "finish_step",
            (1, 1),
            (THREADS, 1),
            read[0],
            ctypes.c_int32(len(squares)),
            read[1],
            scalars_buffer,
            read[2],
            read[3],
            ctypes.c_double(max_norm),
            ctypes.c_double(decay),
            n_steps,
            scale,
            adamw_rates,
            outcome,
            history,
        )
        norm = numpy.sqrt(squares.sum() + extra) / n_targets
        if is_finite:
            clip = min(1.0, max_norm / (norm + 1e-6))
            corrected = rate * numpy.sqrt(1 - BETA_2**t) / (1 - BETA_1**t)
            self.compare(
                "finish_step",
                "finite",
                1e-7,
                scale=(scale.read(), numpy.array([clip / n_targets])),
                rates=(adamw_rates.read(), numpy.array([corrected, 1 - rate * decay])),
                steps=(n_steps.read(), numpy.array([t])),
                outcome=(outcome.read(), numpy.array([loss, n_targets, 0, 1, norm, loss / 2])),
                scalars=(scalars_buffer.read(), numpy.zeros(4)),
            )
        else:
            self.compare(
                "finish_step",
                "loss of NaN",
                0.0,
                scale=(numpy.isnan(scale.read()), numpy.array([True])),
                rates=(adamw_rates.read(), numpy.array([-1, -1])),
                steps=(n_steps.read(), numpy.array([t - 1])),
                history=(history.read()[:3], numpy.array([1, 1, 1])),
            )

    def adamw_expected(self, arrays, scale, rates):
        value, gradient, m, v = (array.astype(F64) for array in arrays)
        g = gradient * scale
        m = m + (1 - BETA_1) * (g - m)
        v = BETA_2 * v + (1 - BETA_2) * g * g
        return (value - rates[0] * m / (numpy.sqrt(v) + EPSILON)) * rates[1], m, v

    def adamw(self, n, shift, is_skipped=False):
        arrays = [self.normal(n), self.normal(n), self.normal(n) * F32(0.1), self.normal(n) ** 2]
        scale = numpy.array([numpy.nan if is_skipped else 0.37], F32)
        rates = numpy.array([0.0123, 0.998], F32)
        scalars, buffers = self.buffers(scale, rates), self.buffers(*arrays, shift=shift)
        grid = linear_grid(n)
        self.gpu.launch("adamw", *grid, *buffers, ctypes.c_int64(n), *scalars)
        value, gradient, m, v = (buffer.read() for buffer in buffers)
        if is_skipped:
            expected = arrays[0], arrays[2], arrays[3]
        else:
            expected = self.adamw_expected(arrays, float(scale[0]), rates.astype(F64))
        case = f"{n}, shift {shift}" + ", skipped" * is_skipped
        # Constants of the kernel, such as 1 - 0.999, are rounded to f32.
        limit = 0.0 if is_skipped else 1e-6
        self.compare(
            "adamw",
            case,
            limit,
            values=(value, expected[0]),
            m=(m, expected[1]),
            v=(v, expected[2]),
            gradients=(gradient, numpy.zeros(n)),
        )

    def rows(self, n, n_table, n_columns):
        """Listed rows, each once, and unused places."""
        ids = numpy.full(n, -1, I64)
        listed = self.random.permutation(n_table)[: n // 2]
        ids[self.random.permutation(n)[: len(listed)]] = listed
        return ids, numpy.where(ids[:, None] >= 0, self.normal(n, n_columns), F32(0))

    def lazy_adamw_rows(self, n, n_table, n_columns):
        ids, gradients = self.rows(n, n_table, n_columns)
        shape = n_table, n_columns
        values, m, v = self.normal(*shape), self.normal(*shape), self.normal(*shape) ** 2
        scale, rates = numpy.array([0.37], F32), numpy.array([0.0123, 0.998], F32)
        table, others = self.buffers(values, m, v), self.buffers(ids, gradients, scale, rates)
        sizes = ctypes.c_int32(n), ctypes.c_int32(n_columns)
        self.gpu.launch(
            "lazy_adamw_rows",
            *row_grid(n, n_columns),
            *table,
            ctypes.c_int64(n_table),
            *others[:2],
            *sizes,
            *others[2:],
        )
        expected, used = [values.astype(F64), m.astype(F64), v.astype(F64)], ids >= 0
        of_rows = [array[ids[used]] for array in (values, m, v)]
        arrays = of_rows[0], gradients[used], of_rows[1], of_rows[2]
        new = self.adamw_expected(arrays, float(scale[0]), rates.astype(F64))
        for array, rows in zip(expected, new):
            array[ids[used]] = rows
        found = [buffer.read() for buffer in table]
        pairs = dict(zip(("values", "m", "v"), zip(found, expected)))
        self.compare("lazy_adamw_rows", f"{n} of {n_table} x {n_columns}", 1e-6, **pairs)

    def dropout(self, n_rows, size, drawn, p=0.3, shift=0, in_place=False):
        """Rows of the shape `size`, the leading part of rows of the shape `drawn`."""
        n_columns = int(numpy.prod(size))
        x = self.normal(n_rows, n_columns)
        keys = self.random.integers(-(1 << 31), 1 << 31, n_rows, dtype=I64).astype(I32)
        site, threshold, kept = 3, int(p * 2**32) - 2**31, F32(1 / (1 - p))
        x_buffer, keys_buffer = Buffer(self.gpu, x, shift), Buffer(self.gpu, keys)
        y_buffer = x_buffer if in_place else Buffer(self.gpu, nans(n_rows, n_columns), shift)
        inner = (1, 1, *size)[-2:] + (1, 1, *drawn)[-2:]
        at_once = 4 if n_columns % 4 == 0 else 1
        self.gpu.launch(
            "dropout",
            *row_grid(n_rows, n_columns // at_once, 4),
            x_buffer,
            y_buffer,
            ctypes.c_int64(n_rows),
            ctypes.c_int64(n_columns),
            keys_buffer,
            ctypes.c_uint32(site),
            ctypes.c_int32(threshold),
            ctypes.c_float(kept),
            *map(ctypes.c_int32, inner),
        )

        def mix(number):
            for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
                number = ((number ^ (number >> shift)) * factor) & 0xFFFFFFFF
            return number

        index = numpy.arange(int(numpy.prod(drawn)), dtype=numpy.uint64).reshape(drawn)
        index = index[tuple(slice(n) for n in size)].reshape(-1)
        of_columns = mix((index + 0x6A09E667) & 0xFFFFFFFF) | 1
        of_rows = mix((keys.astype(I64) + site * 0x9E3779B9) & 0xFFFFFFFF).astype(numpy.uint64) | 1
        product = (of_rows[:, None] * of_columns[None]) & 0xFFFFFFFF
        is_dropped = product.astype(numpy.uint32).view(I32) < threshold
        expected = numpy.where(is_dropped, F32(0), x * kept)
        case = f"{n_rows} x {size} of {drawn}, shift {shift}" + ", in place" * in_place
        self.compare("dropout", case, 0.0, y=(y_buffer.read(), expected))
        if x.size > 10_000:
            share = numpy.array([is_dropped.mean()])
            self.compare("dropout", case + ", share", 0.1, share=(share, numpy.array([p])))

    def sort_and_sum(self, n, n_table, n_columns):
        ids = self.random.integers(-3, n_table, n, dtype=I64)
        capacity = 1 << (n - 1).bit_length()
        ids_buffer = Buffer(self.gpu, ids)
        sorted_ids, order = self.buffers(nans(n, kind=I64), nans(n, kind=I32))
        sizes = ctypes.c_int32(n), ctypes.c_int32(capacity)
        self.gpu.launch(
            "sort_rows", (1, 1), (1024, 1), ids_buffer, *sizes, sorted_ids, order,
            shared=8 * capacity,
        )  # fmt: skip
        n_used = int((ids >= 0).sum())
        expected_order = numpy.full(n, -1, I32)
        stable = numpy.argsort(numpy.where(ids < 0, 1 << 60, ids), kind="stable")
        expected_order[:n_used] = stable[:n_used]
        expected_ids = numpy.where(expected_order >= 0, ids[expected_order], -1)
        case = f"{n} of {n_table} x {n_columns}"
        self.compare(
            "sort_rows",
            case,
            0.0,
            ids=(sorted_ids.read(), expected_ids),
            order=(order.read(), expected_order),
        )
        gradients = self.normal(n, n_columns)
        gradients_buffer = Buffer(self.gpu, gradients)
        row_ids, sums = self.buffers(nans(n, kind=I64), nans(n, n_columns))
        self.gpu.launch(
            "sum_rows",
            *row_grid(n, n_columns),
            sorted_ids,
            order,
            ctypes.c_int32(n),
            gradients_buffer,
            ctypes.c_int32(n_columns),
            row_ids,
            sums,
        )
        dense = numpy.zeros((n_table, n_columns))
        numpy.add.at(dense, ids[ids >= 0], gradients[ids >= 0].astype(F64))
        is_first = expected_ids >= 0
        is_first[1:] &= expected_ids[1:] != expected_ids[:-1]
        expected_rows = numpy.where(is_first, expected_ids, -1)
        expected_sums = numpy.where(is_first[:, None], dense[expected_ids], 0.0)
        self.compare("sum_rows", case, 1e-6, sums=(sums.read(), expected_sums))
        self.compare("sum_rows", case + ", ids", 0.0, ids=(row_ids.read(), expected_rows))
        table = self.normal(n_table, n_columns)
        table_buffer = Buffer(self.gpu, table)
        self.gpu.launch(
            "add_rows",
            *row_grid(n, n_columns),
            table_buffer,
            ctypes.c_int64(n_table),
            row_ids,
            sums,
            ctypes.c_int32(n),
            ctypes.c_int32(n_columns),
        )
        self.compare("add_rows", case, 1e-6, table=(table_buffer.read(), table + dense))

    def adagrad_rows(self, n, n_table, n_columns, momentum):
        ids, gradients = self.rows(n, n_table, n_columns)
        shape = n_table, n_columns
        values, squares, last = self.normal(*shape), self.normal(*shape) ** 2, self.normal(*shape)
        scale, rates = numpy.array([0.37], F32), numpy.array([0.0, 0.05], F64)
        table = self.buffers(values, squares, last)
        others = self.buffers(ids, gradients, scale, rates)
        self.gpu.launch(
            "adagrad_rows",
            *row_grid(n, n_columns),
            *table[:2],
            table[2] if momentum else None,
            ctypes.c_int64(n_table),
            *others[:2],
            ctypes.c_int32(n),
            ctypes.c_int32(n_columns),
            *others[2:],
            ctypes.c_float(momentum),
        )
        used = ids >= 0
        rows, g = ids[used], gradients[used].astype(F64) * float(scale[0])
        expected = [array.astype(F64) for array in (values, squares, last)]
        expected[1][rows] += g**2
        change = -0.05 * g / (numpy.sqrt(expected[1][rows]) + 1e-10)
        if momentum:
            change += expected[2][rows] * momentum
            expected[2][rows] = change
        expected[0][rows] += change
        found = [buffer.read() for buffer in table]
        pairs = dict(zip(("values", "squares", "last"), zip(found, expected)))
        self.compare(
            "adagrad_rows", f"{n} of {n_table} x {n_columns}, momentum {momentum}", 1e-6, **pairs
        )


def check(gpu, record, is_small):
    """Compares every kernel with f64; returns the number of failed comparisons."""
    seed = int.from_bytes(numpy.random.bytes(4), "little")
    record(kind="seed", seed=seed, architecture=gpu.architecture)
    checks = Checks(gpu, record, numpy.random.default_rng(seed))
    small, large = [1, 3, 1023, 5003], [1_048_577, 6_400_065]
    sizes = small if is_small else small + large
    for n in sizes:
        for shift in (0, 1):
            checks.sum_of_squares(n, shift)
            checks.adamw(n, shift)
    checks.adamw(1023, 0, is_skipped=True)
    checks.adamw(1023, 1, is_skipped=True)
    checks.finish_step(is_finite=True)
    checks.finish_step(is_finite=False)
    for n_rows, size, drawn in [
        (500, (64,), (64,)),
        (7, (101,), (101,)),
        (64, (2, 4, 4), (2, 9, 9)),
        (301, (2, 5), (2, 9)),
        (4000 if is_small else 100_003, (1,), (1,)),
        (33 if is_small else 5003, (192,), (192,)),
    ]:
        for shift in (0, 1):
            checks.dropout(n_rows, size, drawn, shift=shift)
    checks.dropout(65, (48,), (48,), in_place=True)
    for n, n_table, n_columns in [(1, 5, 1), (2, 3, 65), (1000, 77, 64), (1025, 5000, 33)]:
        checks.sort_and_sum(n, n_table, n_columns)
    if not is_small:
        checks.sort_and_sum(6001, 100_003, 64)
        checks.sort_and_sum(16_384, 1_000_003, 65)
    for n, n_table, n_columns in [(1, 5, 1), (301, 777, 33), (1000, 1001, 64)]:
        checks.lazy_adamw_rows(n, n_table, n_columns)
        checks.adagrad_rows(n, n_table, n_columns, 0.0)
        checks.adagrad_rows(n, n_table, n_columns, 0.25)
    return checks.n_failed


def launches(gpu, n_items, random):
    """Yields name, launching function and bytes moved of each kernel on a table `[n_items, 64]`."""
    n, n_ids, n_columns = n_items * 64, 6000, 64
    some = random.standard_normal(1 << 20, dtype=F32)
    normal = lambda *shape: numpy.resize(some, shape)
    flat = [Buffer(gpu, normal(n) * F32(0.01)) for _ in range(3)] + [Buffer(gpu, normal(n) ** 2)]
    scale, rates = Buffer(gpu, F32([0.5])), Buffer(gpu, F32([1e-3, 0.999]))
    partial = Buffer(gpu, nans(MAX_PARTIALS, kind=F64))
    ids = Buffer(gpu, random.integers(0, n_items, n_ids, dtype=I64))
    sorted_ids, order = Buffer(gpu, nans(n_ids, kind=I64)), Buffer(gpu, nans(n_ids, kind=I32))
    gradients = Buffer(gpu, normal(n_ids, n_columns))
    row_ids, sums = Buffer(gpu, nans(n_ids, kind=I64)), Buffer(gpu, nans(n_ids, n_columns))
    int32, int64 = ctypes.c_int32, ctypes.c_int64
    table_rates = Buffer(gpu, F64([0, 0.05]))
    n_rows = 5000
    x = Buffer(gpu, normal(n_rows, 192))
    y, keys = Buffer(gpu, nans(n_rows, 192)), Buffer(gpu, numpy.arange(n_rows, dtype=I32))
    yield (
        "adamw",
        lambda: gpu.launch("adamw", *linear_grid(n), *flat, int64(n), scale, rates),
        32 * n,
    )
    yield (
        "sum_of_squares",
        lambda: gpu.launch(
            "sum_of_squares", *linear_grid(n, MAX_PARTIALS), flat[0], int64(n), partial
        ),
        4 * n,
    )
    yield (
        "sort_rows",
        lambda: gpu.launch(
            "sort_rows", (1, 1), (1024, 1), ids, int32(n_ids), int32(8192), sorted_ids, order,
            shared=8 * 8192,
        ),
        20 * n_ids,
    )  # fmt: skip
    yield (
        "sum_rows",
        lambda: gpu.launch(
            "sum_rows", *row_grid(n_ids, n_columns), sorted_ids, order, int32(n_ids), gradients,
            int32(n_columns), row_ids, sums,
        ),
        8 * n_ids * n_columns,
    )  # fmt: skip
    yield (
        "adagrad_rows",
        lambda: gpu.launch(
            "adagrad_rows", *row_grid(n_ids, n_columns), flat[0], flat[3], None, int64(n_items),
            row_ids, sums, int32(n_ids), int32(n_columns), scale, table_rates, ctypes.c_float(0),
        ),
        20 * n_ids * n_columns,
    )  # fmt: skip
    yield (
        "dropout",
        lambda: gpu.launch(
            "dropout", *row_grid(n_rows, 48, 4), x, y, int64(n_rows), int64(192), keys,
            ctypes.c_uint32(1), int32(0), ctypes.c_float(2), *map(int32, (1, 192, 1, 192)),
        ),
        8 * n_rows * 192,
    )  # fmt: skip


def speed(gpu, record, is_small):
    """Records the time of every kernel on tables of three sizes."""
    random = numpy.random.default_rng(1)
    for name, n_items in [("100k", 100_000), ("390k", 390_000), ("1M", 1_000_000)]:
        n_items = 500 if is_small else n_items
        for kernel, launch, n_bytes in launches(gpu, n_items, random):
            ms = gpu.milliseconds(launch, 3 if is_small else 20)
            rate = n_bytes / ms / 1e6
            record(kind="speed", kernel=kernel, items=name, ms=ms, gb_per_s=rate)


# --- The head in PyTorch ---

WIDTH = 64
LOGITS_BYTES = 1 << 30  # `train.logits_mib` on a GPU


def program_head(torch, states, weights, bias, targets):
    """The loss over the catalogue and its gradients, with the operations of the program."""
    n, n_items = len(states), len(weights)
    n_parts = -(-n // min(LOGITS_BYTES // 4 // n_items, n))
    n_each = -(-n // n_parts)
    room = torch.empty(n_each * n_items, device=states.device)
    of_weights, of_bias = torch.zeros_like(weights), torch.zeros_like(bias)
    ones = torch.ones(n_each, device=states.device)

    def run():
        loss, of_states = 0, []
        of_weights.zero_(), of_bias.zero_()
        for first in range(0, n, n_each):
            h, t = states[first : first + n_each], targets[first : first + n_each, None]
            logits = room[: len(h) * n_items].view(len(h), n_items)
            torch.addmm(bias, h, weights.T, out=logits)
            torch.ops.aten._log_softmax.out(logits, 1, False, out=logits)
            loss = loss - logits.gather(1, t).sum(dtype=torch.float64)
            logits.exp_().scatter_(1, t, -1.0, reduce="add")
            of_states.append(logits @ weights)
            of_weights.addmm_(logits.T, h)
            of_bias.addmv_(logits.T, ones[: len(h)])
        return loss, of_states

    return run


def flash_head(torch, states, weights, bias, targets):
    """The softmax-weighted sum of item vectors and its gradients, by flash attention in bf16."""
    q = states.bfloat16()[None, None].requires_grad_()
    k, v = (weights.bfloat16()[None, None].requires_grad_() for _ in range(2))
    gradient = torch.randn_like(q)

    def run():
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=1.0)[0]
        return torch.autograd.grad(out, (q, k, v), gradient)

    return run


def flash_forward(torch, states, weights, bias, targets):
    """As `flash_head`, without gradients."""
    q, k = (x.bfloat16()[None, None] for x in (states, weights))
    return lambda: torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, scale=1.0)


def timed(torch, run, repeats):
    """Milliseconds of the median call, by events, after two calls."""
    for _ in range(2):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in zip(events, events[1:])]
    return max(statistics.median(times), 1e-6)


def ceilings(torch, record, is_small):
    """Records the rates of large products of random matrices and of a copy."""
    n = 256 if is_small else 8192
    for kind, dtype, tf32 in [
        ("f32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ]:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        ms = timed(torch, lambda: a @ b, 5)
        record(kind="ceiling", of=f"product {kind}", ms=ms, tflops=2 * n**3 / ms / 1e9)
    source = torch.randn((1 << 20) if is_small else (1 << 30), device="cuda")
    target = torch.empty_like(source)
    ms = timed(torch, lambda: target.copy_(source), 5)
    record(kind="ceiling", of="copy", ms=ms, tb_per_s=2 * source.nbytes / ms / 1e9)


def tensors(torch, n_items, n):
    states = torch.randn(n, WIDTH, device="cuda") * 0.5
    weights = torch.randn(n_items, WIDTH, device="cuda") * 0.1
    bias = torch.randn(n_items, device="cuda") * 0.1
    return states, weights, bias, torch.randint(n_items, (n,), device="cuda")


def accuracy(torch, record):
    """Differences of the log-sums and of the sums of flash attention from f64."""
    states, weights, _, _ = tensors(torch, 10_007, 64)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    q, k = (x.bfloat16()[None, None] for x in (states, weights))
    out, log_sums = flash(q, k, k, scale=1.0)[:2]
    logits = states.double() @ weights.double().T
    apart = lambda a, b: float((a.double() - b).norm() / b.norm())
    record(
        kind="accuracy",
        log_sums=apart(log_sums[0, 0, : len(states)], logits.logsumexp(1)),
        sums=apart(out[0, 0], logits.softmax(1) @ weights.double()),
    )


def head(record, is_small):
    """Records ceilings and the head for every size and variant."""
    import torch

    ceilings(torch, record, is_small)
    variants = [
        ("program f32", program_head, False),
        ("program tf32", program_head, True),
        ("flash bf16", flash_head, False),
        ("flash bf16, forward", flash_forward, False),
    ]
    accuracy(torch, record)
    for n in (1100, 18_000):
        for name, n_items in [("100k", 100_003), ("390k", 390_001), ("1M", 1_000_003)]:
            size = (500, 30) if is_small else (n_items, n)
            for variant, make, tf32 in variants:
                torch.backends.cuda.matmul.allow_tf32 = tf32
                try:
                    run = make(torch, *tensors(torch, *size))
                    ms = timed(torch, run, 3 if n > 1100 else 7)
                except RuntimeError as error:
                    problem = str(error).splitlines()[0]
                    record(kind="head", items=name, targets=n, variant=variant, problem=problem)
                    continue
                finally:
                    run = None
                    torch.cuda.empty_cache()
                # Of three products, or of the two of flash attention's forward pass. Recomputed
                # products are not counted.
                n_products = 2 if variant.endswith("forward") else 3
                tflops = 2 * n_products * size[0] * size[1] * WIDTH / ms / 1e9
                record(kind="head", items=name, targets=n, variant=variant, ms=ms, tflops=tflops)


def launch_head():
    """One pass over the head of 100k items for 1,100 targets inside the profiler's range."""
    import torch

    run = program_head(torch, *tensors(torch, 100_003, 1100))
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["check", "speed", "head", "launch", "launch-head"])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true", help="small sizes")
    parser.add_argument("--stage", help="of the records; default: the command")
    options = parser.parse_args()
    record = Recorder(options.out, options.stage or options.command)
    match options.command:
        case "check":
            return int(check(Gpu(options.root), record, options.small) > 0)
        case "speed":
            speed(Gpu(options.root), record, options.small)
        case "head":
            head(record, options.small)
        case "launch":
            gpu, random = Gpu(options.root), numpy.random.default_rng(1)
            for _, launch, _ in launches(gpu, 500 if options.small else 100_000, random):
                launch()
            gpu.wait()
        case "launch-head":
            launch_head()
    return 0


if __name__ == "__main__":
    sys.exit(main())
