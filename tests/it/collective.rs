//! Every call gives the same result on every backend, and a rank that fails ends the job and names
//! itself.

use std::env;
use std::panic::catch_unwind;
use std::process::Command;
use std::time::Duration;

use bireme::collective::mpi::Mpi;
use bireme::collective::nccl::Nccl;
use bireme::collective::solo::Solo;
use bireme::collective::{Collective, CollectiveError, Reduce, join, on_device, threads};
use bireme::device::{DeviceChoice, place};
use tch::{Device, Kind, Tensor};

use crate::support::fake_cuda::on_fake_cuda;
use crate::support::mpirun::{mpirun, mpirun_on_one_gpu};
use crate::support::process::{Finished, run_within};
use crate::support::requirements::{has_gpu, has_nvidia_driver};

const KINDS: [Kind; 5] = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Int64, Kind::Uint8];
const REDUCTIONS: [Reduce; 3] = [Reduce::Sum, Reduce::Min, Reduce::Max];
const LIMIT: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(10);

/// Element `i` of rank `rank`: small enough for a sum of four in a byte, and exact in every dtype.
fn value(rank: usize, i: usize) -> i64 {
    ((i * 7 + rank * 13) % 61) as i64
}

fn values(rank: usize, n_elements: usize) -> Vec<i64> {
    (0..n_elements).map(|i| value(rank, i)).collect()
}

fn reduced(world_size: usize, n_elements: usize, op: Reduce) -> Vec<i64> {
    let over_ranks = |i| {
        let all = (0..world_size).map(|rank| value(rank, i));
        match op {
            Reduce::Sum => all.sum(),
            Reduce::Min => all.min().unwrap(),
            Reduce::Max => all.max().unwrap(),
        }
    };
    (0..n_elements).map(over_ranks).collect()
}

fn tensor(values: &[i64], kind: Kind, device: Device) -> Tensor {
    Tensor::from_slice(values).to_kind(kind).to_device(device)
}

fn zeros(n_elements: usize, kind: Kind, device: Device) -> Tensor {
    // Copied, because the fake CUDA runtime does not compute what libtorch's kernels would.
    Tensor::zeros([n_elements as i64], (kind, Device::Cpu)).to_device(device)
}

#[track_caller]
fn assert_holds(tensor: &Tensor, expected: &[i64], what: &str) {
    let found: Vec<i64> = tensor
        .view([-1])
        .to_device(Device::Cpu)
        .to_kind(Kind::Int64)
        .try_into()
        .expect("a flat tensor");
    assert_eq!(found, expected, "{what}");
}

/// *All ranks.* Every call, dtype and reduction against plain arithmetic, on tensors of `device`.
fn every_call(ranks: &dyn Collective, device: Device) {
    let (rank, world_size) = (ranks.rank(), ranks.world_size());
    for (kind, n) in KINDS.into_iter().flat_map(|kind| [0, 1, 7, 1000].map(|n| (kind, n))) {
        let whole = n * world_size;
        let slots = |all: &[i64]| all[rank * n..][..n].to_vec();
        for op in REDUCTIONS {
            let what = format!("{op:?} of {whole} {kind:?} on rank {rank} of {world_size}");
            let expected = reduced(world_size, whole, op);
            let mine = tensor(&values(rank, whole), kind, device);

            let mut all = mine.copy();
            ranks.all_reduce(&mut all, op).unwrap();
            assert_holds(&all, &expected, &what);

            let (mut all, mut copied) = (mine.copy(), None);
            ranks.reduce_during(&mut all, op, &mut || copied = Some(mine.copy())).unwrap();
            assert_holds(&all, &expected, &what);
            assert_holds(&copied.unwrap(), &values(rank, whole), &what);

            let mut part = zeros(n, kind, device);
            ranks.reduce_scatter(&mine, &mut part, op).unwrap();
            assert_holds(&part, &slots(&expected), &what);
            assert_holds(&mine, &values(rank, whole), &what);

            // Scattered and gathered again, a reduction is the all-reduce.
            let mut gathered = zeros(whole, kind, device);
            ranks.all_gather(&part, &mut gathered).unwrap();
            assert_holds(&gathered, &expected, &what);
        }
        for root in 0..world_size {
            let mut sent = tensor(&values(rank, n), kind, device);
            ranks.broadcast(&mut sent, root).unwrap();
            assert_holds(&sent, &values(root, n), &format!("{n} {kind:?} from rank {root}"));
        }
    }
    // Only the flat order counts, and parameters are tensors too.
    let mut weight =
        tensor(&values(rank, 6), Kind::Float, device).view([2, 3]).set_requires_grad(true);
    ranks.all_reduce(&mut weight, Reduce::Sum).unwrap();
    assert_eq!(weight.size(), [2, 3]);
    assert_holds(&weight.detach(), &reduced(world_size, 6, Reduce::Sum), "a weight");
    ranks.barrier().unwrap();
}

