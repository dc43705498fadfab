//! Ranks as processes: MPI moves tensors between host memories.

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
use super::call::{How, device_name};
use super::watch::{Watch, Watched};
use super::{Call, Collective, CollectiveError, Reduce, Work, host_name};
use crate::device::{has_free_core, memory};

/// Bytes in which a rank says what it came for; the longest call needs fewer.
const WORDS_BYTES: usize = 96;

/// Bytes of a host's name.
const HOST_BYTES: usize = 64;

/// Marks what a rank came for among other messages.
const TAG: c_int = 1;

/// Elements in one MPI call: MPI counts with a 32-bit integer.
const MOST_ELEMENTS: usize = 1 << 30;

/// The MPI that this program is linked to, in its own words.
pub fn library() -> String {
    let version = mpi::environment::library_version().unwrap_or_else(|_| "unknown".to_owned());
    version.split(',').next().unwrap_or_default().trim().to_owned()
}

/// The processes that one launcher started. Dropping it leaves MPI and waits for the other ranks to do the same.
pub struct Mpi {
    rank: usize,
    world_size: usize,
    local_rank: usize,
    local_size: usize,
    host: String,
    watch: Watch,
    /// On rank 0: what the ranks came for, [`WORDS_BYTES`] each. As long-lived as any receive into it.
    inbox: RefCell<Vec<u8>>,
    most_elements: usize,
    lends: Lends,
    // Freed before the universe ends, as fields drop in order.
    bf16: Operations,
    world: SimpleCommunicator,
    _universe: Universe,
}

