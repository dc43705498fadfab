//! Ranks as processes with a GPU each: NCCL moves tensors between device memories, MPI everything else.
//!
//! Calls run on libtorch's current stream, so they come after the work that fills a tensor and before the work that
//! reads it, and a buffer that libtorch's allocator hands out again is written by later work of the same stream only.
//! Those beside work have a stream of their own, and the two wait for each other before and after. A call returns when its
//! work is queued.

mod library;

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cudarc::driver::result::{event, stream};
use cudarc::driver::sys::{CUevent_flags, CUevent_wait_flags};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};
use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::os::unix::Library;
use tch::{Cuda, Device, Kind, Tensor};

use super::call::{How, device_name};
use super::watch::{Watch, Watched};
use super::{Call, Collective, CollectiveError, Reduce, Work};

/// How often the watchdog asks NCCL whether the communicator still works.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// `aoti_torch_get_current_cuda_stream` of libtorch's C interface: device index in, stream out, 0 when it went well.
type GetCurrentStream = unsafe extern "C" fn(i32, *mut *mut c_void) -> i32;

/// Whether NCCL is here. It needs no GPU to be found.
///
/// # Errors
/// What the loader said.
pub fn check() -> Result<(), String> {
    library::Nccl::load().map(|_| ())
}

/// The ranks of an MPI job with a GPU each. Dropping it waits for the other ranks to do the same.
pub struct Nccl {
    nccl: &'static library::Nccl,
    communicator: Communicator,
    gpu: usize,
    host_name: String,
    context: Arc<CudaContext>,
    /// For calls beside work.
    aside: Aside,
    get_current_stream: GetCurrentStream,
    watchdog: Option<(Sender<()>, JoinHandle<()>)>,
    // Left last, as fields drop in order.
    host: Box<dyn Collective>,
}

#[derive(Clone, Copy)]
struct Communicator(ncclComm_t);

// SAFETY: NCCL allows any thread to ask for the asynchronous error while another enqueues calls; nothing else is done
// from a second thread, and `Nccl` joins that thread before the communicator goes.
unsafe impl Send for Communicator {}

impl Nccl {
    /// *All ranks.* Makes one communicator of all ranks of `host`, this one with GPU number `gpu` of its host.
    ///
    /// # Errors
    /// A rank without NCCL, a CUDA driver or libtorch's CUDA library; two ranks on one GPU.
    pub fn join(host: Box<dyn Collective>, gpu: usize) -> Result<Self, CollectiveError> {
        let rank = host.rank();
        let missing = |problem| CollectiveError::NcclMissing { rank, problem };
        // Each step that can fail on one rank alone is agreed upon, or the others would wait for it.
        let nccl = host.agree(library::Nccl::load().map_err(missing))?;
        let get_current_stream = host.agree(current_stream_function().map_err(missing))?;
        let context = host.agree(cuda_context(gpu).map_err(missing))?;
        let aside = Aside::new(&context).map_err(|error| missing(format!("GPU {gpu}: {error:?}")));
        let aside = host.agree(aside)?;
        let id = match host.root() {
            Some(_) => nccl.unique_id().map_err(missing),
            None => Ok(ncclUniqueId { internal: [0; 128] }),
        };
        let id = host.agree(id)?.internal.map(|byte| byte as u8);
        let id = host.broadcast_bytes(id.to_vec(), 0)?;
        let mut internal = [0; 128];
        internal.iter_mut().zip(id).for_each(|(to, from)| *to = from as _);

        let mut comm = std::ptr::null_mut();
        let (n_ranks, this_rank) = (host.world_size() as c_int, rank as c_int);
        // SAFETY: `comm` is writable; the context of this rank's GPU is current on this thread; every rank calls this
        // with the same id and a rank of its own.
        let code = unsafe { (nccl.comm_init_rank)(&mut comm, n_ranks, ncclUniqueId { internal }, this_rank) };
        let communicator = Communicator(comm);
        let host_name = super::host_name();
        let mut joined = Self {
            nccl,
            communicator,
            gpu,
            host_name,
            context,
            aside,
            get_current_stream,
            watchdog: None,
            host,
        };
        let started = joined.done("ncclCommInitRank", 0, code);
        joined.host.agree(started)?;
        joined.watchdog = Some(watch(nccl, communicator));
        Ok(joined)
    }

    fn on_gpu(&self, tensor: &Tensor) -> bool {
        tensor.device().is_cuda()
    }