/// *All ranks.* What is built on the calls.
fn every_helper(ranks: &dyn Collective) {
    let (rank, world_size) = (ranks.rank(), ranks.world_size());
    assert_eq!(ranks.root().is_some(), rank == 0);

    let mut counts = [1, rank as i64];
    ranks.sum_i64(&mut counts).unwrap();
    assert_eq!(counts, [world_size as i64, (0..world_size as i64).sum()]);
    let mut sums = [0.5];
    ranks.sum_f64(&mut sums).unwrap();
    assert_eq!(sums, [0.5 * world_size as f64]);
    let mut largest = [rank as f32];
    ranks.reduce(&mut largest, Reduce::Max).unwrap();
    assert_eq!(largest, [(world_size - 1) as f32]);
    assert_eq!(ranks.gather(&[rank as i64]).unwrap(), (0..world_size as i64).collect::<Vec<_>>());

    let own = |rank: usize| format!("from {rank}").repeat(rank).into_bytes();
    for root in 0..world_size {
        assert_eq!(ranks.broadcast_bytes(own(rank), root).unwrap(), own(root));
    }
    assert_eq!(
        ranks.gather_bytes(&own(rank)).unwrap(),
        (0..world_size).map(own).collect::<Vec<_>>()
    );
    assert_eq!(ranks.gather_bytes(&[]).unwrap(), vec![Vec::<u8>::new(); world_size]);

    assert_eq!(ranks.agree(Ok::<_, std::fmt::Error>(rank)).unwrap(), rank);
    // Ranks 1 and above fail; all hear of rank 1.
    let tried =
        if rank == 0 { Ok(()) } else { Err(std::io::Error::other(format!("disk {rank} is full"))) };
    match ranks.agree(tried) {
        Ok(()) => assert_eq!(world_size, 1),
        Err(error) => {
            assert_eq!(error.to_string(), format!("rank 1 of {world_size}: disk 1 is full"))
        }
    }
}

/// *All ranks.* Mistakes are reported before anything is sent, with the call and the rank.
fn every_refusal(ranks: &dyn Collective, device: Device) {
    let (rank, world_size) = (ranks.rank(), ranks.world_size());
    let refused = |result: Result<(), CollectiveError>, call: &str, problem: &str| {
        let text = result.unwrap_err().to_string();
        assert!(text.starts_with(&format!("`{call}` on rank {rank} of {world_size}: ")), "{text}");
        assert!(text.contains(problem), "{text}");
    };
    let float = |n| zeros(n, Kind::Float, device);
    let mut halves = zeros(4, Kind::Half, device);
    refused(
        ranks.all_reduce(&mut halves, Reduce::Sum),
        "all_reduce",
        "takes f32, f64, bf16, i64 or u8 tensors, not f16",
    );
    let mut turned = float(6).view([2, 3]).transpose(0, 1);
    refused(ranks.all_reduce(&mut turned, Reduce::Sum), "all_reduce", "is not contiguous");
    refused(
        ranks.broadcast(&mut float(1), world_size),
        "broadcast",
        &format!("there is no rank {world_size}"),
    );
    let odd = 2 * world_size + 1;
    refused(
        ranks.all_gather(&float(2), &mut float(odd)),
        "all_gather",
        &format!("{world_size} parts of 2 elements do not make a whole of {odd}"),
    );
    let mut doubles = zeros(2 * world_size, Kind::Double, device);
    refused(ranks.all_gather(&float(2), &mut doubles), "all_gather", "the part is f32 on");
    let whole = float(2 * world_size);
    let mut part = whole.narrow(0, 0, 2);
    refused(
        ranks.reduce_scatter(&whole, &mut part, Reduce::Sum),
        "reduce_scatter",
        "lies inside the whole",
    );
}

fn everything(ranks: &dyn Collective, device: Device) {
    every_call(ranks, device);
    every_helper(ranks);
    every_refusal(ranks, device);
}

#[test]
fn solo_gives_what_arithmetic_gives() {
    let ranks = join().unwrap();
    assert_eq!((ranks.rank(), ranks.world_size(), ranks.backend()), (0, 1, "solo"));
    everything(&*ranks, Device::Cpu);
    let on_cpu = place(DeviceChoice::Cpu, 1, 0, 1).unwrap();
    let ranks = on_device(ranks, &on_cpu).unwrap();
    assert_eq!(ranks.backend(), "solo");
    let error = ranks.agree(Err::<(), _>(std::fmt::Error)).unwrap_err();
    assert_eq!(error.to_string(), std::fmt::Error.to_string(), "a rank alone is not worth naming");
}

