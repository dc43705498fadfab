//! The project's own CUDA kernels: compiled for the GPU at hand by NVRTC when they are first used,
//! and launched on libtorch's current stream.
//!
//! A launch does not wait for the GPU and allocates nothing but results, so that a CUDA graph can
//! capture it. [`load`] must have been called for the GPU before a capture.
//!
//! The functions check device, type, size and memory layout of all tensors. They panic if these do
//! not fit, and return an error if the kernels cannot be compiled, loaded or launched.

mod driver;
pub mod graph;
mod nvrtc;

use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use libloading::Library;
use tch::{Device, Kind, Tensor};

use self::driver::{Driver, Event, Gpu, Grid, Handle};
use self::nvrtc::Nvrtc;
use crate::adamw::AdamWBuffers;
use crate::elements::assert_disjoint;
use crate::transfer::{copy_without_waiting, pinned_bytes};

/// The sources: file name and text.
const SOURCES: [(&str, &str); 3] = [
    ("step.cu", include_str!("cuda/step.cu")),
    ("dropout.cu", include_str!("cuda/dropout.cu")),
    ("rows.cu", include_str!("cuda/rows.cu")),
];

/// Type of a kernel's parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Parameter {
    Pointer,
    I64,
    I32,
    U32,
    F32,
    F64,
}

struct Kernel {
    /// File name of the source.
    source: &'static str,
    name: &'static CStr,
    parameters: &'static [Parameter],
}

use Parameter::{F32, F64, I32, I64, Pointer, U32};

const SUM_OF_SQUARES: Kernel =
    Kernel { source: "step.cu", name: c"sum_of_squares", parameters: &[Pointer, I64, Pointer] };
const FINISH_STEP: Kernel = Kernel {
    source: "step.cu",
    name: c"finish_step",
    parameters: &[
        Pointer, I32, Pointer, Pointer, Pointer, Pointer, F64, F64, Pointer, Pointer, Pointer,
        Pointer, Pointer,
    ],
};
const ADAMW: Kernel = Kernel {
    source: "step.cu",
    name: c"adamw",
    parameters: &[Pointer, Pointer, Pointer, Pointer, I64, Pointer, Pointer],
};
const LAZY_ADAMW_ROWS: Kernel = Kernel {
    source: "step.cu",
    name: c"lazy_adamw_rows",
    parameters: &[Pointer, Pointer, Pointer, I64, Pointer, Pointer, I32, I32, Pointer, Pointer],
};
const DROPOUT: Kernel = Kernel {
    source: "dropout.cu",
    name: c"dropout",
    parameters: &[Pointer, Pointer, I64, I64, Pointer, U32, I32, F32, I32, I32, I32, I32],
};
const SORT_ROWS: Kernel = Kernel {
    source: "rows.cu",
    name: c"sort_rows",
    parameters: &[Pointer, I32, I32, Pointer, Pointer],
};
const ADD_ROWS: Kernel = Kernel {
    source: "rows.cu",
    name: c"add_rows",
    parameters: &[Pointer, I64, Pointer, Pointer, I32, I32],
};
const SUM_ROWS: Kernel = Kernel {
    source: "rows.cu",
    name: c"sum_rows",
    parameters: &[Pointer, Pointer, I32, Pointer, I32, Pointer, Pointer],
};
const ADAGRAD_ROWS: Kernel = Kernel {
    source: "rows.cu",
    name: c"adagrad_rows",
    parameters: &[
        Pointer, Pointer, Pointer, I64, Pointer, Pointer, I32, I32, Pointer, Pointer, F32,
    ],
};

const KERNELS: [Kernel; 9] = [
    SUM_OF_SQUARES,
    FINISH_STEP,
    ADAMW,
    LAZY_ADAMW_ROWS,
    DROPOUT,
    SORT_ROWS,
    SUM_ROWS,
    ADD_ROWS,
    ADAGRAD_ROWS,
];

/// `aoti_torch_get_current_cuda_stream` of libtorch's C interface: takes a device index and returns
/// a stream through the pointer, and 0 on success.
type GetCurrentStream = unsafe extern "C" fn(i32, *mut Handle) -> i32;

/// A GPU with its loaded kernels.
struct LoadedGpu {
    number: usize,
    gpu: Gpu,
    functions: BTreeMap<&'static CStr, Handle>,
    get_current_stream: GetCurrentStream,
}

/// What this process has loaded so far. Nothing is ever unloaded.
struct Loaded {
    libraries: Option<(&'static Driver, Nvrtc)>,
    gpus: BTreeMap<usize, &'static LoadedGpu>,
}

static LOADED: Mutex<Loaded> = Mutex::new(Loaded { libraries: None, gpus: BTreeMap::new() });

/// Compiles and loads the kernels for a GPU, unless this process has done so.
///
/// # Errors
/// The CUDA driver, NVRTC or libtorch's CUDA library is missing, or a kernel does not compile; the
/// error names the searched paths or holds the compiler's log.
///
/// # Panics
/// If `device` is not a GPU.
pub fn load(device: Device) -> Result<(), String> {
    loaded(device).map(|_| ())
}

fn loaded(device: Device) -> Result<&'static LoadedGpu, String> {
    let Device::Cuda(number) = device else { panic!("CUDA kernels do not run on {device:?}") };
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(gpu) = loaded.gpus.get(&number) {
        return Ok(gpu);
    }
    if loaded.libraries.is_none() {
        let (driver, nvrtc) = (Driver::load()?, Nvrtc::load()?);
        loaded.libraries = Some((Box::leak(Box::new(driver)), nvrtc));
    }
    let Some((driver, nvrtc)) = &loaded.libraries else { unreachable!("loaded above") };
    let gpu = Box::leak(Box::new(LoadedGpu::new(number, driver, nvrtc)?));
    loaded.gpus.insert(number, gpu);
    Ok(gpu)
}

