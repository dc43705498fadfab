//! What a job would find: versions, seats, the speed of arithmetic, of the ranks' talk and of the file system, clocks; and
//! what to change.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::collective::topology;
use crate::collective::{Collective, CollectiveError, Reduce, mpi, nccl};
use crate::device::{self, Place};

/// Bytes written to and read from the file system.
const FILE_BYTES: usize = 128 << 20;

/// Rows and columns of the matrices that are multiplied.
const MATRIX: i64 = 1024;

/// Sizes of tensors that are reduced, in numbers: a status, the parameters of a body, those of a table.
const REDUCED: [i64; 3] = [4, 1 << 20, 1 << 24];

/// Clocks that differ by more make logs of several hosts hard to read side by side, in seconds.
const MOST_SKEW: f64 = 0.5;

/// Slower file systems are worth a word, in bytes a second.
const LEAST_FILE_RATE: f64 = 100e6;

/// What was found.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    /// Lines to read.
    pub lines: Vec<String>,
    /// What to change.
    pub advice: Vec<String>,
    /// Ranks of the job.
    pub ranks: usize,
    /// What each rank computes on.
    pub device: String,
    /// FLOP/s of each rank's products of matrices, f32.
    pub multiply_rates: Vec<f64>,
    /// Sums over the ranks.
    pub all_reduces: Vec<AllReduce>,
}

/// How long a sum over the ranks took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllReduce {
    /// Of the tensor.
    pub bytes: f64,
    /// On the slowest rank.
    pub seconds: f64,
}

