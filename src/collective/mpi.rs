//! Ranks as processes: MPI carries tensors in host memory.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::Write;
use std::panic::{PanicHookInfo, resume_unwind};
use std::thread;
use std::time::{Duration, Instant};

use bireme_base::console;
use mpi::datatype::Equivalence;
use mpi::environment::Universe;
use mpi::ffi;
use mpi::topology::{Communicator, SimpleCommunicator};
use mpi::traits::{AsRaw, CommunicatorCollectives};
use tch::{Device, Kind, Tensor};

use super::bf16::Operations;
use super::call::{CallArgs, device_name};
use super::watch::{CallGuard, Watch};
use super::{Call, Collective, CollectiveError, Reduce, Work, host_name};
use crate::device::{has_free_core, memory};

/// Size of a call's description, padded. The longest description is shorter.
const DESCRIPTION_BYTES: usize = 96;

/// Size of a host name, padded or cut.
const HOST_BYTES: usize = 64;

/// Tag of the messages that carry a description.
const TAG: c_int = 1;

/// Elements in one MPI call. MPI counts elements with a 32-bit integer.
const MAX_ELEMENTS: usize = 1 << 30;

/// Name and version of the linked MPI library.
pub fn library() -> String {
    let version = mpi::environment::library_version().unwrap_or_else(|_| "unknown".to_owned());
    version.split(',').next().unwrap_or_default().trim().to_owned()
}

/// The processes that one launcher started. Dropping it finalises MPI, which waits for all ranks.
pub struct Mpi {
    rank: usize,
    world_size: usize,
    local_rank: usize,
    local_size: usize,
    host: String,
    watch: Watch,
    /// Descriptions of the current call by rank, [`DESCRIPTION_BYTES`] each. It is a field because
    /// it must outlive every pending receive into it.
    descriptions: RefCell<Vec<u8>>,
    max_elements: usize,
    overlap: Overlap,
    // Fields drop in order: these two are freed before MPI is finalised.
    bf16: Operations,
    world: SimpleCommunicator,
    _universe: Universe,
}

impl Mpi {
    /// *All ranks.* Joins the job. From now on a panic on any thread of this rank ends the job with
    /// exit code 1. Calls are made by the thread that joined, or by a thread that it waits for.
    pub fn join() -> Result<Self, CollectiveError> {
        let (universe, threading) = mpi::initialize_with_threading(mpi::Threading::Serialized)
            .ok_or(CollectiveError::Launch {
                problem: "this process has joined MPI before".to_owned(),
                hint: "join once and hand the collective on",
            })?;
        // Errors on this communicator are returned, so that the message can name the rank and the
        // number of elements. MPI would end the job without them.
        let world = universe.world().duplicate();
        // SAFETY: the communicator lives in `world`; both handles are valid after MPI_Init.
        unsafe { ffi::MPI_Comm_set_errhandler(world.as_raw(), ffi::RSMPI_ERRORS_RETURN) };
        let shared = world.split_shared(world.rank());
        let (rank, world_size) = (world.rank() as usize, world.size() as usize);
        let host = host_name();
        let mut hosts = vec![0_u8; HOST_BYTES * world_size];
        world.all_gather_into(&padded::<HOST_BYTES>(&host)[..], &mut hosts[..]);
        let hosts = hosts.chunks_exact(HOST_BYTES).map(|host| unpadded(host).to_owned()).collect();
        let mpi = Self {
            rank,
            world_size,
            local_rank: shared.rank() as usize,
            local_size: shared.size() as usize,
            host,
            watch: Watch::start(rank, hosts, end_late_job),
            descriptions: RefCell::new(vec![b' '; DESCRIPTION_BYTES * world_size]),
            max_elements: MAX_ELEMENTS,
            overlap: match threading {
                mpi::Threading::Serialized | mpi::Threading::Multiple => Overlap::IfCoreIsFree,
                _ => Overlap::Never,
            },
            bf16: Operations::new(),
            world,
            _universe: universe,
        };
        let name = format!("rank {} of {} on {}", mpi.rank, mpi.world_size, mpi.host);
        let watch = mpi.watch.clone();
        std::panic::set_hook(Box::new(move |panic| {
            if !console::expects_panics() {
                end_job(&name, &watch, panic);
            }
        }));
        Ok(mpi)
    }