impl Mpi {
    /// *All ranks.* Joins the job, and makes a panic on any thread of this rank the end of it, with exit code 1.
    /// The calls are made from the thread that joined, or from one that it waits for.
    pub fn join() -> Result<Self, CollectiveError> {
        let (universe, threading) =
            mpi::initialize_with_threading(mpi::Threading::Serialized).ok_or(CollectiveError::Launch {
                problem: "this process has joined MPI before".to_owned(),
                hint: "join once and hand the collective on",
            })?;
        // Our own communicator: its errors come back to us instead of ending the job without our rank and counts.
        let world = universe.world().duplicate();
        // SAFETY: the communicator lives in `world`; both handles are what MPI_Init has set up.
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
            inbox: RefCell::new(vec![b' '; WORDS_BYTES * world_size]),
            most_elements: MOST_ELEMENTS,
            lends: match threading {
                mpi::Threading::Serialized | mpi::Threading::Multiple => Lends::WhereACoreIsFree,
                _ => Lends::Never,
            },
            bf16: Operations::new(),
            world,
            _universe: universe,
        };
        let name = format!("rank {} of {} on {}", mpi.rank, mpi.world_size, mpi.host);
        let watch = mpi.watch.clone();
        std::panic::set_hook(Box::new(move |panic| end_job(&name, &watch, panic)));
        Ok(mpi)
    }

    /// Cuts tensors into calls of at most `most_elements`, so that tests reach the cuts with small tensors.
    #[must_use]
    pub fn with_most_elements(self, most_elements: usize) -> Self {
        Self { most_elements, ..self }
    }

    /// Makes calls beside work on a thread of its own even if no core is free for it, so that tests reach that.
    #[must_use]
    pub fn always_lending(self) -> Self {
        Self { lends: Lends::Always, ..self }
    }

    fn check_host(&self, call: Call, tensor: &Tensor) -> Result<(), CollectiveError> {
        if tensor.device() != Device::Cpu {
            return Err(call.refuse(format!(
                "the tensor lies on {}, and MPI carries host memory; `on_device` adds NCCL for the others",
                device_name(tensor.device())
            )));
        }
        Ok(())
    }

    /// *All ranks.* Makes sure that all came to the same call, which is over when what this returns is dropped. MPI itself
    /// does not: given unequal sizes, Open MPI wrote past the end of the shorter buffer. Rank 0 takes all that the ranks
    /// came for, so that it knows who is missing, and tells it to all.
    fn meet(&self, call: Call, tensor: &Tensor, how: How) -> Result<Watched<'_>, CollectiveError> {
        let words = call.words(tensor, how);
        let watched = self.watch.begin_met(words.clone());
        let mine = padded::<WORDS_BYTES>(&words);
        let mut inbox = self.inbox.borrow_mut();
        if self.rank == 0 {
            inbox[..WORDS_BYTES].copy_from_slice(&mine);
            self.await_others(&mut inbox)?;
        } else {
            let (n, datatype) = (WORDS_BYTES as c_int, u8::equivalent_datatype().as_raw());
            // SAFETY: `mine` holds `n` bytes; rank 0 receives as many.
            let code =
                unsafe { ffi::MPI_Send(mine.as_ptr().cast(), n, datatype, 0, TAG, self.world.as_raw()) };
            self.done("MPI_Send", n, code)?;
        }
        let n = inbox.len();
        let start = inbox.as_mut_ptr().cast();
        self.broadcast_elements(
            Buffer { start, element_bytes: 1, datatype: u8::equivalent_datatype().as_raw() },
            0,
            n,
            0,
        )?;
        call.check_words(&words, inbox.chunks_exact(WORDS_BYTES).map(unpadded))?;
        watched.all_came();
        Ok(watched)
    }

    /// On rank 0: takes what every other rank came for.
    fn await_others(&self, inbox: &mut [u8]) -> Result<(), CollectiveError> {
        let mut missing: Vec<usize> = (1..self.world_size).collect();
        let (n, datatype) = (WORDS_BYTES as c_int, u8::equivalent_datatype().as_raw());
        let mut requests = Vec::with_capacity(missing.len());
        for &rank in &missing {
            let slot = inbox[rank * WORDS_BYTES..].as_mut_ptr().cast();
            // SAFETY: MPI initialises the request; the slot holds `n` bytes, nobody else touches it until the request is
            // done, and it lives as long as `self`, also if this returns early.
            let code = unsafe {
                let mut request = ffi::RSMPI_REQUEST_NULL;
                let code =
                    ffi::MPI_Irecv(slot, n, datatype, rank as c_int, TAG, self.world.as_raw(), &mut request);
                requests.push(request);
                code
            };
            self.done("MPI_Irecv", n, code)?;
        }
        self.watch.set_missing(&missing);
        let n_requests = requests.len();
        let mut indices: Vec<c_int> = vec![0; n_requests];
        let mut statuses = Vec::with_capacity(n_requests);
        while !missing.is_empty() {
            let mut n_done = 0;
            // SAFETY: all four arrays have room for `n_requests`; finished requests become null ones, which MPI passes over.
            let code = unsafe {
                let (requests, indices) = (requests.as_mut_ptr(), indices.as_mut_ptr());
                ffi::MPI_Testsome(n_requests as c_int, requests, &mut n_done, indices, statuses.as_mut_ptr())
            };
            self.done("MPI_Testsome", n, code)?;
            match usize::try_from(n_done) {
                Ok(n_done) if n_done > 0 => {
                    let came = &indices[..n_done.min(n_requests)];
                    missing.retain(|&rank| !came.contains(&(rank as c_int - 1)));
                    self.watch.set_missing(&missing);
                }
                // Ranks that share this core may need it to come.
                _ => thread::yield_now(),
            }
        }
        Ok(())
    }

    /// What combines elements of this kind.
    fn operation(&self, op: Reduce, kind: Kind) -> ffi::MPI_Op {
        if kind == Kind::BFloat16 {
            return self.bf16.of(op);
        }
        // SAFETY: constants of the C header, which rsmpi exports as statics that nobody writes.
        unsafe {
            match op {
                Reduce::Sum => ffi::RSMPI_SUM,
                Reduce::Min => ffi::RSMPI_MIN,
                Reduce::Max => ffi::RSMPI_MAX,
            }
        }
    }

    /// First element and number of elements of each call for `n_elements`.
    fn cuts(&self, n_elements: usize) -> impl Iterator<Item = (usize, c_int)> {
        let most = self.most_elements;
        (0..n_elements).step_by(most).map(move |start| (start, most.min(n_elements - start) as c_int))
    }

    /// Turns MPI's return code into an error that names this rank.
    fn done(&self, call: &'static str, n_elements: c_int, code: c_int) -> Result<(), CollectiveError> {
        if code == 0 {
            return Ok(());
        }
        let mut text = [0 as c_char; ffi::MPI_MAX_ERROR_STRING as usize + 1];
        let mut length = 0;
        // SAFETY: `text` holds the longest text that MPI writes, and stays terminated by the zero behind it.
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
        for (cut, n) in self.cuts(n_elements) {
            // SAFETY: `buffer` is a checked host tensor with `start + cut + n` elements or more, alive in the caller.
            let code = unsafe {
                let to = buffer.at(start + cut);
                ffi::MPI_Bcast(to, n, buffer.datatype, root as c_int, self.world.as_raw())
            };
            self.done("MPI_Bcast", n, code)?;
        }
        Ok(())
    }
}