impl LoadedGpu {
    fn new(number: usize, driver: &'static Driver, nvrtc: &Nvrtc) -> Result<Self, String> {
        let get_current_stream = current_stream_function()?;
        let gpu = driver.gpu(number)?;
        let mut functions = BTreeMap::new();
        for (source, text) in SOURCES {
            let code = nvrtc.compile(source, text, &gpu.architecture)?;
            let kernels = KERNELS.iter().filter(|kernel| kernel.source == source);
            let names: Vec<&'static CStr> = kernels.map(|kernel| kernel.name).collect();
            functions.extend(names.iter().copied().zip(gpu.load(&code, &names)?));
        }
        gpu.allow_max_shared_bytes(functions[SORT_ROWS.name])?;
        Ok(Self { number, gpu, functions, get_current_stream })
    }

    /// Queues a kernel on libtorch's current stream.
    ///
    /// # Errors
    /// The driver refuses; the error names the kernel.
    ///
    /// # Panics
    /// If the types of the arguments are not those of the kernel's parameters.
    ///
    /// # Safety
    /// The pointers are null where the kernel allows that, or point to memory of this GPU that is
    /// as large as the kernel expects. Written memory has no other pointer among the arguments,
    /// except where the kernel allows that.
    unsafe fn launch(
        &self,
        kernel: &Kernel,
        grid: Grid,
        mut arguments: Vec<Argument>,
    ) -> Result<(), String> {
        let types = arguments.iter().map(Argument::parameter);
        assert!(types.eq(kernel.parameters.iter().copied()), "arguments of {:?}", kernel.name);
        let mut addresses: Vec<*mut c_void> = arguments.iter_mut().map(Argument::address).collect();
        let failed = |problem| format!("the CUDA kernel {:?}: {problem}", kernel.name);
        let stream = self.current_stream().map_err(failed)?;
        // SAFETY: the addresses are those of values of the types of the parameters, which live
        // until the end of the call. libtorch reuses memory of freed tensors for later work on the
        // same stream only. The caller guarantees the rest.
        let launched =
            unsafe { self.gpu.launch(self.functions[kernel.name], grid, stream, &mut addresses) };
        launched.map_err(failed)
    }

    fn current_stream(&self) -> Result<Handle, String> {
        let mut stream = Handle(std::ptr::null_mut());
        // SAFETY: `stream` is writable, and the function is libtorch's.
        match unsafe { (self.get_current_stream)(self.number as i32, &mut stream) } {
            0 => Ok(stream),
            _ => Err(format!("libtorch has no current stream for GPU {}", self.number)),
        }
    }

    fn device(&self) -> Device {
        Device::Cuda(self.number)
    }
}

fn current_stream_function() -> Result<GetCurrentStream, String> {
    let this = libloading::os::unix::Library::this();
    // SAFETY: the type matches the declaration in torch/csrc/inductor/aoti_torch/c/shim.h, and
    // libtorch is never unloaded.
    unsafe { this.get::<GetCurrentStream>(b"aoti_torch_get_current_cuda_stream\0") }
        .map(|symbol| *symbol)
        .map_err(|error| format!("libtorch's CUDA library is not loaded: {error}"))
}

/// Loads a library and never unloads it.
fn open(path: &Path) -> Result<&'static Library, libloading::Error> {
    // SAFETY: loading the CUDA driver or NVRTC has no precondition.
    let library = unsafe { Library::new(path) }?;
    Ok(Box::leak(Box::new(library)))
}

/// Value of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Argument {
    Pointer(*mut c_void),
    I64(i64),
    I32(i32),
    U32(u32),
    F32(f32),
    F64(f64),
}

impl Argument {
    const NULL: Self = Self::Pointer(std::ptr::null_mut());

    /// # Panics
    /// If the number needs more than 31 bits.
    fn int(n: usize) -> Self {
        Self::I32(i32::try_from(n).expect("a size of a kernel has at most 31 bits"))
    }

    fn parameter(&self) -> Parameter {
        match self {
            Self::Pointer(_) => Pointer,
            Self::I64(_) => I64,
            Self::I32(_) => I32,
            Self::U32(_) => U32,
            Self::F32(_) => F32,
            Self::F64(_) => F64,
        }
    }

    /// Address of the value.
    fn address(&mut self) -> *mut c_void {
        match self {
            Self::Pointer(value) => std::ptr::from_mut(value).cast(),
            Self::I64(value) => std::ptr::from_mut(value).cast(),
            Self::I32(value) => std::ptr::from_mut(value).cast(),
            Self::U32(value) => std::ptr::from_mut(value).cast(),
            Self::F32(value) => std::ptr::from_mut(value).cast(),
            Self::F64(value) => std::ptr::from_mut(value).cast(),
        }
    }
}