    /// Splits calls at `max_elements`, so that tests can split small tensors.
    #[must_use]
    pub fn with_max_elements(self, max_elements: usize) -> Self {
        Self { max_elements, ..self }
    }

    /// Overlaps calls with work even if no core is free, so that tests run the overlap on any
    /// machine.
    #[must_use]
    pub fn always_overlapping(self) -> Self {
        Self { overlap: Overlap::Always, ..self }
    }

    fn check_host(&self, call: Call, tensor: &Tensor) -> Result<(), CollectiveError> {
        if tensor.device() != Device::Cpu {
            return Err(call.refuse(format!(
                "the tensor is on {}, but MPI carries host memory only; `on_device` adds NCCL for \
                 GPUs",
                device_name(tensor.device())
            )));
        }
        Ok(())
    }

    /// *All ranks.* Checks that all ranks make the same call. Dropping the guard ends the call.
    ///
    /// MPI does not check this: given unequal sizes, Open MPI wrote past the end of the shorter
    /// buffer. Rank 0 receives the descriptions of all ranks one by one, so that the watchdog knows
    /// the missing ranks, and then broadcasts them.
    fn begin_call(
        &self,
        call: Call,
        tensor: &Tensor,
        args: CallArgs,
    ) -> Result<CallGuard<'_>, CollectiveError> {
        let description = call.description(tensor, args);
        let guard = self.watch.begin_tracked(description.clone());
        let local = padded::<DESCRIPTION_BYTES>(&description);
        let mut descriptions = self.descriptions.borrow_mut();
        if self.rank == 0 {
            descriptions[..DESCRIPTION_BYTES].copy_from_slice(&local);
            self.receive_descriptions(&mut descriptions)?;
        } else {
            let (n, datatype) = (DESCRIPTION_BYTES as c_int, u8::equivalent_datatype().as_raw());
            // SAFETY: `local` holds `n` bytes, and rank 0 receives `n` bytes.
            let code = unsafe {
                ffi::MPI_Send(local.as_ptr().cast(), n, datatype, 0, TAG, self.world.as_raw())
            };
            self.check_code("MPI_Send", n, code)?;
        }
        let n = descriptions.len();
        let start = descriptions.as_mut_ptr().cast();
        self.broadcast_elements(
            Buffer { start, element_bytes: 1, datatype: u8::equivalent_datatype().as_raw() },
            0,
            n,
            0,
        )?;
        call.check_descriptions(
            &description,
            descriptions.chunks_exact(DESCRIPTION_BYTES).map(unpadded),
        )?;
        guard.all_arrived();
        Ok(guard)
    }

    /// On rank 0: receives the descriptions of all other ranks, and keeps the watchdog's list of
    /// missing ranks up to date.
    fn receive_descriptions(&self, descriptions: &mut [u8]) -> Result<(), CollectiveError> {
        let mut missing: Vec<usize> = (1..self.world_size).collect();
        let (n, datatype) = (DESCRIPTION_BYTES as c_int, u8::equivalent_datatype().as_raw());
        let mut requests = Vec::with_capacity(missing.len());
        for &rank in &missing {
            let slot = descriptions[rank * DESCRIPTION_BYTES..].as_mut_ptr().cast();
            // SAFETY: MPI initialises the request. The slot holds `n` bytes, nothing else uses it
            // until the request is done, and it lives as long as `self`, even if this function
            // returns early.
            let code = unsafe {
                let mut request = ffi::RSMPI_REQUEST_NULL;
                let code = ffi::MPI_Irecv(
                    slot,
                    n,
                    datatype,
                    rank as c_int,
                    TAG,
                    self.world.as_raw(),
                    &mut request,
                );
                requests.push(request);
                code
            };
            self.check_code("MPI_Irecv", n, code)?;
        }
        self.watch.set_missing(&missing);
        let n_requests = requests.len();
        let mut indices: Vec<c_int> = vec![0; n_requests];
        let mut statuses = Vec::with_capacity(n_requests);
        while !missing.is_empty() {
            let mut n_done = 0;
            // SAFETY: all four arrays have room for `n_requests`. MPI sets finished requests to
            // null and ignores null requests.
            let code = unsafe {
                let (requests, indices) = (requests.as_mut_ptr(), indices.as_mut_ptr());
                ffi::MPI_Testsome(
                    n_requests as c_int,
                    requests,
                    &mut n_done,
                    indices,
                    statuses.as_mut_ptr(),
                )
            };
            self.check_code("MPI_Testsome", n, code)?;
            match usize::try_from(n_done) {
                Ok(n_done) if n_done > 0 => {
                    let arrived = &indices[..n_done.min(n_requests)];
                    missing.retain(|&rank| !arrived.contains(&(rank as c_int - 1)));
                    self.watch.set_missing(&missing);
                }
                // Ranks that share this core may need it before they can make the call.
                _ => thread::yield_now(),
            }
        }
        Ok(())
    }

    /// The MPI operation for elements of this kind.
    fn operation(&self, op: Reduce, kind: Kind) -> ffi::MPI_Op {
        if kind == Kind::BFloat16 {
            return self.bf16.operation(op);
        }
        // SAFETY: constants of the C header, which rsmpi exports as statics that are never written.
        unsafe {
            match op {
                Reduce::Sum => ffi::RSMPI_SUM,
                Reduce::Min => ffi::RSMPI_MIN,
                Reduce::Max => ffi::RSMPI_MAX,
            }
        }
    }

    /// Start and number of elements of each MPI call for `n_elements`.
    fn segments(&self, n_elements: usize) -> impl Iterator<Item = (usize, c_int)> {
        let max = self.max_elements;
        (0..n_elements).step_by(max).map(move |start| (start, max.min(n_elements - start) as c_int))
    }

    /// Converts an MPI return code to an error that names this rank.
    fn check_code(
        &self,
        call: &'static str,
        n_elements: c_int,
        code: c_int,
    ) -> Result<(), CollectiveError> {
        if code == 0 {
            return Ok(());
        }
        let mut text = [0 as c_char; ffi::MPI_MAX_ERROR_STRING as usize + 1];
        let mut length = 0;
        // SAFETY: `text` has room for the longest text that MPI writes and a terminating zero.
        let text = unsafe {
            ffi::MPI_Error_string(code, text.as_mut_ptr(), &mut length);
            CStr::from_ptr(text.as_ptr())
        };
        Err(CollectiveError::Library {
            call,
            n_elements: n_elements as usize,
            rank: self.rank,
            world_size: self.world_size,
            host: self.host.clone(),
            text: text.to_string_lossy().into_owned(),
        })
    }

    fn broadcast_elements(
        &self,
        buffer: Buffer,
        start: usize,
        n_elements: usize,
        root: usize,
    ) -> Result<(), CollectiveError> {
        for (offset, n) in self.segments(n_elements) {
            // SAFETY: `buffer` is a checked host tensor with at least `start + offset + n`
            // elements, which the caller keeps alive.
            let code = unsafe {
                let to = buffer.element(start + offset);
                ffi::MPI_Bcast(to, n, buffer.datatype, root as c_int, self.world.as_raw())
            };
            self.check_code("MPI_Bcast", n, code)?;
        }
        Ok(())
    }
}