/// A folder whose file system cannot be tried.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It cannot be looked at.
    #[error("cannot open the folder `{path}`")]
    Open {
        /// As given.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is something else.
    #[error("`{0}` is not a folder")]
    NotAFolder(PathBuf),
    /// No file can be created in it.
    #[error("cannot write to the folder `{path}`")]
    Write {
        /// As given.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Whether `dir` is a folder that can be written.
///
/// # Errors
/// It is not.
pub fn check_folder(dir: &Path) -> Result<(), FolderError> {
    let path = || dir.to_owned();
    let metadata = fs::metadata(dir).map_err(|source| FolderError::Open { path: path(), source })?;
    if !metadata.is_dir() {
        return Err(FolderError::NotAFolder(path()));
    }
    tempfile::tempfile_in(dir).map(drop).map_err(|source| FolderError::Write { path: path(), source })
}

/// *All ranks.* Looks at the job as it was started, and at the file system of `dir`.
///
/// # Errors
/// Those of the collective; a folder that cannot be written is advice.
pub fn examine(place: &Place, dir: &Path, collective: &dyn Collective) -> Result<Findings, CollectiveError> {
    let ranks = collective.world_size();
    let device = if place.device.is_cuda() { "GPU" } else { "CPU" }.to_owned();
    let mut found = Findings { ranks, device, ..Findings::default() };
    found.versions(collective);
    let placements = topology::rank_placements(place, collective)?;
    found.lines.extend(topology::table(&placements));
    found.advice.extend(place.warnings.iter().cloned());
    found.advice.extend(topology::warnings(&placements));

    let rates = collective.gather(&[multiply_rate(place.device)])?;
    found.say("matrix multiply", &format!("{} GFLOP/s, f32, by rank", each(&rates, 1e-9)));
    let (least, most) = ends(&rates);
    if least < 0.7 * most {
        let slow = rates.iter().position(|&rate| rate == least).unwrap_or(0);
        let share = 100.0 * least / most;
        let advice = format!(
            "rank {slow} computes at {share:.0} % of the fastest rank's rate: every step waits for it"
        );
        found.advice.push(advice);
    }
    found.multiply_rates = rates;
    if ranks > 1 {
        for n in REDUCED {
            let bytes = 4.0 * n as f64;
            let seconds = reduce_seconds(n, place.device, collective)?;
            found.all_reduces.push(AllReduce { bytes, seconds });
            // What a ring moves through each rank's link.
            let rate = bytes * 2.0 * (ranks as f64 - 1.0) / ranks as f64 / seconds;
            let text = format!("{:.1} µs, {:.2} GB/s through each rank", seconds * 1e6, rate / 1e9);
            found.say(&format!("all-reduce of {}", size(bytes)), &text);
        }
        found.clocks(collective)?;
    }
    found.file_system(dir, collective)?;
    Ok(found)
}

impl Findings {
    fn say(&mut self, what: &str, text: &str) {
        self.lines.push(format!("{what:24} {text}"));
    }

    fn versions(&mut self, collective: &dyn Collective) {
        self.say("bireme", env!("CARGO_PKG_VERSION"));
        self.say("libtorch", device::LIBTORCH);
        self.say("MPI", &mpi::library());
        match nccl::check() {
            Ok(()) => self.say("NCCL", "found"),
            Err(missing) => self.say("NCCL", &format!("not found, which only GPUs need: {missing}")),
        }
        let (ranks, backend) = (collective.world_size(), collective.backend());
        self.say("ranks", &format!("{ranks} ({backend})"));
        if ranks == 1 {
            self.say("", "`mpirun -np N bireme doctor` looks at N ranks and what lies between them");
        }
    }

    /// *All ranks.* How far the clocks of other ranks are from rank 0's.
    fn clocks(&mut self, collective: &dyn Collective) -> Result<(), CollectiveError> {
        let mut best: Option<(f64, Vec<f64>)> = None;
        for _ in 0..20 {
            let begun = Instant::now();
            collective.barrier()?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64());
            let all = collective.gather(&[now, begun.elapsed().as_secs_f64()])?;
            // Nobody knows better than to how long they waited for each other.
            let uncertain = all.chunks_exact(2).map(|of_rank| of_rank[1]).fold(0.0, f64::max);
            let apart = all.chunks_exact(2).map(|of_rank| of_rank[0] - all[0]).collect();
            if best.as_ref().is_none_or(|(least, _)| uncertain < *least) {
                best = Some((uncertain, apart));
            }
        }
        let (uncertain, apart) = best.unwrap_or_default();
        let (first, last) = ends(&apart);
        let skew = last - first;
        self.say("clocks", &format!("at most {:.3} ms apart, to {:.3} ms", skew * 1e3, uncertain * 1e3));
        if skew - uncertain > MOST_SKEW {
            self.advice.push(format!("the clocks of the hosts are {skew:.1} s apart: start NTP on them"));
        }
        Ok(())
    }

    /// *All ranks.* How fast rank 0 writes to and reads from a folder, and whether the others see it.
    fn file_system(&mut self, dir: &Path, collective: &dyn Collective) -> Result<(), CollectiveError> {
        let path = dir.join(format!(".bireme-doctor-{}", std::process::id()));
        let path = collective.broadcast_bytes(path.as_os_str().as_bytes().to_owned(), 0)?;
        let path = PathBuf::from(OsString::from_vec(path));
        // The large file has no name, so that nothing of it is left if the command is interrupted. The empty one is for
        // the other ranks.
        let tried = collective
            .root()
            .map(|_| write_and_read(dir).and_then(|rates| File::create(&path).map(|_| rates)));
        collective.barrier()?;
        let is_seen = collective.gather(&[i64::from(path.exists())])?;
        if collective.root().is_some() {
            // A failure to create it is reported below.
            let _ = fs::remove_file(&path);
        }
        let name = dir.display();
        // Only rank 0 speaks.
        match tried {
            Some(Ok((write, read))) => {
                let text = format!(
                    "writes {:.0} MB/s, to the disk; reads them again at {:.0} MB/s",
                    write / 1e6,
                    read / 1e6
                );
                self.say(&format!("`{name}`"), &text);
                if write < LEAST_FILE_RATE {
                    let rate = write / 1e6;
                    let advice =
                        format!("`{name}` takes {rate:.0} MB/s: checkpoints there will be waited for");
                    self.advice.push(advice);
                }
                let blind = is_seen.iter().position(|&is_seen| is_seen == 0);
                if let Some(rank) = blind {
                    let advice =
                        format!("rank {rank} does not see `{name}`: data must be there for all ranks");
                    self.advice.push(advice);
                }
            }
            Some(Err(error)) => self.advice.push(format!("`{name}` cannot be written: {error}")),
            None => {}
        }
        Ok(())
    }
}

/// FLOP/s of products of square matrices, the median of a few.
fn multiply_rate(device: Device) -> f64 {
    let [a, b] = [0, 1].map(|_| Tensor::ones([MATRIX, MATRIX], (Kind::Float, device)));
    let seconds = median_seconds(|| {
        let product = a.matmul(&b);
        // A GPU is only done when it is asked.
        let _ = product.double_value(&[0, 0]);
        Ok::<_, CollectiveError>(())
    });
    2.0 * (MATRIX * MATRIX * MATRIX) as f64 / seconds.unwrap_or(f64::INFINITY)
}

/// *All ranks.* Seconds that the sum of `n` f32 takes.
fn reduce_seconds(n: i64, device: Device, collective: &dyn Collective) -> Result<f64, CollectiveError> {
    let mut tensor = Tensor::zeros([n], (Kind::Float, device));
    let mine = median_seconds(|| {
        collective.all_reduce(&mut tensor, Reduce::Sum)?;
        let _ = tensor.double_value(&[0]);
        Ok::<_, CollectiveError>(())
    })?;
    Ok(ends(&collective.gather(&[mine])?).1)
}

/// The first call is not counted.
fn median_seconds<E>(mut work: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    work()?;
    let mut seconds = Vec::new();
    for _ in 0..9 {
        let begun = Instant::now();
        work()?;
        seconds.push(begun.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Bytes a second, written to the disk and read again.
fn write_and_read(dir: &Path) -> io::Result<(f64, f64)> {
    let bytes = vec![7; FILE_BYTES];
    let mut file = tempfile::tempfile_in(dir)?;
    let begun = Instant::now();
    file.write_all(&bytes)?;
    file.sync_all()?;
    let write = begun.elapsed().as_secs_f64();
    file.rewind()?;
    let begun = Instant::now();
    let mut read = Vec::with_capacity(FILE_BYTES);
    file.read_to_end(&mut read)?;
    let rate = |seconds: f64| FILE_BYTES as f64 / seconds;
    Ok((rate(write), rate(begun.elapsed().as_secs_f64())))
}

/// The least and the largest.
fn ends(numbers: &[f64]) -> (f64, f64) {
    let fold = |choose: fn(f64, f64) -> f64| numbers.iter().copied().reduce(choose).unwrap_or(0.0);
    (fold(f64::min), fold(f64::max))
}

/// Numbers, many alike as their range.
fn each(numbers: &[f64], unit: f64) -> String {
    let (least, most) = ends(numbers);
    match numbers.len() {
        0..=4 => numbers.iter().map(|number| format!("{:.0}", number * unit)).collect::<Vec<_>>().join(", "),
        _ => format!("{:.0} to {:.0}", least * unit, most * unit),
    }
}

/// Bytes in words.
fn size(bytes: f64) -> String {
    match bytes {
        ..1024.0 => format!("{bytes:.0} bytes"),
        _ => format!("{:.0} MiB", bytes / 1024.0 / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::threads;

    #[test]
    fn ranks_are_examined_together_and_nothing_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place { device: Device::Cpu, n_threads: 1, warnings: vec!["a word".to_owned()] };
        let found = threads::spawn(2, |collective| examine(&place, dir.path(), collective).unwrap());
        let lines = found[0].lines.join("\n");
        for part in
            ["ranks                    2 (threads)", "all-reduce of 4 MiB", "clocks", "writes", "GFLOP/s"]
        {
            assert!(lines.contains(part), "{part} is not in\n{lines}");
        }
        assert!(found[0].advice.contains(&"a word".to_owned()));
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_told() {
        let nowhere = Path::new("/proc/nowhere");
        let place = Place { device: Device::Cpu, n_threads: 1, warnings: Vec::new() };
        let found = threads::spawn(1, |collective| examine(&place, nowhere, collective).unwrap());
        assert!(found[0].advice.iter().any(|advice| advice.starts_with("`/proc/nowhere` cannot be written")));
    }

    #[test]
    fn only_folders_that_can_be_written_are_tried() {
        let dir = tempfile::tempdir().unwrap();
        check_folder(dir.path()).unwrap();
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let refused = |path: &Path| check_folder(path).unwrap_err().to_string();
        assert_eq!(refused(&file), format!("`{}` is not a folder", file.display()));
        assert!(refused(&dir.path().join("no/such")).starts_with("cannot open the folder"));
        assert!(refused(Path::new("/proc/self")).starts_with("cannot write to the folder"));
        assert!(!dir.path().join("no").exists());
    }
}