/// The memory of a tensor as an argument.
///
/// # Panics
/// If the tensor is on another device, of another type or size, or not contiguous.
fn pointer(device: Device, name: &str, tensor: &Tensor, kind: Kind, numel: usize) -> Argument {
    let is_valid = tensor.device() == device
        && tensor.kind() == kind
        && tensor.is_contiguous()
        && tensor.numel() == numel;
    assert!(
        is_valid,
        "`{name}` must be contiguous {kind:?} with {numel} elements on {device:?}, and is \
         {tensor:?} on {:?}",
        tensor.device()
    );
    Argument::Pointer(tensor.data_ptr())
}

const THREADS: u32 = 256;

/// Largest number of blocks along x of a kernel whose threads walk over the elements.
const MAX_BLOCKS: u64 = 1 << 20;

/// Largest number of blocks along y.
const MAX_BLOCKS_Y: u64 = 65_535;

/// Blocks for `n` elements, of which a thread takes four at once.
fn linear_grid(n: usize, max_blocks: u64) -> Grid {
    let n_blocks = (n as u64).div_ceil(4 * u64::from(THREADS)).clamp(1, max_blocks);
    Grid { blocks: [n_blocks as u32, 1], threads: [THREADS, 1], shared_bytes: 0 }
}

/// Blocks with `n_columns` threads along x, and along y `n_rows` threads with `rows_each` rows.
fn row_grid(n_rows: usize, n_columns: usize, rows_each: u64) -> Grid {
    let along_x = (n_columns.max(1) as u64).next_power_of_two().min(u64::from(THREADS));
    let along_y = u64::from(THREADS) / along_x;
    let blocks_x = (n_columns as u64).div_ceil(along_x).clamp(1, MAX_BLOCKS);
    let blocks_y = (n_rows as u64).div_ceil(along_y * rows_each).clamp(1, MAX_BLOCKS_Y);
    Grid {
        blocks: [blocks_x as u32, blocks_y as u32],
        threads: [along_x as u32, along_y as u32],
        shared_bytes: 0,
    }
}

/// Largest number of tensors whose squares [`sum_of_squares`] sums.
pub const MAX_PARTS: usize = 64;

/// Largest number of partial sums of one tensor: all threads of the largest GPUs.
const MAX_PARTIALS: u64 = 1024;

/// Device memory that carries scalars from kernel to kernel of a step, allocated once.
#[derive(Debug)]
pub struct StepBuffers {
    /// Partial sums of squares, f64 `[MAX_PARTS * MAX_PARTIALS]`.
    partial: Tensor,
    n_partials: usize,
    /// Number of steps of AdamW so far, f64 `[1]`.
    pub n_steps: Tensor,
    /// Factor that turns summed gradients into the clipped mean, f32 `[1]`. NaN if the step must
    /// not change the parameters.
    pub scale: Tensor,
    /// Learning rate of AdamW with bias corrections, and factor of the weight decay, f32 `[2]`.
    pub adamw_rates: Tensor,
    /// Summed loss, number of targets, requests to stop and to save, norm of the mean gradient
    /// before clipping, and summed loss of this rank, f64 `[6]`.
    pub outcome: Tensor,
    /// Numbers of steps and of steps without effect since the buffers were made, and `[step, mean
    /// loss, norm, own loss]` of the last [`KEPT_STEPS`] of the latter: f64 [[`N_HISTORY`]].
    pub history: Tensor,
}

/// Steps without effect that the history describes.
pub const KEPT_STEPS: usize = 32;

/// Length of the history.
pub const N_HISTORY: usize = 2 + 4 * KEPT_STEPS;

impl StepBuffers {
    /// Buffers before the first step. This needs no kernel.
    pub fn new(device: Device) -> Self {
        let zeros = |n: i64, kind| Tensor::zeros([n], (kind, device));
        Self {
            partial: zeros(MAX_PARTS as i64 * MAX_PARTIALS as i64, Kind::Double),
            n_partials: 0,
            n_steps: Tensor::from_slice(&[0f64]).to_device(device),
            scale: zeros(1, Kind::Float),
            adamw_rates: zeros(2, Kind::Float),
            outcome: zeros(6, Kind::Double),
            history: Tensor::from_slice(&[0f64; N_HISTORY]).to_device(device),
        }
    }

    /// Sets the number of steps of a restored state.
    pub fn set_n_steps(&mut self, n_steps: i32) {
        self.n_steps.copy_(&Tensor::from_slice(&[f64::from(n_steps)]));
    }
}

/// Sums the squares of the elements of all `parts`, each f32 `[..]`, for [`finish_step`]. The
/// result depends on the sizes of the parts only.
///
/// # Errors
/// See [`load`]; or the driver refuses the launch.
///
/// # Panics
/// If there are more than [`MAX_PARTS`] parts, or one is not f32, contiguous and on the device of
/// the buffers.
pub fn sum_of_squares(parts: &[&Tensor], buffers: &mut StepBuffers) -> Result<(), String> {
    assert!(parts.len() <= MAX_PARTS, "{} parts are more than {MAX_PARTS}", parts.len());
    let gpu = loaded(buffers.partial.device())?;
    buffers.n_partials = 0;
    for part in parts {
        let n = part.numel();
        let grid = linear_grid(n, MAX_PARTIALS);
        let n_partials = grid.blocks[0] as usize;
        let partial = buffers.partial.narrow(0, buffers.n_partials as i64, n_partials as i64);
        let arguments = vec![
            pointer(gpu.device(), "part", part, Kind::Float, n),
            Argument::I64(n as i64),
            pointer(gpu.device(), "partial", &partial, Kind::Double, n_partials),
        ];
        // SAFETY: the sizes were checked, and a block writes one partial sum.
        unsafe { gpu.launch(&SUM_OF_SQUARES, grid, arguments) }?;
        buffers.n_partials += n_partials;
    }
    Ok(())
}