/// Ends the job after a timeout of the watchdog.
fn end_late_job() -> ! {
    // MPI_Abort may hang too.
    thread::spawn(|| {
        thread::sleep(Duration::from_secs(10));
        // SAFETY: `_exit` ends the process without running handlers.
        unsafe { libc::_exit(1) }
    });
    abort(1)
}

/// Ends the job after a panic. Unwinding would drop [`Mpi`], which waits for ranks that wait for
/// this one.
fn end_job(rank: &str, watch: &Watch, panic: &PanicHookInfo<'_>) {
    let thread = thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    let context = format!("{rank}, thread `{thread}`, {}", watch.progress());
    match memory::allocation_failure(panic.payload()) {
        Some(failure) => console::error(&format!("{context}: {failure}")),
        None => console::internal_error(&context, panic),
    }
    abort(1)
}

/// Ends the job from any thread: it needs no [`Mpi`].
fn abort(code: i32) -> ! {
    let _ = std::io::stdout().flush();
    SimpleCommunicator::world().abort(code)
}

/// The text in a fixed number of bytes: cut, or padded with spaces.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [b' '; N];
    bytes.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    bytes
}

fn unpadded(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap_or_default().trim_end()
}

/// When a call runs on a second thread while this thread works. A waiting rank polls, so without a
/// free core it takes as much time from the work as the overlap saves.
#[derive(Clone, Copy)]
enum Overlap {
    /// The MPI library does not allow calls from a second thread.
    Never,
    IfCoreIsFree,
    Always,
}

