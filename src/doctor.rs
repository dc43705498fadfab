//! `bireme doctor`: measures the job as it was started, and suggests fixes.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bireme_tools::findings::{AllReduce, FileRates, Findings, listed, median_seconds, range, size};
use tch::{Device, Kind, Tensor};

use crate::collective::topology;
use crate::collective::{Collective, CollectiveError, Reduce, mpi, nccl};
use crate::device::{self, Place};

/// Rows and columns of the matrices that are multiplied.
const MATRIX: i64 = 1024;

/// Numbers of the all-reduced tensors: like scalars of a step, an encoder and an item table.
const REDUCED: [i64; 3] = [4, 1 << 20, 1 << 24];

/// Clock skew, in seconds, above which logs of several hosts are hard to compare.
const MAX_CLOCK_SKEW: f64 = 0.5;

/// Write rate, in bytes per second, below which checkpoints delay training.
const MIN_WRITE_RATE: f64 = 100e6;

/// A rank below this share of the fastest rank's rate slows every step down.
const MIN_RELATIVE_RATE: f64 = 0.7;

/// *All ranks.* Measures the job, and the file system of `dir`.
///
/// # Errors
/// Returns an error if a collective call fails; a folder that cannot be written is advice.
pub fn examine(
    place: &Place,
    dir: &Path,
    collective: &dyn Collective,
) -> Result<Findings, CollectiveError> {
    let ranks = collective.world_size();
    let device = if place.device.is_cuda() { "GPU" } else { "CPU" }.to_owned();
    let mut findings = Findings { ranks, device, ..Findings::default() };
    add_versions(&mut findings, collective);
    let placements = topology::rank_placements(place, collective)?;
    findings.lines.extend(topology::table(&placements));
    findings.advice.extend(place.warnings.iter().cloned());
    findings.advice.extend(topology::warnings(&placements));
    findings.multiply_rates = collective.gather(&[multiply_rate(place.device)])?;
    add_multiply_rates(&mut findings);
    if ranks > 1 {
        add_all_reduces(&mut findings, place.device, collective)?;
        add_clocks(&mut findings, collective)?;
    }
    add_file_system(&mut findings, dir, collective)?;
    Ok(findings)
}

fn add_versions(findings: &mut Findings, collective: &dyn Collective) {
    findings.add("bireme", env!("CARGO_PKG_VERSION"));
    findings.add("libtorch", device::LIBTORCH);
    findings.add("MPI", &mpi::library());
    let driver = device::driver().map(|cuda| format!("for CUDA {cuda}"));
    findings.add("NVIDIA driver", driver.as_deref().unwrap_or("not found; only GPUs need it"));
    match nccl::version() {
        Ok(version) => findings.add("NCCL", &version),
        Err(missing) => findings.add("NCCL", &format!("not found; only GPUs need it: {missing}")),
    }
    let (ranks, backend) = (collective.world_size(), collective.backend());
    findings.add("ranks", &format!("{ranks} ({backend})"));
    if ranks == 1 {
        findings
            .add("", "run `mpirun -np N bireme doctor` to measure N ranks and their connections");
    }
}

fn add_multiply_rates(findings: &mut Findings) {
    let rates = &findings.multiply_rates;
    let (least, largest) = range(rates);
    if least < MIN_RELATIVE_RATE * largest {
        let slow = rates.iter().position(|&rate| rate == least).unwrap_or(0);
        let percent = 100.0 * least / largest;
        findings.advice.push(format!(
            "rank {slow} computes at {percent:.0} % of the fastest rank's rate: every step waits \
             for it"
        ));
    }
    let value = format!("{} GFLOP/s, f32, by rank", listed(rates, 1e-9));
    findings.add("matrix multiply", &value);
}

/// *All ranks.*
fn add_all_reduces(
    findings: &mut Findings,
    device: Device,
    collective: &dyn Collective,
) -> Result<(), CollectiveError> {
    let ranks = collective.world_size() as f64;
    for n in REDUCED {
        let bytes = 4.0 * n as f64;
        let seconds = reduce_seconds(n, device, collective)?;
        findings.all_reduces.push(AllReduce { bytes, seconds });
        // The bytes that a ring all-reduce moves through the link of each rank.
        let rate = bytes * 2.0 * (ranks - 1.0) / ranks / seconds;
        let value = format!("{:.1} µs, {:.2} GB/s through each rank", seconds * 1e6, rate / 1e9);
        findings.add(&format!("all-reduce of {}", size(bytes)), &value);
    }
    Ok(())
}