/// Arguments of [`finish_step`], all in device memory but the last two.
#[derive(Clone, Copy, Debug)]
pub struct StepSums<'a> {
    /// Summed loss, number of targets, requests to stop and to save, over all ranks, f32 `[4]`. Set
    /// to zero for the next step.
    pub scalars: &'a Tensor,
    /// Summed loss of this rank, f32 `[1]`. Set to zero for the next step.
    pub own_loss: &'a Tensor,
    /// Sum of squares of gradients that [`sum_of_squares`] has not seen, f32 `[1]`.
    pub extra_squares: Option<&'a Tensor>,
    /// Learning rates of AdamW and of the tables in this step, f64 `[2]`.
    pub rates: &'a Tensor,
    /// Largest norm of the mean gradient.
    pub max_norm: f64,
    /// Weight decay of AdamW.
    pub weight_decay: f64,
}

/// Computes the scalars of the optimizer step from the sums over all ranks and the result of
/// [`sum_of_squares`]: the fields of `buffers`.
///
/// If the loss or the norm is not finite, or the step has no target, `scale` becomes NaN, the
/// number of steps stays, and the kernels of the optimizers change nothing but gradients.
///
/// # Errors
/// See [`load`]; or the driver refuses the launch.
///
/// # Panics
/// If a tensor has another size or type than documented, or is on another device.
pub fn finish_step(sums: StepSums<'_>, buffers: &mut StepBuffers) -> Result<(), String> {
    let gpu = loaded(buffers.partial.device())?;
    let device = gpu.device();
    let StepBuffers { partial, n_partials, n_steps, scale, adamw_rates, outcome, history } =
        buffers;
    let StepSums { scalars, own_loss, extra_squares, rates, max_norm, weight_decay } = sums;
    assert_disjoint(
        &[scalars, own_loss, n_steps, scale, adamw_rates, outcome, history],
        &[partial, rates],
    );
    let extra_squares = extra_squares
        .map(|squares| pointer(device, "extra_squares", squares, Kind::Float, 1))
        .unwrap_or(Argument::NULL);
    let arguments = vec![
        Argument::Pointer(partial.data_ptr()),
        Argument::int(*n_partials),
        extra_squares,
        pointer(device, "scalars", scalars, Kind::Float, 4),
        pointer(device, "own_loss", own_loss, Kind::Float, 1),
        pointer(device, "rates", rates, Kind::Double, 2),
        Argument::F64(max_norm),
        Argument::F64(weight_decay),
        pointer(device, "n_steps", n_steps, Kind::Double, 1),
        pointer(device, "scale", scale, Kind::Float, 1),
        pointer(device, "adamw_rates", adamw_rates, Kind::Float, 2),
        pointer(device, "outcome", outcome, Kind::Double, 6),
        pointer(device, "history", history, Kind::Double, N_HISTORY),
    ];
    let grid = Grid { blocks: [1, 1], threads: [THREADS, 1], shared_bytes: 0 };
    // SAFETY: the sizes were checked, and the written tensors are disjoint from the others.
    unsafe { gpu.launch(&FINISH_STEP, grid, arguments) }
}

/// One step of AdamW with the rates and the scale of `step`, as
/// [`adamw`](crate::adamw::adamw) computes it on a CPU; sets the gradients to zero.
///
/// # Errors
/// See [`load`]; or the driver refuses the launch.
///
/// # Panics
/// If the buffers differ in size, share memory, or are not f32, contiguous and on the device of
/// `step`.
pub fn adamw(buffers: &mut AdamWBuffers, step: &StepBuffers) -> Result<(), String> {
    let gpu = loaded(step.scale.device())?;
    let AdamWBuffers { values, gradients, m, v } = buffers;
    let n = values.numel();
    if n == 0 {
        return Ok(());
    }
    let device = gpu.device();
    assert_disjoint(&[values, gradients, m, v], &[&step.scale, &step.adamw_rates]);
    let arguments = vec![
        pointer(device, "values", values, Kind::Float, n),
        pointer(device, "gradients", gradients, Kind::Float, n),
        pointer(device, "m", m, Kind::Float, n),
        pointer(device, "v", v, Kind::Float, n),
        Argument::I64(n as i64),
        pointer(device, "scale", &step.scale, Kind::Float, 1),
        pointer(device, "adamw_rates", &step.adamw_rates, Kind::Float, 2),
    ];
    // SAFETY: the sizes were checked, and the buffers are disjoint.
    unsafe { gpu.launch(&ADAMW, linear_grid(n, MAX_BLOCKS), arguments) }
}

/// Numbers that are on their way to host memory.
pub struct LateRead {
    /// f64 `[n]`, pinned.
    numbers: Tensor,
    copied: Event,
}

impl LateRead {
    /// Queues a copy of `numbers`, f64 `[n]` on a GPU, which does not wait.
    ///
    /// # Errors
    /// See [`load`]; or the driver refuses.
    pub fn new(numbers: &Tensor) -> Result<Self, String> {
        let gpu = loaded(numbers.device())?;
        let n_bytes = numbers.numel() * Kind::Double.elt_size_in_bytes();
        let host = pinned_bytes(n_bytes as i64).view_dtype(Kind::Double);
        copy_without_waiting(&host, numbers);
        let copied = gpu.gpu.record_event(gpu.current_stream()?)?;
        Ok(Self { numbers: host, copied })
    }

