//! Ranks as processes with one GPU each: NCCL carries tensors in device memory, MPI all others.
//!
//! Calls are queued on libtorch's current stream. So they run after the kernels that fill a tensor
//! and before those that read it, and memory that libtorch's allocator reuses is written by later
//! kernels of the same stream only. Overlapped calls are queued on a side stream, which waits for
//! the current stream before the call, and for which the current stream waits after it. A call
//! returns when it is queued.

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

use super::call::{CallArgs, device_name};
use super::watch::{CallGuard, Watch};
use super::{Call, Collective, CollectiveError, Reduce, Work};

/// Interval at which the NCCL watchdog polls the communicator for errors.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// `aoti_torch_get_current_cuda_stream` of libtorch's C interface: takes a device index and returns
/// a stream through the pointer, and 0 on success.
type GetCurrentStream = unsafe extern "C" fn(i32, *mut *mut c_void) -> i32;

/// The version of the NCCL that is loaded, such as `2.28.9`. This needs no GPU.
///
/// # Errors
/// No usable NCCL is found; the error holds the messages of the loader.
pub fn version() -> Result<String, String> {
    library::Nccl::load().map(library::Nccl::version_name)
}

/// The ranks of an MPI job with one GPU each. Dropping it waits until all ranks drop theirs.
pub struct Nccl {
    nccl: &'static library::Nccl,
    communicator: Communicator,
    gpu: usize,
    host_name: String,
    context: Arc<CudaContext>,
    /// For overlapped calls.
    side_stream: SideStream,
    get_current_stream: GetCurrentStream,
    watchdog: Option<(Sender<()>, JoinHandle<()>)>,
    // Fields drop in order: MPI is left last.
    host: Box<dyn Collective>,
}

#[derive(Clone, Copy)]
struct Communicator(ncclComm_t);

// SAFETY: NCCL allows one thread to query the asynchronous error while another queues calls. The
// second thread does nothing else, and `Nccl` joins it before it destroys the communicator.
unsafe impl Send for Communicator {}

impl Nccl {
    /// *All ranks.* Creates a communicator over all ranks of `host`. This rank uses GPU number
    /// `gpu` of its host.
    ///
    /// # Errors
    /// A rank lacks NCCL, a CUDA driver or libtorch's CUDA library, or two ranks use one GPU.
    pub fn join(host: Box<dyn Collective>, gpu: usize) -> Result<Self, CollectiveError> {
        let rank = host.rank();
        let missing = |problem| CollectiveError::NcclMissing { rank, problem };
        // All ranks agree after each step that can fail on one rank alone. Otherwise the other
        // ranks would wait for it in the next call.
        let nccl = host.agree(library::Nccl::load().map_err(missing))?;
        let get_current_stream = host.agree(current_stream_function().map_err(missing))?;
        let context = host.agree(cuda_context(gpu).map_err(missing))?;
        let side_stream = SideStream::new(&context);
        let side_stream =
            host.agree(side_stream.map_err(|error| missing(format!("GPU {gpu}: {error:?}"))))?;
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
        // A rank that does not arrive, or an unusable network interface, blocks this call forever.
        let call = host.watch().map(|watch| watch.begin("ncclCommInitRank".to_owned()));
        // SAFETY: `comm` is writable, the context of this rank's GPU is current on this thread, and
        // all ranks pass the same id and different ranks.
        let code = unsafe {
            (nccl.comm_init_rank)(&mut comm, n_ranks, ncclUniqueId { internal }, this_rank)
        };
        drop(call);
        let communicator = Communicator(comm);
        let host_name = super::host_name();
        let mut joined = Self {
            nccl,
            communicator,
            gpu,
            host_name,
            context,
            side_stream,
            get_current_stream,
            watchdog: None,
            host,
        };
        let initialised = joined.finish("ncclCommInitRank", 0, code);
        joined.host.agree(initialised)?;
        joined.watchdog = Some(start_watchdog(nccl, communicator));
        Ok(joined)
    }

    fn on_gpu(&self, tensor: &Tensor) -> bool {
        tensor.device().is_cuda()
    }