/// The end of the job when a call lasts too long.
fn end_late_job() -> ! {
    // MPI may be stuck as well.
    thread::spawn(|| {
        thread::sleep(Duration::from_secs(10));
        // SAFETY: ends the process without running anything of it.
        unsafe { libc::_exit(1) }
    });
    abort(1)
}

/// The end of the job after a panic: dropping [`Mpi`] would wait for ranks that wait for this one.
fn end_job(rank: &str, watch: &Watch, panic: &PanicHookInfo<'_>) {
    let thread = thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    let place = format!("{rank}, thread `{thread}`, {}", watch.whereabouts());
    match memory::refused(panic.payload()) {
        Some(refused) => console::error(&format!("{place}: {refused}")),
        None => console::internal_error(&place, panic),
    }
    abort(1)
}

/// Needs no [`Mpi`], so that any thread can end the job.
fn abort(code: i32) -> ! {
    let _ = std::io::stdout().flush();
    SimpleCommunicator::world().abort(code)
}

/// A text as all ranks exchange it: cut, or filled up with blanks.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [b' '; N];
    bytes.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    bytes
}

fn unpadded(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap_or_default().trim_end()
}

/// When calls are made on another thread beside work on this one. Ranks wait for each other by asking again and again, which takes
/// from the work as much as it hides unless there is a core for it.
#[derive(Clone, Copy)]
enum Lends {
    /// This MPI does not allow it.
    Never,
    WhereACoreIsFree,
    Always,
}

/// What a thread lends to another, and does not use itself until that has ended.
struct Lent<'a>(&'a Mpi);

// SAFETY: MPI was asked for calls from one thread at a time, whichever, and the fields that are not made for several threads are
// touched by calls only. The borrow ends with a scope of threads.
unsafe impl Send for Lent<'_> {}

/// A checked tensor as MPI takes it.
#[derive(Clone, Copy)]
struct Buffer {
    start: *mut c_void,
    element_bytes: usize,
    datatype: ffi::MPI_Datatype,
}

impl Buffer {
    fn of(tensor: &Tensor) -> Self {
        let datatype = match tensor.kind() {
            Kind::Float => f32::equivalent_datatype().as_raw(),
            Kind::Double => f64::equivalent_datatype().as_raw(),
            Kind::BFloat16 => u16::equivalent_datatype().as_raw(),
            Kind::Int64 => i64::equivalent_datatype().as_raw(),
            _ => u8::equivalent_datatype().as_raw(),
        };
        Self { start: tensor.data_ptr(), element_bytes: tensor.kind().elt_size_in_bytes(), datatype }
    }

    fn at(self, element: usize) -> *mut c_void {
        self.start.wrapping_byte_add(element * self.element_bytes)
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
        let _call = self.meet(call, tensor, How::Reduce(op))?;
        // MPI_IN_PLACE is a macro of the C header that rsmpi does not carry.
        let mine = call.snapshot(tensor)?;
        let (from, to) = (Buffer::of(&mine), Buffer::of(tensor));
        let op = self.operation(op, tensor.kind());
        for (cut, n) in self.cuts(tensor.numel()) {
            // SAFETY: both are host tensors of one kind and size, apart in memory, with `cut + n` elements or more.
            let code = unsafe {
                let world = self.world.as_raw();
                ffi::MPI_Allreduce(from.at(cut), to.at(cut), n, to.datatype, op, world)
            };
            self.done("MPI_Allreduce", n, code)?;
        }
        Ok(())
    }