    /// The numbers, after a wait for the work that was queued before the copy.
    ///
    /// # Errors
    /// The work failed.
    pub fn read(&self) -> Result<Vec<f64>, String> {
        self.copied.wait()?;
        Ok(Vec::try_from(&self.numbers).expect("the numbers are f64"))
    }
}

/// A mask of dropout on a GPU, see [`counter`](crate::counter).
#[derive(Clone, Copy, Debug)]
pub struct DropoutMask<'a> {
    /// Key of each row, i32 `[N]`.
    pub row_keys: &'a Tensor,
    /// Number of the place where dropout is applied.
    pub site: u32,
    /// Shape of a row whose leading part the rows are. Only the last two sizes may be larger than
    /// those of the rows.
    pub drawn: &'a [i64],
    /// An element is kept if the product of its numbers is not below.
    pub threshold: i32,
    /// Factor of the elements that are kept.
    pub kept: f32,
}

/// Multiplies `x: [N, ..]`, f32, by a mask. The result has no gradient.
///
/// # Errors
/// See [`load`]; or the driver refuses the launch.
///
/// # Panics
/// If `x` is not f32, contiguous and on a GPU, if there are not `N` row keys on the same GPU, or if
/// the rows are not the leading part of rows of the shape `drawn`.
pub fn dropout(x: &Tensor, mask: &DropoutMask<'_>) -> Result<Tensor, String> {
    let gpu = loaded(x.device())?;
    let device = gpu.device();
    let (size, numel) = (x.size(), x.numel());
    let n_rows = size[0] as usize;
    let [inner_1, inner_2, drawn_1, drawn_2] = inner_sizes(&size[1..], mask.drawn);
    let x = x.detach();
    let y = x.empty_like();
    let row_keys = pointer(device, "row_keys", mask.row_keys, Kind::Int, n_rows);
    let arguments = vec![
        pointer(device, "x", &x, Kind::Float, numel),
        pointer(device, "y", &y, Kind::Float, numel),
        Argument::I64(n_rows as i64),
        Argument::I64(numel.checked_div(n_rows).unwrap_or(0) as i64),
        row_keys,
        Argument::U32(mask.site),
        Argument::I32(mask.threshold),
        Argument::F32(mask.kept),
        Argument::int(inner_1),
        Argument::int(inner_2),
        Argument::int(drawn_1),
        Argument::int(drawn_2),
    ];
    if numel > 0 {
        let n_columns = numel / n_rows;
        let columns_at_once = if n_columns.is_multiple_of(4) { 4 } else { 1 };
        let grid = row_grid(n_rows, n_columns / columns_at_once, ROWS_OF_DROPOUT);
        // SAFETY: the sizes were checked, and `y` was allocated here.
        unsafe { gpu.launch(&DROPOUT, grid, arguments) }?;
    }
    Ok(y)
}

/// Rows of a thread, which computes the numbers of its columns once.
const ROWS_OF_DROPOUT: u64 = 4;

/// The last two sizes of a row, and those of the shape that the row is a leading part of.
///
/// # Panics
/// If the row is not such a part, or other sizes differ.
fn inner_sizes(size: &[i64], drawn: &[i64]) -> [usize; 4] {
    let is_part = size.len() == drawn.len() && size.iter().zip(drawn).all(|(n, drawn)| n <= drawn);
    let n_outer = size.len().saturating_sub(2);
    assert!(
        is_part && size[..n_outer] == drawn[..n_outer],
        "rows of the shape {size:?} are not the leading part, in the last two dimensions, of rows \
         of the shape {drawn:?}"
    );
    let inner = |sizes: &[i64], from_end: usize| {
        sizes.len().checked_sub(from_end).map_or(1, |dim| sizes[dim] as usize)
    };
    [inner(size, 2), inner(size, 1), inner(drawn, 2), inner(drawn, 1)]
}

/// Largest number of ids of [`sort_rows`].
pub const MAX_IDS: usize = 16_384;

/// The ids of a lookup in order, allocated once.
#[derive(Debug)]
pub struct SortedRows {
    /// Sorted ids, i64 `[n]`; unused ones last, as −1.
    pub ids: Tensor,
    /// Position of each in the lookup, i32 `[n]`; −1 for unused ids.
    pub order: Tensor,
}

impl SortedRows {
    /// Buffers for lookups of `n` ids.
    pub fn new(n: i64, device: Device) -> Self {
        let zeros = |kind| Tensor::zeros([n], (kind, device));
        Self { ids: zeros(Kind::Int64), order: zeros(Kind::Int) }
    }
}

/// Sorts the ids of a lookup, i64 `[n]`, by value and then by position. Negative ids are unused.
///
/// # Errors
/// See [`load`]; or the blocks of the GPU have too little shared memory for `n` ids.
///
/// # Panics
/// If `n` is larger than [`MAX_IDS`] or not that of `sorted`, or a tensor has another type or
/// device.
pub fn sort_rows(ids: &Tensor, sorted: &mut SortedRows) -> Result<(), String> {
    let gpu = loaded(sorted.ids.device())?;
    let device = gpu.device();
    let n = ids.numel();
    assert!(n <= MAX_IDS, "{n} ids are more than {MAX_IDS}");
    let capacity = n.next_power_of_two();
    let shared_bytes = capacity * size_of::<u64>();
    let available = gpu.gpu.max_shared_bytes;
    if shared_bytes > available {
        return Err(format!(
            "sorting {n} ids needs {shared_bytes} bytes of shared memory, and a block of this GPU \
             has at most {available}"
        ));
    }
    assert_disjoint(&[&sorted.ids, &sorted.order], &[ids]);
    let arguments = vec![
        pointer(device, "ids", ids, Kind::Int64, n),
        Argument::int(n),
        Argument::int(capacity),
        pointer(device, "sorted ids", &sorted.ids, Kind::Int64, n),
        pointer(device, "order", &sorted.order, Kind::Int, n),
    ];
    let grid = Grid { blocks: [1, 1], threads: [1024, 1], shared_bytes };
    // SAFETY: the sizes were checked, and the written tensors are disjoint from the ids.
    unsafe { gpu.launch(&SORT_ROWS, grid, arguments) }
}