/// *All ranks.* Offsets of all clocks from that of rank 0.
fn add_clocks(findings: &mut Findings, collective: &dyn Collective) -> Result<(), CollectiveError> {
    let mut best: Option<(f64, Vec<f64>)> = None;
    for _ in 0..20 {
        let start = Instant::now();
        collective.barrier()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64());
        let all = collective.gather(&[now, start.elapsed().as_secs_f64()])?;
        // Ranks leave a barrier at different times, at most as far apart as the longest wait in it.
        let uncertainty = all.chunks_exact(2).map(|of_rank| of_rank[1]).fold(0.0, f64::max);
        let offsets = all.chunks_exact(2).map(|of_rank| of_rank[0] - all[0]).collect();
        if best.as_ref().is_none_or(|(least, _)| uncertainty < *least) {
            best = Some((uncertainty, offsets));
        }
    }
    let (uncertainty, offsets) = best.unwrap_or_default();
    let (first, last) = range(&offsets);
    let skew = last - first;
    let value = format!("at most {:.3} ms apart, to {:.3} ms", skew * 1e3, uncertainty * 1e3);
    findings.add("clocks", &value);
    if skew - uncertainty > MAX_CLOCK_SKEW {
        findings
            .advice
            .push(format!("the clocks of the hosts are {skew:.1} s apart: start NTP on them"));
    }
    Ok(())
}

/// *All ranks.* Throughput of rank 0 in `dir`, and whether all ranks see the same folder.
fn add_file_system(
    findings: &mut Findings,
    dir: &Path,
    collective: &dyn Collective,
) -> Result<(), CollectiveError> {
    let path = dir.join(format!(".bireme-doctor-{}", std::process::id()));
    let path = collective.broadcast_bytes(path.as_os_str().as_bytes().to_owned(), 0)?;
    let path = PathBuf::from(OsString::from_vec(path));
    // An empty file, for the other ranks to look for.
    let create = |rates| File::create(&path).map(|_| rates);
    let measured = collective.root().map(|_| FileRates::measure(dir).and_then(create));
    collective.barrier()?;
    let sees_file = collective.gather(&[i64::from(path.exists())])?;
    if collective.root().is_some() {
        // Fails where it was not created, which is reported below.
        let _ = fs::remove_file(&path);
    }
    let name = dir.display();
    match measured {
        Some(Ok(FileRates { write, read })) => {
            let (write_mb, read_mb) = (write / 1e6, read / 1e6);
            let value = format!(
                "writes {write_mb:.0} MB/s, to the disk; reads them again at {read_mb:.0} MB/s"
            );
            findings.add(&format!("`{name}`"), &value);
            if write < MIN_WRITE_RATE {
                let advice = format!(
                    "`{name}` is written at {write_mb:.0} MB/s: checkpoints in it will delay \
                     training"
                );
                findings.advice.push(advice);
            }
            if let Some(rank) = sees_file.iter().position(|&sees_file| sees_file == 0) {
                findings.advice.push(format!(
                    "rank {rank} does not see the files that rank 0 writes to `{name}`: use a \
                     shared file system"
                ));
            }
        }
        Some(Err(error)) => findings.advice.push(format!("`{name}` cannot be written: {error}")),
        None => {}
    }
    Ok(())
}

/// FLOP/s of the product of two square f32 matrices.
fn multiply_rate(device: Device) -> f64 {
    let [a, b] = [0, 1].map(|_| Tensor::ones([MATRIX, MATRIX], (Kind::Float, device)));
    let seconds = median_seconds(|| {
        let product = a.matmul(&b);
        // Reading a value waits for the GPU.
        let _ = product.double_value(&[0, 0]);
        Ok::<_, CollectiveError>(())
    });
    2.0 * (MATRIX * MATRIX * MATRIX) as f64 / seconds.unwrap_or(f64::INFINITY)
}

/// *All ranks.* Seconds of an all-reduce of `n` f32, on the slowest rank.
fn reduce_seconds(
    n: i64,
    device: Device,
    collective: &dyn Collective,
) -> Result<f64, CollectiveError> {
    let mut tensor = Tensor::zeros([n], (Kind::Float, device));
    let seconds = median_seconds(|| {
        collective.all_reduce(&mut tensor, Reduce::Sum)?;
        let _ = tensor.double_value(&[0]);
        Ok::<_, CollectiveError>(())
    })?;
    Ok(range(&collective.gather(&[seconds])?).1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::threads;

    fn on_cpu() -> Place {
        Place { device: Device::Cpu, gpu_address: None, n_threads: 1, warnings: Vec::new() }
    }

    #[test]
    fn ranks_are_examined_together_and_nothing_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place { warnings: vec!["a word".to_owned()], ..on_cpu() };
        let found =
            threads::spawn(2, |collective| examine(&place, dir.path(), collective).unwrap());
        let lines = found[0].lines.join("\n");
        for part in [
            "ranks                    2 (threads)",
            "all-reduce of 4 MiB",
            "clocks",
            "writes",
            "GFLOP/s",
        ] {
            assert!(lines.contains(part), "{part} is not in\n{lines}");
        }
        assert!(found[0].advice.contains(&"a word".to_owned()));
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_told() {
        let nowhere = Path::new("/proc/nowhere");
        let place = on_cpu();
        let found = threads::spawn(1, |collective| examine(&place, nowhere, collective).unwrap());
        assert!(
            found[0]
                .advice
                .iter()
                .any(|advice| advice.starts_with("`/proc/nowhere` cannot be written"))
        );
    }
}