    fn reduce_during(&self, tensor: &mut Tensor, op: Reduce, work: Work<'_>) -> Result<(), CollectiveError> {
        let lends = match self.lends {
            Lends::Never => false,
            Lends::WhereACoreIsFree => has_free_core(self.local_size),
            Lends::Always => true,
        };
        if self.world_size == 1 || !lends {
            // In this order ranks wait for each other's work once.
            work();
            return self.all_reduce(tensor, op);
        }
        let before = self.watch.times();
        let lent = Lent(self);
        thread::scope(|scope| {
            let call = scope.spawn(move || {
                let Lent(mpi) = { lent };
                // The others are at work.
                tch::set_num_threads(1);
                mpi.all_reduce(tensor, op)
            });
            work();
            let since = Instant::now();
            let done = call.join().unwrap_or_else(|panic| resume_unwind(panic));
            self.watch.hide(before, since.elapsed());
            done
        })
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError> {
        let call = Call::new("broadcast", self);
        call.check_root(tensor, root)?;
        self.check_host(call, tensor)?;
        let _call = self.meet(call, tensor, How::From(root))?;
        self.broadcast_elements(Buffer::of(tensor), 0, tensor.numel(), root)
    }

    fn all_gather(&self, part: &Tensor, whole: &mut Tensor) -> Result<(), CollectiveError> {
        let call = Call::new("all_gather", self);
        call.check_parts(part, whole)?;
        self.check_host(call, part)?;
        let _call = self.meet(call, part, How::Plain)?;
        let n_elements = part.numel();
        if whole.numel() > self.most_elements {
            // Cuts of a part do not lie together in the whole, so every rank sends its part by itself.
            let mut slot = whole.view([-1]).narrow(0, (self.rank * n_elements) as i64, n_elements as i64);
            call.copy(&mut slot, part)?;
            return (0..self.world_size).try_for_each(|root| {
                self.broadcast_elements(Buffer::of(whole), root * n_elements, n_elements, root)
            });
        }
        let (from, to, n) = (Buffer::of(part), Buffer::of(whole), n_elements as c_int);
        // SAFETY: host tensors of one kind, apart in memory, of `n` and `world_size * n` elements.
        let code = unsafe {
            let world = self.world.as_raw();
            ffi::MPI_Allgather(from.start, n, from.datatype, to.start, n, to.datatype, world)
        };
        self.done("MPI_Allgather", n, code)
    }

    fn reduce_scatter(&self, whole: &Tensor, part: &mut Tensor, op: Reduce) -> Result<(), CollectiveError> {
        let call = Call::new("reduce_scatter", self);
        call.check_parts(part, whole)?;
        self.check_host(call, whole)?;
        let _call = self.meet(call, whole, How::Reduce(op))?;
        let n_elements = part.numel();
        let (from, to, world) = (Buffer::of(whole), Buffer::of(part), self.world.as_raw());
        let op = self.operation(op, whole.kind());
        if whole.numel() > self.most_elements {
            for root in 0..self.world_size {
                for (cut, n) in self.cuts(n_elements) {
                    let from_here = from.at(root * n_elements + cut);
                    // SAFETY: as below, for the cut of the part that rank `root` keeps.
                    let code = unsafe {
                        ffi::MPI_Reduce(from_here, to.at(cut), n, to.datatype, op, root as c_int, world)
                    };
                    self.done("MPI_Reduce", n, code)?;
                }
            }
            return Ok(());
        }
        let n = n_elements as c_int;
        // SAFETY: host tensors of one kind, apart in memory, of `world_size * n` and `n` elements.
        let code = unsafe { ffi::MPI_Reduce_scatter_block(from.start, to.start, n, to.datatype, op, world) };
        self.done("MPI_Reduce_scatter_block", n, code)
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.meet(Call::new("barrier", self), &Tensor::from_slice::<u8>(&[]), How::Barrier).map(drop)
    }

    fn watch(&self) -> Option<&Watch> {
        Some(&self.watch)
    }

    fn abort(&self, code: i32) -> ! {
        abort(code)
    }
}