/// Gradients of rows of a table, each of which is listed once, in a fixed number of places.
#[derive(Debug)]
pub struct RowGradients {
    /// Row of the table of each place, i64 `[n]`; −1 for unused places.
    pub row_ids: Tensor,
    /// Summed gradients, f32 `[n, D]`; zero in unused places.
    pub sums: Tensor,
}

impl RowGradients {
    /// Buffers for lookups of `n` rows with `n_columns` columns, `D`.
    pub fn new(n: i64, n_columns: i64, device: Device) -> Self {
        Self {
            row_ids: Tensor::zeros([n], (Kind::Int64, device)),
            sums: Tensor::zeros([n, n_columns], (Kind::Float, device)),
        }
    }

    /// The rows of a table's gradient, `[V, D]`, that are not zero, where they are.
    pub fn of_table(gradient: &Tensor) -> Self {
        // The norm of a row with a NaN is NaN, which is not zero.
        let norms = gradient.norm_scalaropt_dim(2.0, [1i64].as_slice(), false);
        let ids = Tensor::arange(gradient.size()[0], (Kind::Int64, gradient.device()));
        let row_ids = ids.masked_fill(&norms.eq(0.0), -1);
        Self { row_ids, sums: gradient.shallow_clone() }
    }

    fn size(&self) -> (usize, usize) {
        let n = self.row_ids.numel();
        (n, self.sums.numel().checked_div(n).unwrap_or(0))
    }

    /// The arguments of a kernel that changes these rows of `table`, and its grid; `None` if there
    /// is nothing to change.
    fn arguments(&self, table: &Tensor) -> Option<([Argument; 5], Grid)> {
        let device = table.device();
        let (n, n_columns) = self.size();
        if n == 0 || table.numel() == 0 {
            return None;
        }
        let arguments = [
            Argument::I64(n_table_rows(table, n_columns)),
            pointer(device, "row_ids", &self.row_ids, Kind::Int64, n),
            pointer(device, "sums", &self.sums, Kind::Float, n * n_columns),
            Argument::int(n),
            Argument::int(n_columns),
        ];
        Some((arguments, row_grid(n, n_columns, 1)))
    }
}

/// Sums the gradients of a lookup, f32 `[n, D]`, over equal ids, in the order of their positions.
///
/// # Errors
/// See [`load`]; or the driver refuses the launch.
///
/// # Panics
/// If the sizes differ, or a tensor has another type or device.
pub fn sum_rows(
    sorted: &SortedRows,
    gradients: &Tensor,
    rows: &mut RowGradients,
) -> Result<(), String> {
    let gpu = loaded(rows.sums.device())?;
    let device = gpu.device();
    let (n, n_columns) = rows.size();
    if n == 0 {
        return Ok(());
    }
    assert_disjoint(&[&rows.row_ids, &rows.sums], &[&sorted.ids, &sorted.order, gradients]);
    let arguments = vec![
        pointer(device, "sorted ids", &sorted.ids, Kind::Int64, n),
        pointer(device, "order", &sorted.order, Kind::Int, n),
        Argument::int(n),
        pointer(device, "gradients", gradients, Kind::Float, n * n_columns),
        Argument::int(n_columns),
        pointer(device, "row_ids", &rows.row_ids, Kind::Int64, n),
        pointer(device, "sums", &rows.sums, Kind::Float, n * n_columns),
    ];
    // SAFETY: the sizes were checked, and the written tensors are disjoint from the others.
    // `order` holds positions below `n`, because only `sort_rows` writes it.
    unsafe { gpu.launch(&SUM_ROWS, row_grid(n, n_columns, 1), arguments) }
}

/// Sums gradients `[n, ..]` over equal ids, i64 `[n]`, in the order of their positions. Negative
/// ids are unused.
///
/// # Errors
/// See [`load`]; or the driver refuses a launch.
///
/// # Panics
/// If the sizes differ, or a tensor has another type or device.
pub fn summed_by_row(ids: &Tensor, gradients: &Tensor) -> Result<RowGradients, String> {
    let (n, device) = (ids.size()[0], ids.device());
    let gradients = gradients.reshape([n, -1]).contiguous();
    let mut sorted = SortedRows::new(n, device);
    let fits = n as usize <= MAX_IDS && sort_rows(ids, &mut sorted).is_ok();
    if !fits {
        // More ids than one block of the GPU can sort.
        let unused = i64::MAX;
        let (sorted_ids, order) = ids.masked_fill(&ids.lt(0), unused).sort_stable(true, 0, false);
        let is_unused = sorted_ids.eq(unused);
        sorted.ids = sorted_ids.masked_fill(&is_unused, -1);
        sorted.order = order.masked_fill(&is_unused, -1).to_kind(Kind::Int);
    }
    let mut summed = RowGradients::new(n, gradients.size()[1], device);
    sum_rows(&sorted, &gradients, &mut summed)?;
    Ok(summed)
}