#[test]
fn nccl_on_the_fake_cuda_runtime_gives_what_arithmetic_gives() {
    for n_ranks in [2, 3] {
        let Some(mut ranks) = on_fake_cuda(&child("gpu"), true) else { return };
        ranks.env("FAKE_CUDA_GPUS", n_ranks.to_string());
        let Some(finished) = mpirun(n_ranks, &ranks, LIMIT) else { return };
        finished.success();
    }
}

#[test]
fn threads_give_what_arithmetic_gives() {
    for world_size in 1..=4 {
        let seen = threads::spawn(world_size, |ranks| {
            assert_eq!((ranks.world_size(), ranks.backend()), (world_size, "threads"));
            everything(ranks, Device::Cpu);
            ranks.rank()
        });
        assert_eq!(seen, (0..world_size).collect::<Vec<_>>());
    }
}

#[test]
fn threads_reduce_in_rank_order_to_the_same_bits() {
    let rows = |rank: usize| {
        (0..100).map(|i| 10_f32.powi((i * 5 + rank as i32 * 3) % 9 - 4) * 1.1).collect::<Vec<f32>>()
    };
    let sums = threads::spawn(4, |ranks| {
        let mut sums = rows(ranks.rank());
        ranks.reduce(&mut sums, Reduce::Sum).unwrap();
        sums
    });
    let in_order: Vec<f32> =
        (0..100).map(|i| (1..4).fold(rows(0)[i], |sum, rank| sum + rows(rank)[i])).collect();
    assert_eq!(sums, vec![in_order; 4]);
}

#[test]
fn a_thread_that_panics_fails_the_others_and_is_named() {
    let panic = catch_unwind(|| {
        threads::spawn(3, |ranks| {
            if ranks.rank() == 1 {
                panic!("the cable is cut");
            }
            let error = ranks.barrier().unwrap_err().to_string();
            assert_eq!(error, "rank 1 panicked: the cable is cut");
        })
    });
    assert_eq!(panic.unwrap_err().downcast_ref::<&str>(), Some(&"the cable is cut"));
}

#[test]
fn a_thread_that_leaves_or_calls_something_else_is_reported() {
    let texts = threads::spawn(2, |ranks| match ranks.rank() {
        0 => String::new(),
        _ => ranks.barrier().unwrap_err().to_string(),
    });
    assert_eq!(texts[1], "rank 0 returned before the others were done");

    let texts = threads::spawn(2, |ranks| {
        let mut three = zeros(3, Kind::Float, Device::Cpu);
        let called = match ranks.rank() {
            0 => ranks.barrier(),
            _ => ranks.all_reduce(&mut three, Reduce::Sum),
        };
        called.unwrap_err().to_string()
    });
    let message = "called `all_reduce` (sum) of 3 f32 elements, but rank 0 called `barrier`";
    assert!(texts[1].contains(message), "{texts:?}");
}

/// Runs `case` of [`a_rank_of_a_job`] on `n_ranks` ranks of real MPI.
fn job(n_ranks: usize, case: &str) -> Option<Finished> {
    mpirun(n_ranks, &child(case), LIMIT)
}

/// This test program as it runs `case` of [`a_rank_of_a_job`].
fn child(case: &str) -> Command {
    let mut child = Command::new(env::current_exe().unwrap());
    child
        .args(["collective::a_rank_of_a_job", "--exact", "--ignored", "--nocapture"])
        .env(CASE, case);
    child
}

const CASE: &str = "BIREME_TEST_CASE";