/// An [`Mpi`] that a second thread uses while this thread does not.
struct Lent<'a>(&'a Mpi);

// SAFETY: MPI was initialised for calls from one thread at a time (`Serialized`). The fields that
// are not `Sync` are used by calls only, and the borrowing thread makes no call before the scope
// joins the second.
unsafe impl Send for Lent<'_> {}

/// A checked tensor in the form of MPI's arguments.
#[derive(Clone, Copy)]
struct Buffer {
    start: *mut c_void,
    element_bytes: usize,
    datatype: ffi::MPI_Datatype,
}

impl Buffer {
    fn new(tensor: &Tensor) -> Self {
        let datatype = match tensor.kind() {
            Kind::Float => f32::equivalent_datatype().as_raw(),
            Kind::Double => f64::equivalent_datatype().as_raw(),
            Kind::BFloat16 => u16::equivalent_datatype().as_raw(),
            Kind::Int64 => i64::equivalent_datatype().as_raw(),
            _ => u8::equivalent_datatype().as_raw(),
        };
        Self {
            start: tensor.data_ptr(),
            element_bytes: tensor.kind().elt_size_in_bytes(),
            datatype,
        }
    }

    /// Address of element `index`.
    fn element(self, index: usize) -> *mut c_void {
        self.start.wrapping_byte_add(index * self.element_bytes)
    }
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn local_rank(&self) -> usize {
        self.local_rank
    }

    fn local_size(&self) -> usize {
        self.local_size
    }