/// Adds the sums of rows to a table, f32 `[V, ..]`. A row id that is not in the table stops the
/// kernel, and the next call of CUDA fails.
///
/// # Errors
/// See [`load`]; or the driver refuses the launch.
///
/// # Panics
/// If the table has other columns than the rows, shares memory with them, or a tensor has another
/// type or device.
pub fn add_rows(table: &mut Tensor, rows: &RowGradients) -> Result<(), String> {
    let gpu = loaded(table.device())?;
    let Some((of_rows, grid)) = rows.arguments(table) else { return Ok(()) };
    assert_disjoint(&[table], &[&rows.row_ids, &rows.sums]);
    let mut arguments = vec![pointer(gpu.device(), "table", table, Kind::Float, table.numel())];
    arguments.extend(of_rows);
    // SAFETY: as in `adagrad_rows`.
    unsafe { gpu.launch(&ADD_ROWS, grid, arguments) }
}

/// A table and its state of Adagrad, each f32 `[V, D]`.
#[derive(Clone, Copy, Debug)]
pub struct AdagradTable<'a> {
    pub values: &'a Tensor,
    /// Sums of squared gradients.
    pub squares: &'a Tensor,
    /// Last step of each row; `None` without momentum.
    pub last_step: Option<&'a Tensor>,
}

/// One step of Adagrad on the listed rows, with the scale of `step` and the learning rate
/// `rates[1]`, f64 `[2]`. A listed row takes part with its momentum also if its gradient is zero. A
/// row id that is not in the table stops the kernel, and the next call of CUDA fails.
///
/// # Errors
/// See [`load`]; or the driver refuses the launch.
///
/// # Panics
/// If the tensors of the table differ in size, share memory, or a tensor has another type or
/// device.
pub fn adagrad_rows(
    table: AdagradTable<'_>,
    rows: &RowGradients,
    step: &StepBuffers,
    rates: &Tensor,
    momentum: f64,
) -> Result<(), String> {
    let gpu = loaded(table.values.device())?;
    let device = gpu.device();
    let AdagradTable { values, squares, last_step } = table;
    let numel = values.numel();
    let Some((of_rows, grid)) = rows.arguments(values) else { return Ok(()) };
    let written: Vec<&Tensor> = [values, squares].into_iter().chain(last_step).collect();
    assert_disjoint(&written, &[&rows.row_ids, &rows.sums, &step.scale, rates]);
    let last_step = last_step
        .map(|last_step| pointer(device, "last_step", last_step, Kind::Float, numel))
        .unwrap_or(Argument::NULL);
    let mut arguments = vec![
        pointer(device, "values", values, Kind::Float, numel),
        pointer(device, "squares", squares, Kind::Float, numel),
        last_step,
    ];
    arguments.extend(of_rows);
    arguments.extend([
        pointer(device, "scale", &step.scale, Kind::Float, 1),
        pointer(device, "rates", rates, Kind::Double, 2),
        Argument::F32(momentum as f32),
    ]);
    // SAFETY: the sizes were checked, the written tensors are disjoint from the others, the kernel
    // refuses ids outside of the table, and `sum_rows` and `RowGradients::of_table` list each row
    // once.
    unsafe { gpu.launch(&ADAGRAD_ROWS, grid, arguments) }
}

/// A table and its moments, each f32 `[V, D]`.
#[derive(Clone, Copy, Debug)]
pub struct AdamWTable<'a> {
    pub values: &'a Tensor,
    /// First moments.
    pub m: &'a Tensor,
    /// Second moments.
    pub v: &'a Tensor,
}

/// One step of AdamW on the listed rows, with the rates and the scale of `step`. Other rows keep
/// their values and moments. A row id that is not in the table stops the kernel, and the next call
/// of CUDA fails.
///
/// # Errors
/// See [`load`]; or the driver refuses the launch.
///
/// # Panics
/// If the tensors of the table differ in size, share memory, or a tensor has another type or
/// device.
pub fn lazy_adamw_rows(
    table: AdamWTable<'_>,
    rows: &RowGradients,
    step: &StepBuffers,
) -> Result<(), String> {
    let gpu = loaded(table.values.device())?;
    let device = gpu.device();
    let AdamWTable { values, m, v } = table;
    let numel = values.numel();
    let Some((of_rows, grid)) = rows.arguments(values) else { return Ok(()) };
    let read = [&rows.row_ids, &rows.sums, &step.scale, &step.adamw_rates];
    assert_disjoint(&[values, m, v], &read);
    let mut arguments = vec![
        pointer(device, "values", values, Kind::Float, numel),
        pointer(device, "m", m, Kind::Float, numel),
        pointer(device, "v", v, Kind::Float, numel),
    ];
    arguments.extend(of_rows);
    arguments.extend([
        pointer(device, "scale", &step.scale, Kind::Float, 1),
        pointer(device, "adamw_rates", &step.adamw_rates, Kind::Float, 2),
    ]);
    // SAFETY: as in `adagrad_rows`.
    unsafe { gpu.launch(&LAZY_ADAMW_ROWS, grid, arguments) }
}