    /// Checks that the tensor is on this rank's GPU, makes that GPU current on this thread, and
    /// returns libtorch's current stream.
    fn stream(&self, call: Call, tensor: &Tensor) -> Result<cudaStream_t, CollectiveError> {
        if tensor.device() != Device::Cuda(self.gpu) {
            return Err(call.refuse(format!(
                "the tensor is on {}, not on GPU {}",
                device_name(tensor.device()),
                self.gpu
            )));
        }
        self.context
            .bind_to_thread()
            .map_err(|error| call.refuse(format!("GPU {}: {error:?}", self.gpu)))?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` is writable, and the function is libtorch's.
        match unsafe { (self.get_current_stream)(self.gpu as i32, &mut stream) } {
            0 => Ok(stream.cast()),
            _ => Err(call.refuse(format!("libtorch has no current stream for GPU {}", self.gpu))),
        }
    }

    /// *All ranks.* Registers the call with the watchdog. In builds with debug assertions it also
    /// checks that all ranks make the same call; NCCL would hang otherwise. Other builds skip the
    /// check, which costs a host collective, so that the hosts can run ahead of their GPUs.
    fn begin_call(
        &self,
        call: Call,
        tensor: &Tensor,
        args: CallArgs,
    ) -> Result<Option<CallGuard<'_>>, CollectiveError> {
        let description = call.description(tensor, args);
        if cfg!(debug_assertions) {
            let all = self.host.gather_bytes(description.as_bytes())?;
            let all = all.iter().map(|bytes| str::from_utf8(bytes).unwrap_or_default());
            call.check_descriptions(&description, all)?;
        }
        let Some(watch) = self.watch() else { return Ok(None) };
        if watch.is_timing() {
            // Queued kernels belong to the phase before, and a slower rank's to `waiting`. The time
            // of the call starts when all ranks have finished them.
            Cuda::synchronize(self.gpu as i64);
            self.host.barrier()?;
        }
        let guard = watch.begin(description);
        guard.all_arrived();
        Ok(Some(guard))
    }

    /// Checks the return code of a call and, if calls are measured, waits until the GPU has
    /// finished it.
    fn finish(
        &self,
        call: &'static str,
        n_elements: usize,
        code: c_int,
    ) -> Result<(), CollectiveError> {
        self.check_code(call, n_elements, code)?;
        if self.watch().is_some_and(Watch::is_timing) {
            Cuda::synchronize(self.gpu as i64);
        }
        Ok(())
    }

    /// Converts an NCCL return code to an error that names this rank.
    fn check_code(
        &self,
        call: &'static str,
        n_elements: usize,
        code: c_int,
    ) -> Result<(), CollectiveError> {
        if code == 0 {
            return Ok(());
        }
        Err(CollectiveError::Library {
            call,
            n_elements,
            rank: self.rank(),
            world_size: self.world_size(),
            host: format!("{}, GPU {}", self.host_name, self.gpu),
            text: self.nccl.error_text(code, self.communicator.0),
        })
    }
}

/// A second stream for overlapped calls. It forks from libtorch's current stream and joins it
/// again.
struct SideStream {
    stream: Arc<CudaStream>,
    /// On libtorch's stream: the input of the call is complete.
    input_ready: CudaEvent,
    /// On libtorch's stream: the overlapped work is complete.
    work_done: CudaEvent,
    /// On this stream: the call starts.
    started: CudaEvent,
    /// On this stream: the call is complete.
    finished: CudaEvent,
}

impl SideStream {
    fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        // The default flags record times, which `times` reads.
        let event = || context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let (input_ready, work_done, started, finished) = (event()?, event()?, event()?, event()?);
        Ok(Self { stream: context.new_stream()?, input_ready, work_done, started, finished })
    }

    fn stream(&self) -> cudaStream_t {
        self.stream.cu_stream().cast()
    }

    /// Makes later calls on this stream wait for the kernels that are queued on `main`.
    fn fork_from(&self, main: cudaStream_t) -> Result<(), DriverError> {
        // SAFETY: libtorch's streams are never destroyed; the event and this stream live as long as
        // `self`.
        unsafe {
            event::record(self.input_ready.cu_event(), main.cast())?;
            stream::wait_event(self.stream.cu_stream(), self.input_ready.cu_event(), WAIT_FLAGS)?;
        }
        self.started.record(&self.stream)
    }

    /// Makes later kernels on `main` wait for the calls that are queued on this stream.
    fn join_into(&self, main: cudaStream_t) -> Result<(), DriverError> {
        self.finished.record(&self.stream)?;
        // SAFETY: as above.
        unsafe {
            // Before the wait, so that the event marks the end of the work alone.
            event::record(self.work_done.cu_event(), main.cast())?;
            stream::wait_event(main.cast(), self.finished.cu_event(), WAIT_FLAGS)
        }
    }

    /// Waits for the last call and returns its time, and the part of it after the end of the
    /// overlapped work.
    fn times(&self) -> Result<(Duration, Duration), DriverError> {
        let until_finished = |from: &CudaEvent| {
            let ms = from.elapsed_ms(&self.finished)?;
            Ok(Duration::from_secs_f32(ms.max(0.0) / 1e3))
        };
        let total = until_finished(&self.started)?;
        Ok((total, until_finished(&self.work_done)?.min(total)))
    }
}

const WAIT_FLAGS: CUevent_wait_flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

/// Starts a thread that ends the job if NCCL reports a lost peer or link. NCCL's kernels would wait
/// for it forever.
fn start_watchdog(
    nccl: &'static library::Nccl,
    communicator: Communicator,
) -> (Sender<()>, JoinHandle<()>) {
    let (stop, stopped) = channel::<()>();
    let watchdog = thread::Builder::new().name("nccl-watchdog".to_owned()).spawn(move || {
        // Captures the struct, which is `Send`, and not its pointer.
        let communicator = communicator;
        while stopped.recv_timeout(POLL_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            let mut state = 0;
            // SAFETY: the communicator lives until this thread has ended, and `state` is writable.
            let code = unsafe { (nccl.comm_get_async_error)(communicator.0, &mut state) };
            let failed = if code == 0 { state } else { code };
            if failed != 0 && failed != IN_PROGRESS {
                // The panic hook of `Mpi::join` prints the rank and ends the job.
                panic!(
                    "NCCL failed in the background: {}",
                    nccl.error_text(failed, communicator.0)
                );
            }
        }
    });
    (stop, watchdog.expect("a process that trains can start one more thread"))
}

/// `ncclInProgress`
const IN_PROGRESS: c_int = 7;

fn current_stream_function() -> Result<GetCurrentStream, String> {
    // SAFETY: the type matches the declaration in torch/csrc/inductor/aoti_torch/c/shim.h, and
    // libtorch is never unloaded.
    unsafe { Library::this().get::<GetCurrentStream>(b"aoti_torch_get_current_cuda_stream\0") }
        .map(|symbol| *symbol)
        .map_err(|error| format!("libtorch's CUDA library is not loaded: {error}"))
}

fn cuda_context(gpu: usize) -> Result<Arc<CudaContext>, String> {
    // SAFETY: loading the driver has no precondition.
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
        // Destroying the communicator waits for all ranks. After a panic the other ranks do not
        // reach this point, and the process ends anyway.
        if !thread::panicking() && !self.communicator.0.is_null() {
            let _call = self.host.watch().map(|watch| watch.begin("ncclCommDestroy".to_owned()));
            // SAFETY: the communicator was created in `join`, has no other user and is not used
            // again.
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
        let _call = self.begin_call(call, tensor, CallArgs::Op(op))?;
        let (data, n, kind) = (tensor.data_ptr(), tensor.numel(), data_type(tensor.kind()));
        let (comm, stream) = (self.communicator.0, self.stream(call, tensor)?);
        // SAFETY: `data` is device memory of `n` elements, and NCCL supports reduction in place.
        // Later kernels that use the memory are queued on the same stream after this call.
        let code = unsafe { (self.nccl.all_reduce)(data, data, n, kind, op.nccl(), comm, stream) };
        self.finish("ncclAllReduce", n, code)
    }

    fn reduce_during(
        &self,
        tensor: &mut Tensor,
        op: Reduce,
        work: Work<'_>,
    ) -> Result<(), CollectiveError> {
        if !self.on_gpu(tensor) {
            return self.host.reduce_during(tensor, op, work);
        }
        let call = Call::new("all_reduce", self);
        call.check(tensor)?;
        let guard = self.begin_call(call, tensor, CallArgs::Op(op))?;
        let timing =
            self.watch().filter(|watch| watch.is_timing()).map(|watch| (watch, watch.times()));
        let (data, n, kind) = (tensor.data_ptr(), tensor.numel(), data_type(tensor.kind()));
        let (comm, stream) = (self.communicator.0, self.stream(call, tensor)?);
        let failed = |error: DriverError| call.refuse(format!("GPU {}: {error:?}", self.gpu));
        self.side_stream.fork_from(stream).map_err(failed)?;
        let side_stream = self.side_stream.stream();
        // SAFETY: as in `all_reduce`. `work` does not use `data`, and later kernels that do wait
        // for this call after `join_into`.
        let code =
            unsafe { (self.nccl.all_reduce)(data, data, n, kind, op.nccl(), comm, side_stream) };
        self.check_code("ncclAllReduce", n, code)?;
        work();
        self.side_stream.join_into(stream).map_err(failed)?;
        drop(guard);
        if let Some((watch, before)) = timing {
            // The guard measured the time to queue the call and the work; the events measure the
            // GPU's time.
            let (total, exposed) = self.side_stream.times().map_err(failed)?;
            watch.correct(before, total);
            watch.hide(before, exposed);
        }
        Ok(())
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError> {
        if !self.on_gpu(tensor) {
            return self.host.broadcast(tensor, root);
        }
        let call = Call::new("broadcast", self);
        call.check_root(tensor, root)?;
        let _call = self.begin_call(call, tensor, CallArgs::Root(root))?;
        let (data, n, kind) = (tensor.data_ptr(), tensor.numel(), data_type(tensor.kind()));
        let (comm, stream) = (self.communicator.0, self.stream(call, tensor)?);
        // SAFETY: as in `all_reduce`; `root` is a rank of the communicator.
        let code =
            unsafe { (self.nccl.broadcast)(data, data, n, kind, root as c_int, comm, stream) };
        self.finish("ncclBroadcast", n, code)
    }

    fn all_gather(&self, part: &Tensor, whole: &mut Tensor) -> Result<(), CollectiveError> {
        if !self.on_gpu(part) {
            return self.host.all_gather(part, whole);
        }
        let call = Call::new("all_gather", self);
        call.check_parts(part, whole)?;
        let _call = self.begin_call(call, part, CallArgs::None)?;
        let (n, kind) = (part.numel(), data_type(part.kind()));
        let (comm, stream) = (self.communicator.0, self.stream(call, part)?);
        // SAFETY: device memory of `n` and `world_size * n` elements without overlap. Later kernels
        // are queued on the same stream after this call.
        let code = unsafe {
            (self.nccl.all_gather)(part.data_ptr(), whole.data_ptr(), n, kind, comm, stream)
        };
        self.finish("ncclAllGather", n, code)
    }

    fn reduce_scatter(
        &self,
        whole: &Tensor,
        part: &mut Tensor,
        op: Reduce,
    ) -> Result<(), CollectiveError> {
        if !self.on_gpu(whole) {
            return self.host.reduce_scatter(whole, part, op);
        }
        let call = Call::new("reduce_scatter", self);
        call.check_parts(part, whole)?;
        let _call = self.begin_call(call, whole, CallArgs::Op(op))?;
        let (n, kind) = (part.numel(), data_type(part.kind()));
        let (comm, stream) = (self.communicator.0, self.stream(call, whole)?);
        let (from, to) = (whole.data_ptr(), part.data_ptr());
        // SAFETY: device memory of `world_size * n` and `n` elements without overlap. Later kernels
        // are queued on the same stream after this call.
        let code =
            unsafe { (self.nccl.reduce_scatter)(from, to, n, kind, op.nccl(), comm, stream) };
        self.finish("ncclReduceScatter", n, code)
    }

    /// The watchdog of the host collective. A call on a GPU ends when it is queued, so code that
    /// waits for the GPU registers with the watchdog itself.
    fn watch(&self) -> Option<&Watch> {
        self.host.watch()
    }

    /// A barrier of the hosts. The order of queued kernels is kept by the streams.
    fn barrier(&self) -> Result<(), CollectiveError> {
        self.host.barrier()
    }

    fn abort(&self, code: i32) -> ! {
        self.host.abort(code)
    }
}