    fn backend(&self) -> &'static str {
        "mpi"
    }

    fn all_reduce(&self, tensor: &mut Tensor, op: Reduce) -> Result<(), CollectiveError> {
        let call = Call::new("all_reduce", self);
        call.check(tensor)?;
        self.check_host(call, tensor)?;
        if self.world_size == 1 {
            return Ok(());
        }
        let _call = self.begin_call(call, tensor, CallArgs::Op(op))?;
        // A copy, because MPI_IN_PLACE is a macro of the C header that rsmpi does not export.
        let copy = call.snapshot(tensor)?;
        let (from, to) = (Buffer::new(&copy), Buffer::new(tensor));
        let op = self.operation(op, tensor.kind());
        for (offset, n) in self.segments(tensor.numel()) {
            // SAFETY: both are host tensors of one kind and size that do not overlap, with at least
            // `offset + n` elements.
            let code = unsafe {
                let world = self.world.as_raw();
                ffi::MPI_Allreduce(
                    from.element(offset),
                    to.element(offset),
                    n,
                    to.datatype,
                    op,
                    world,
                )
            };
            self.check_code("MPI_Allreduce", n, code)?;
        }
        Ok(())
    }

    fn reduce_during(
        &self,
        tensor: &mut Tensor,
        op: Reduce,
        work: Work<'_>,
    ) -> Result<(), CollectiveError> {
        let overlaps = match self.overlap {
            Overlap::Never => false,
            Overlap::IfCoreIsFree => has_free_core(self.local_size),
            Overlap::Always => true,
        };
        if self.world_size == 1 || !overlaps {
            // Work first: in the other order ranks would wait for each other here and, because the
            // work takes a different time on each rank, again at the next call.
            work();
            return self.all_reduce(tensor, op);
        }
        let before = self.watch.times();
        let lent = Lent(self);
        thread::scope(|scope| {
            let call = scope.spawn(move || {
                let Lent(mpi) = { lent };
                // All other cores are busy with `work`.
                tch::set_num_threads(1);
                mpi.all_reduce(tensor, op)
            });
            work();
            let work_done = Instant::now();
            let reduced = call.join().unwrap_or_else(|panic| resume_unwind(panic));
            self.watch.hide(before, work_done.elapsed());
            reduced
        })
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError> {
        let call = Call::new("broadcast", self);
        call.check_root(tensor, root)?;
        self.check_host(call, tensor)?;
        let _call = self.begin_call(call, tensor, CallArgs::Root(root))?;
        self.broadcast_elements(Buffer::new(tensor), 0, tensor.numel(), root)
    }

    fn all_gather(&self, part: &Tensor, whole: &mut Tensor) -> Result<(), CollectiveError> {
        let call = Call::new("all_gather", self);
        call.check_parts(part, whole)?;
        self.check_host(call, part)?;
        let _call = self.begin_call(call, part, CallArgs::None)?;
        let n_elements = part.numel();
        if whole.numel() > self.max_elements {
            // MPI_Allgather stores the parts of one call contiguously, but segments of different
            // parts are not contiguous in the whole. So each rank broadcasts its part.
            let mut slot =
                whole.view([-1]).narrow(0, (self.rank * n_elements) as i64, n_elements as i64);
            call.copy(&mut slot, part)?;
            return (0..self.world_size).try_for_each(|root| {
                self.broadcast_elements(Buffer::new(whole), root * n_elements, n_elements, root)
            });
        }
        let (from, to, n) = (Buffer::new(part), Buffer::new(whole), n_elements as c_int);
        // SAFETY: host tensors of one kind that do not overlap, of `n` and `world_size * n`
        // elements.
        let code = unsafe {
            let world = self.world.as_raw();
            ffi::MPI_Allgather(from.start, n, from.datatype, to.start, n, to.datatype, world)
        };
        self.check_code("MPI_Allgather", n, code)
    }

    fn reduce_scatter(
        &self,
        whole: &Tensor,
        part: &mut Tensor,
        op: Reduce,
    ) -> Result<(), CollectiveError> {
        let call = Call::new("reduce_scatter", self);
        call.check_parts(part, whole)?;
        self.check_host(call, whole)?;
        let _call = self.begin_call(call, whole, CallArgs::Op(op))?;
        let n_elements = part.numel();
        let (from, to, world) = (Buffer::new(whole), Buffer::new(part), self.world.as_raw());
        let op = self.operation(op, whole.kind());
        if whole.numel() > self.max_elements {
            for root in 0..self.world_size {
                for (offset, n) in self.segments(n_elements) {
                    let segment = from.element(root * n_elements + offset);
                    // SAFETY: as below, for a segment of the part that rank `root` keeps.
                    let code = unsafe {
                        ffi::MPI_Reduce(
                            segment,
                            to.element(offset),
                            n,
                            to.datatype,
                            op,
                            root as c_int,
                            world,
                        )
                    };
                    self.check_code("MPI_Reduce", n, code)?;
                }
            }
            return Ok(());
        }
        let n = n_elements as c_int;
        // SAFETY: host tensors of one kind that do not overlap, of `world_size * n` and `n`
        // elements.
        let code = unsafe {
            ffi::MPI_Reduce_scatter_block(from.start, to.start, n, to.datatype, op, world)
        };
        self.check_code("MPI_Reduce_scatter_block", n, code)
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.begin_call(
            Call::new("barrier", self),
            &Tensor::from_slice::<u8>(&[]),
            CallArgs::NoTensor,
        )
        .map(drop)
    }

    fn watch(&self) -> Option<&Watch> {
        Some(&self.watch)
    }

    fn abort(&self, code: i32) -> ! {
        abort(code)
    }
}