/// Number of rows of a table with `n_columns` columns.
fn n_table_rows(values: &Tensor, n_columns: usize) -> i64 {
    let numel = values.numel();
    assert!(
        n_columns > 0 && numel.is_multiple_of(n_columns),
        "a table of {numel} numbers has no rows of {n_columns}"
    );
    (numel / n_columns) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names and types of the parameters of the kernels in a source, each of which has launch
    /// bounds.
    fn kernels_in(source: &str) -> Vec<(&str, Vec<Parameter>)> {
        let parameter = |text: &str| {
            let words: Vec<&str> = text.split_whitespace().collect();
            let (_, kind) = words.split_last().expect("a parameter has a type and a name");
            match kind {
                // `__restrict__` may stand behind the star.
                _ if kind.iter().any(|word| word.ends_with('*')) => Pointer,
                ["long", "long"] => I64,
                ["int"] => I32,
                ["unsigned"] => U32,
                ["float"] => F32,
                ["double"] => F64,
                _ => panic!("the parameter `{text}` has an unknown type"),
            }
        };
        let kernel = |text: &'static str| {
            let (_, text) = text.split_once(')')?;
            let (name, text) = text.split_once('(')?;
            let (parameters, _) = text.split_once(')')?;
            Some((name.trim(), parameters.split(',').map(parameter).collect()))
        };
        let source = SOURCES.iter().find(|(name, _)| *name == source).unwrap().1;
        source.split("__global__").skip(1).map(|text| kernel(text).unwrap()).collect()
    }

    #[test]
    fn kernels_have_the_parameters_that_are_passed() {
        for (source, _) in SOURCES {
            let kernels = KERNELS.iter().filter(|kernel| kernel.source == source);
            let passed: Vec<_> = kernels
                .map(|kernel| (kernel.name.to_str().unwrap(), kernel.parameters.to_vec()))
                .collect();
            assert_eq!(kernels_in(source), passed);
        }
    }

    #[test]
    fn arguments_have_the_types_of_parameters_and_the_addresses_of_values() {
        let mut argument = Argument::F32(2.5);
        assert_eq!(argument.parameter(), F32);
        // SAFETY: the argument holds an f32.
        assert_eq!(unsafe { *argument.address().cast::<f32>() }, 2.5);
        let mut argument = Argument::int(7);
        // SAFETY: the argument holds an i32.
        assert_eq!(unsafe { *argument.address().cast::<i32>() }, 7);
    }

    #[test]
    fn grids_cover_all_elements_within_the_limits_of_cuda() {
        assert_eq!(linear_grid(0, 8).blocks, [1, 1]);
        assert_eq!(linear_grid(1025, 8).blocks, [2, 1]);
        assert_eq!(linear_grid(usize::MAX, 8).blocks, [8, 1]);
        let grid = row_grid(1000, 16, 4);
        assert_eq!((grid.threads, grid.blocks), ([16, 16], [1, 16]));
        let grid = row_grid(1 << 30, 769, 1);
        assert_eq!((grid.threads, grid.blocks), ([256, 1], [4, 65_535]));
        assert_eq!(row_grid(3, 1, 1).threads, [1, 256]);
    }

    #[test]
    fn rows_without_gradient_are_unused() {
        let gradient = Tensor::from_slice(&[0f32, 1e-10, 0.0, 0.0, f32::NAN, 0.0]).view([3, 2]);
        let RowGradients { row_ids, sums } = RowGradients::of_table(&gradient);
        assert_eq!(Vec::<i64>::try_from(row_ids).unwrap(), [0, -1, 2]);
        assert_eq!(sums.size(), [3, 2]);
    }

    #[test]
    fn rows_of_a_mask_are_the_leading_part_of_the_drawn_shape() {
        assert_eq!(inner_sizes(&[], &[]), [1, 1, 1, 1]);
        assert_eq!(inner_sizes(&[64], &[64]), [1, 64, 1, 64]);
        assert_eq!(inner_sizes(&[2, 5], &[2, 20]), [2, 5, 2, 20]);
        assert_eq!(inner_sizes(&[4, 5, 5], &[4, 20, 20]), [5, 5, 20, 20]);
    }

    #[test]
    #[should_panic(expected = "are not the leading part")]
    fn a_mask_that_is_smaller_than_the_rows_is_refused() {
        inner_sizes(&[4, 21, 21], &[4, 20, 20]);
    }

    #[test]
    #[should_panic(expected = "`x` must be contiguous Float with 3 elements on Cpu")]
    fn a_tensor_of_another_size_is_refused() {
        pointer(Device::Cpu, "x", &Tensor::from_slice(&[1f32, 2.0]), Kind::Float, 3);
    }

    #[test]
    #[should_panic(expected = "CUDA kernels do not run on Cpu")]
    fn tensors_in_host_memory_are_refused() {
        let _ = dropout(
            &Tensor::from_slice(&[1f32]),
            &DropoutMask {
                row_keys: &Tensor::from_slice(&[1i32]),
                site: 1,
                drawn: &[],
                threshold: 0,
                kept: 2.0,
            },
        );
    }

    #[test]
    #[expect(clippy::print_stdout, reason = "a skipped test prints the reason")]
    fn without_a_gpu_the_error_says_what_is_missing() {
        match load(Device::Cuda(0)) {
            Ok(()) => println!("skipped: this host has a GPU"),
            Err(error) => assert!(
                ["no CUDA driver", "NVRTC", "libtorch", "cu"]
                    .iter()
                    .any(|part| error.contains(part)),
                "{error}"
            ),
        }
    }
}