    /// What every call needs: a tensor on this rank's GPU, that GPU current on this thread, libtorch's stream.
    fn stream(&self, call: Call, tensor: &Tensor) -> Result<cudaStream_t, CollectiveError> {
        if tensor.device() != Device::Cuda(self.gpu) {
            return Err(call.refuse(format!(
                "the tensor lies on {}, not on GPU {}",
                device_name(tensor.device()),
                self.gpu
            )));
        }
        self.context.bind_to_thread().map_err(|error| call.refuse(format!("GPU {}: {error:?}", self.gpu)))?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` is writable and the function is libtorch's own.
        match unsafe { (self.get_current_stream)(self.gpu as i32, &mut stream) } {
            0 => Ok(stream.cast()),
            _ => Err(call.refuse(format!("libtorch has no current stream for GPU {}", self.gpu))),
        }
    }

    /// *All ranks.* Makes sure, in builds with debug assertions, that all came to the same call: NCCL would wait for
    /// ever. In the others the hosts may run ahead of their GPUs.
    fn meet(&self, call: Call, tensor: &Tensor, how: How) -> Result<Option<Watched<'_>>, CollectiveError> {
        let words = call.words(tensor, how);
        if cfg!(debug_assertions) {
            let all = self.host.gather_bytes(words.as_bytes())?;
            call.check_words(&words, all.iter().map(|words| str::from_utf8(words).unwrap_or_default()))?;
        }
        let Some(watch) = self.watch() else { return Ok(None) };
        if watch.is_timing() {
            // What is queued comes first, on all ranks.
            Cuda::synchronize(self.gpu as i64);
            self.host.barrier()?;
        }
        let watched = watch.begin(words);
        watched.all_came();
        Ok(Some(watched))
    }

    /// Ends a call, whose time is that of its work if times are asked for.
    fn done(&self, call: &'static str, n_elements: usize, code: c_int) -> Result<(), CollectiveError> {
        self.queued(call, n_elements, code)?;
        if self.watch().is_some_and(Watch::is_timing) {
            Cuda::synchronize(self.gpu as i64);
        }
        Ok(())
    }

    /// Turns NCCL's return code into an error that names this rank.
    fn queued(&self, call: &'static str, n_elements: usize, code: c_int) -> Result<(), CollectiveError> {
        if code == 0 {
            return Ok(());
        }
        Err(CollectiveError::Library {
            call,
            n_elements,
            rank: self.rank(),
            world_size: self.world_size(),
            host: format!("{}, GPU {}", self.host_name, self.gpu),
            text: self.nccl.text(code, self.communicator.0),
        })
    }
}

/// A stream beside libtorch's.
struct Aside {
    stream: Arc<CudaStream>,
    /// On libtorch's: what is to be reduced is there; what was queued beside it is done.
    filled: CudaEvent,
    worked: CudaEvent,
    /// On this one.
    begun: CudaEvent,
    ended: CudaEvent,
}

impl Aside {
    fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        let event = || context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let (filled, worked, begun, ended) = (event()?, event()?, event()?, event()?);
        Ok(Self { stream: context.new_stream()?, filled, worked, begun, ended })
    }

    fn stream(&self) -> cudaStream_t {
        self.stream.cu_stream().cast()
    }

    /// What is queued here from now on is behind what `main` has.
    fn begin_behind(&self, main: cudaStream_t) -> Result<(), DriverError> {
        // SAFETY: libtorch's streams are never destroyed; the event and this stream live as long as `self`.
        unsafe {
            event::record(self.filled.cu_event(), main.cast())?;
            stream::wait_event(self.stream.cu_stream(), self.filled.cu_event(), AT_ONCE)?;
        }
        self.begun.record(&self.stream)
    }

    /// What `main` is given from now on is behind what is queued here.
    fn end_before(&self, main: cudaStream_t) -> Result<(), DriverError> {
        self.ended.record(&self.stream)?;
        // SAFETY: as above.
        unsafe {
            event::record(self.worked.cu_event(), main.cast())?;
            stream::wait_event(main.cast(), self.ended.cu_event(), AT_ONCE)
        }
    }

    /// How long what was queued here took, and how much of it when the work beside it was done. Waits for it.
    fn times(&self) -> Result<(Duration, Duration), DriverError> {
        let between = |from: &CudaEvent| {
            let ms = from.elapsed_ms(&self.ended)?;
            Ok(Duration::from_secs_f32(ms.max(0.0) / 1e3))
        };
        let took = between(&self.begun)?;
        Ok((took, between(&self.worked)?.min(took)))
    }
}

const AT_ONCE: CUevent_wait_flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

/// Ends the job when NCCL finds a peer or a link gone: its kernels would wait for them for ever.
fn watch(nccl: &'static library::Nccl, communicator: Communicator) -> (Sender<()>, JoinHandle<()>) {
    let (stop, stopped) = channel::<()>();
    let watchdog = thread::Builder::new().name("nccl-watchdog".to_owned()).spawn(move || {
        let communicator = communicator;
        while stopped.recv_timeout(WATCH_EVERY) == Err(RecvTimeoutError::Timeout) {
            let mut state = 0;
            // SAFETY: the communicator lives until this thread has ended; `state` is writable.
            let code = unsafe { (nccl.comm_get_async_error)(communicator.0, &mut state) };
            let failed = if code == 0 { state } else { code };
            if failed != 0 && failed != IN_PROGRESS {
                // The hook that `Mpi::join` installed names the rank and ends the job.
                panic!("NCCL failed in the background: {}", nccl.text(failed, communicator.0));
            }
        }
    });
    (stop, watchdog.expect("a process that trains can start one more thread"))
}

/// `ncclInProgress`
const IN_PROGRESS: c_int = 7;

fn current_stream_function() -> Result<GetCurrentStream, String> {
    // SAFETY: the type is that of the declaration in torch/csrc/inductor/aoti_torch/c/shim.h; libtorch is never
    // unloaded.
    unsafe { Library::this().get::<GetCurrentStream>(b"aoti_torch_get_current_cuda_stream\0") }
        .map(|symbol| *symbol)
        .map_err(|error| format!("libtorch's CUDA library is not loaded: {error}"))
}

fn cuda_context(gpu: usize) -> Result<Arc<CudaContext>, String> {
    // SAFETY: the driver's initialisers have no precondition.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("no CUDA driver (`libcuda.so.1`)".to_owned());
    }
    CudaContext::new(gpu).map_err(|error| format!("GPU {gpu}: {error:?}"))
}

impl Drop for Nccl {
    fn drop(&mut self) {
        if let Some((stop, watchdog)) = self.watchdog.take() {
            drop(stop);
            let _ = watchdog.join();
        }
        // A panic ends the process anyway, and the other ranks would not come to this.
        if !thread::panicking() && !self.communicator.0.is_null() {
            // SAFETY: the communicator was made in `join`, nobody else holds it, and it is not used again.
            unsafe { (self.nccl.comm_destroy)(self.communicator.0) };
        }
    }
}

fn data_type(kind: Kind) -> ncclDataType_t {
    match kind {
        Kind::Float => ncclDataType_t::ncclFloat32,
        Kind::Double => ncclDataType_t::ncclFloat64,
        Kind::BFloat16 => ncclDataType_t::ncclBfloat16,
        Kind::Int64 => ncclDataType_t::ncclInt64,
        _ => ncclDataType_t::ncclUint8,
    }
}

impl Reduce {
    fn nccl(self) -> ncclRedOp_t {
        match self {
            Self::Sum => ncclRedOp_t::ncclSum,
            Self::Min => ncclRedOp_t::ncclMin,
            Self::Max => ncclRedOp_t::ncclMax,
        }
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn world_size(&self) -> usize {
        self.host.world_size()
    }

    fn local_rank(&self) -> usize {
        self.host.local_rank()
    }

    fn local_size(&self) -> usize {
        self.host.local_size()
    }

    fn backend(&self) -> &'static str {
        "nccl"
    }

    fn all_reduce(&self, tensor: &mut Tensor, op: Reduce) -> Result<(), CollectiveError> {
        if !self.on_gpu(tensor) {
            return self.host.all_reduce(tensor, op);
        }
        let call = Call::new("all_reduce", self);
        call.check(tensor)?;
        let _call = self.meet(call, tensor, How::Reduce(op))?;
        let (data, n, kind) = (tensor.data_ptr(), tensor.numel(), data_type(tensor.kind()));
        let (comm, stream) = (self.communicator.0, self.stream(call, tensor)?);
        // SAFETY: `data` is device memory of `n` elements, which NCCL may reduce in place; work that touches it again
        // is queued on the same stream, behind this.
        let code = unsafe { (self.nccl.all_reduce)(data, data, n, kind, op.nccl(), comm, stream) };
        self.done("ncclAllReduce", n, code)
    }

    fn reduce_during(&self, tensor: &mut Tensor, op: Reduce, work: Work<'_>) -> Result<(), CollectiveError> {
        if !self.on_gpu(tensor) {
            return self.host.reduce_during(tensor, op, work);
        }
        let call = Call::new("all_reduce", self);
        call.check(tensor)?;
        let watched = self.meet(call, tensor, How::Reduce(op))?;
        let timing = self.watch().filter(|watch| watch.is_timing()).map(|watch| (watch, watch.times()));
        let (data, n, kind) = (tensor.data_ptr(), tensor.numel(), data_type(tensor.kind()));
        let (comm, stream) = (self.communicator.0, self.stream(call, tensor)?);
        let failed = |error: DriverError| call.refuse(format!("GPU {}: {error:?}", self.gpu));
        self.aside.begin_behind(stream).map_err(failed)?;
        // SAFETY: as in `all_reduce`, but that work which touches `data` again is behind `end_before`.
        let code =
            unsafe { (self.nccl.all_reduce)(data, data, n, kind, op.nccl(), comm, self.aside.stream()) };
        self.queued("ncclAllReduce", n, code)?;
        work();
        self.aside.end_before(stream).map_err(failed)?;
        drop(watched);
        if let Some((watch, before)) = timing {
            let (took, last) = self.aside.times().map_err(failed)?;
            watch.correct(before, took);
            watch.hide(before, last);
        }
        Ok(())
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError> {
        if !self.on_gpu(tensor) {
            return self.host.broadcast(tensor, root);
        }
        let call = Call::new("broadcast", self);
        call.check_root(tensor, root)?;
        let _call = self.meet(call, tensor, How::From(root))?;
        let (data, n, kind) = (tensor.data_ptr(), tensor.numel(), data_type(tensor.kind()));
        let (comm, stream) = (self.communicator.0, self.stream(call, tensor)?);
        // SAFETY: as in `all_reduce`; `root` is a rank of the communicator.
        let code = unsafe { (self.nccl.broadcast)(data, data, n, kind, root as c_int, comm, stream) };
        self.done("ncclBroadcast", n, code)
    }

    fn all_gather(&self, part: &Tensor, whole: &mut Tensor) -> Result<(), CollectiveError> {
        if !self.on_gpu(part) {
            return self.host.all_gather(part, whole);
        }
        let call = Call::new("all_gather", self);
        call.check_parts(part, whole)?;
        let _call = self.meet(call, part, How::Plain)?;
        let (n, kind) = (part.numel(), data_type(part.kind()));
        let (comm, stream) = (self.communicator.0, self.stream(call, part)?);
        // SAFETY: device memory of `n` and `world_size * n` elements, apart; later work is behind this on the stream.
        let code =
            unsafe { (self.nccl.all_gather)(part.data_ptr(), whole.data_ptr(), n, kind, comm, stream) };
        self.done("ncclAllGather", n, code)
    }

    fn reduce_scatter(&self, whole: &Tensor, part: &mut Tensor, op: Reduce) -> Result<(), CollectiveError> {
        if !self.on_gpu(whole) {
            return self.host.reduce_scatter(whole, part, op);
        }
        let call = Call::new("reduce_scatter", self);
        call.check_parts(part, whole)?;
        let _call = self.meet(call, whole, How::Reduce(op))?;
        let (n, kind) = (part.numel(), data_type(part.kind()));
        let (comm, stream) = (self.communicator.0, self.stream(call, whole)?);
        let (from, to) = (whole.data_ptr(), part.data_ptr());
        // SAFETY: device memory of `world_size * n` and `n` elements, apart; later work is behind this on the stream.
        let code = unsafe { (self.nccl.reduce_scatter)(from, to, n, kind, op.nccl(), comm, stream) };
        self.done("ncclReduceScatter", n, code)
    }

    /// The host's; a call on a GPU ends when it is queued, and what waits for the GPU is watched where it waits.
    fn watch(&self) -> Option<&Watch> {
        self.host.watch()
    }

    /// The host's: what is queued on the GPUs is ordered by their streams.
    fn barrier(&self) -> Result<(), CollectiveError> {
        self.host.barrier()
    }

    fn abort(&self, code: i32) -> ! {
        self.host.abort(code)
    }
}