#[test]
#[ignore = "runs as one rank of the jobs that other tests start"]
fn a_rank_of_a_job() {
    let Ok(case) = env::var(CASE) else { return };
    match case.as_str() {
        "everything" => {
            let ranks = join().unwrap();
            assert_eq!(ranks.backend(), "mpi");
            assert_eq!(
                (ranks.local_rank(), ranks.local_size()),
                (ranks.rank(), ranks.world_size())
            );
            everything(&*ranks, Device::Cpu);
            println!("rank {} of {} is done", ranks.rank(), ranks.world_size());
        }
        "cut" => {
            every_call(&Mpi::join().unwrap().with_max_elements(3).always_overlapping(), Device::Cpu)
        }
        "panic" => {
            let ranks = join().unwrap();
            assert_ne!(ranks.rank(), 1, "rank 1 strikes a rock");
            ranks.barrier().unwrap();
        }
        "background panic" => {
            let ranks = join().unwrap();
            if ranks.rank() == 1 {
                let loader = std::thread::Builder::new().name("loader".to_owned());
                loader.spawn(|| panic!("the loader strikes a rock")).unwrap();
            }
            ranks.barrier().unwrap();
            // The loader's rank waits here for batches, and the others for that rank.
            let (_never, batches) = std::sync::mpsc::channel::<()>();
            batches.recv().unwrap();
        }
        "abort" => {
            let ranks = join().unwrap();
            if ranks.rank() == 1 {
                ranks.abort(3);
            }
            ranks.barrier().unwrap();
        }
        "unequal" => {
            let ranks = join().unwrap();
            let mut unequal = zeros(3 + ranks.rank(), Kind::Float, Device::Cpu);
            println!("error: {}", ranks.broadcast(&mut unequal, 1).unwrap_err());
            let astray = match ranks.rank() {
                0 => ranks.barrier(),
                _ => ranks.sum_i64(&mut [1]),
            };
            println!("error: {}", astray.unwrap_err());
        }
        "strangers" => println!("error: {}", join().err().expect("MPI sees one rank")),
        "gpu" => {
            let ranks = join().unwrap();
            let here =
                place(DeviceChoice::Cuda, 1, ranks.local_rank(), ranks.local_size()).unwrap();
            let ranks = on_device(ranks, &here).unwrap();
            assert_eq!(ranks.backend(), "nccl");
            everything(&*ranks, here.device);
            everything(&*ranks, Device::Cpu);
        }
        _ => panic!("there is no case `{case}`"),
    }
}

#[test]
fn mpi_gives_what_arithmetic_gives() {
    for world_size in 1..=4 {
        let Some(finished) = job(world_size, "everything") else { return };
        let finished = finished.success();
        for rank in 0..world_size {
            let line = format!("rank {rank} of {world_size} is done");
            assert!(finished.stdout.contains(&line), "{finished:#?}");
        }
    }
}

#[test]
fn mpi_cuts_tensors_that_are_too_long_for_one_call() {
    let Some(finished) = job(3, "cut") else { return };
    finished.success();
}

#[test]
fn a_rank_that_panics_names_itself_and_ends_the_job() {
    for (case, message) in
        [("panic", "rank 1 strikes a rock"), ("background panic", "the loader strikes a rock")]
    {
        let Some(finished) = job(3, case) else { return };
        assert_eq!(finished.code, Some(1), "{finished:#?}");
        assert!(finished.took < SOON, "{finished:#?}");
        assert!(finished.stderr.contains("rank 1 of 3 on "), "{finished:#?}");
        assert!(finished.stderr.contains(message), "{finished:#?}");
    }
}

#[test]
fn a_rank_that_aborts_ends_the_job_with_its_code() {
    let Some(finished) = job(3, "abort") else { return };
    assert_eq!(finished.code, Some(3), "{finished:#?}");
    assert!(finished.took < SOON, "{finished:#?}");
}

#[test]
fn ranks_with_different_calls_are_reported() {
    let Some(finished) = job(2, "unequal") else { return };
    let stdout = finished.success().stdout;
    for message in [
        "`broadcast` on rank 0 of 2: called `broadcast` from rank 1 of 3 f32 elements, \
         but rank 1 called `broadcast` from rank 1 of 4 f32 elements",
        "`all_reduce` on rank 1 of 2: called `all_reduce` (sum) of 1 i64 elements, but rank 0 \
         called `barrier`",
    ] {
        assert!(stdout.contains(message), "{stdout}");
    }
}

#[test]
fn processes_that_mpi_does_not_see_as_one_job_are_refused() {
    let mut alone = child("strangers");
    let finished = run_within(alone.envs([("PMI_RANK", "0"), ("PMI_SIZE", "2")]), LIMIT).success();
    assert!(
        finished.stdout.contains("error: 2 processes were started, but MPI sees a job of 1"),
        "{finished:#?}"
    );
}

#[test]
fn missing_nccl_is_an_error_and_no_panic() {
    if has_nvidia_driver() {
        println!("skipped: this host has a GPU, so NCCL may well start");
        return;
    }
    let error = Nccl::join(Box::new(Solo), 0).err().unwrap().to_string();
    assert!(error.starts_with("NCCL is not usable on rank 0: "), "{error}");
}

#[test]
fn nccl_gives_what_mpi_gives() {
    if !has_gpu() {
        return;
    }
    for n_ranks in [2, 3] {
        let Some(finished) = mpirun_on_one_gpu(n_ranks, &child("gpu"), 3 * LIMIT) else { return };
        finished.success();
    }
}
