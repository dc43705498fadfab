//! One process at a time writes to an output.
//!
//! The lock is `flock`, which the kernel releases when the process ends, however it ends. Some
//! shared file systems keep `flock` within a host, so the file also holds the owner's host, process
//! id and a count that grows while the owner lives. A process on another host that can lock the
//! file takes the lock only if the count stays as it is.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use thiserror::Error;

/// Seconds between two counts of an owner.
const BEAT: Duration = Duration::from_secs(5);

/// How long a process watches the count of an owner on another host.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long a process waits for the record of an owner that has just locked the file.
const RECORD_WAIT: Duration = Duration::from_secs(1);

/// The process that holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its host.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
}

/// Why a lock was not acquired.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("in use by process {} on {}", owner.pid, owner.host)]
    Held {
        /// That process.
        owner: Owner,
    },
    /// Another process holds it, and its record is missing or damaged.
    #[error("in use by another process")]
    HeldByUnknown,
    /// The file cannot be created, read or written.
    #[error("cannot lock `{}`", path.display())]
    Io {
        /// The lock's file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// The exclusive right to write to an output, until it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    /// Dropping the sender ends the thread that counts.
    alive: Option<Sender<()>>,
    counting: Option<JoinHandle<()>>,
}

impl Lock {
    /// Locks the file at `path`, which is created where it is missing and stays.
    ///
    /// Waits up to 15 seconds where the record names another host, as after a crash there.
    ///
    /// # Errors
    /// Another process holds the lock, or the file cannot be created.
    pub fn acquire(path: &Path) -> Result<Self, LockError> {
        Self::acquire_as(path, &host_name(), &mut || thread::sleep(PATIENCE))
    }

    /// `wait` lasts as long as an owner on another host may take to change its record.
    fn acquire_as(path: &Path, host: &str, wait: &mut dyn FnMut()) -> Result<Self, LockError> {
        let io = |source| LockError::Io { path: path.into(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io)?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {
                    let record = read_record(&mut file).map_err(io)?;
                    // The owner writes its record after it has locked the file, and empties it
                    // before it unlocks.
                    if !record.is_empty() || begun.elapsed() > RECORD_WAIT {
                        return Err(held(record));
                    }
                    thread::sleep(RECORD_WAIT / 100);
                }
                // On a file system without `flock`, the record alone protects the output.
                Err(TryLockError::Error(e))
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOLCK)
                    ) =>
                {
                    break;
                }
                Err(TryLockError::Error(e)) => return Err(io(e)),
            }
        }
        // The owner before may have removed the file between the opening and the locking.
        let locked = file.metadata().map_err(io)?;
        if !fs::metadata(path).is_ok_and(|of| (of.dev(), of.ino()) == (locked.dev(), locked.ino()))
        {
            return Self::acquire_as(path, host, wait);
        }
        let before = read_record(&mut file).map_err(io)?;
        if Record::parse(&before).is_some_and(|record| record.owner.host != host) {
            wait();
            // Opened anew: network file systems show what others wrote when a file is opened.
            let after = File::open(path).and_then(|mut file| read_record(&mut file)).map_err(io)?;
            if after != before && !after.is_empty() {
                return Err(held(after));
            }
        }
        let owner = Owner { host: host.into(), pid: process::id() };
        write_record(&mut file, &Record { owner: owner.clone(), count: 0 }).map_err(io)?;
        let (alive, ended) = channel();
        let counting = thread::Builder::new().name("lock".into()).spawn(move || {
            for count in 1.. {
                match ended.recv_timeout(BEAT) {
                    Err(RecvTimeoutError::Timeout) => {}
                    _ => break,
                }
                // A disk that is full does not end the work that the lock guards.
                let _ = write_record(&mut file, &Record { owner: owner.clone(), count });
            }
            // An empty record has no owner, so other hosts need not wait. Closing the file unlocks
            // it.
            let _ = file.set_len(0);
        });
        Ok(Self { alive: Some(alive), counting: Some(counting.map_err(io)?) })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        drop(self.alive.take());
        if let Some(counting) = self.counting.take() {
            let _ = counting.join();
        }
    }
}

/// The name of this host.
pub fn host_name() -> String {
    let mut name = [0_u8; 256];
    // SAFETY: the buffer has the length that is passed, and its last byte stays 0.
    let failed = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) } != 0;
    let name = CStr::from_bytes_until_nul(&name).map(CStr::to_string_lossy).unwrap_or_default();
    if failed || name.is_empty() { "an unnamed host".into() } else { name.into_owned() }
}

fn held(record: String) -> LockError {
    match Record::parse(&record) {
        Some(Record { owner, .. }) => LockError::Held { owner },
        None => LockError::HeldByUnknown,
    }
}

/// A line `PID COUNT HOST`.
struct Record {
    owner: Owner,
    count: u64,
}

impl Record {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.trim_end().splitn(3, ' ');
        let (pid, count, host) =
            (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?);
        Some(Self { owner: Owner { host: host.into(), pid }, count })
    }
}

fn read_record(file: &mut File) -> io::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    // A file of that name may be something else, and large.
    file.take(1024).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn write_record(
    file: &mut File,
    Record { owner: Owner { host, pid }, count }: &Record,
) -> io::Result<()> {
    let line = format!("{pid} {count} {host}\n");
    file.seek(SeekFrom::Start(0))?;
    file.write_all(line.as_bytes())?;
    file.set_len(line.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_refused_and_learns_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = Lock::acquire(&path).unwrap();
        let refused = Lock::acquire(&path).unwrap_err();
        assert_eq!(
            refused.to_string(),
            format!("in use by process {} on {}", process::id(), host_name())
        );
        drop(first);
        Lock::acquire(&path).unwrap();
    }

    #[test]
    fn an_owner_that_has_not_written_its_record_is_awaited() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let mut first = File::create(&path).unwrap();
        first.lock().unwrap();
        let owner = Owner { host: "here".into(), pid: 7 };
        thread::scope(|scope| {
            let second = scope.spawn(|| Lock::acquire(&path).unwrap_err().to_string());
            thread::sleep(RECORD_WAIT / 10);
            write_record(&mut first, &Record { owner, count: 0 }).unwrap();
            assert_eq!(second.join().unwrap(), "in use by process 7 on here");
        });
        first.set_len(0).unwrap();
        assert_eq!(Lock::acquire(&path).unwrap_err().to_string(), "in use by another process");
    }

    #[test]
    fn a_record_of_another_host_counts_while_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let write = |count| fs::write(&path, format!("7 {count} elsewhere\n")).unwrap();
        write(1);
        Lock::acquire_as(&path, "here", &mut || {}).unwrap();

        write(1);
        let refused = Lock::acquire_as(&path, "here", &mut || write(2)).unwrap_err();
        assert_eq!(refused.to_string(), "in use by process 7 on elsewhere");
    }

    #[test]
    fn what_is_no_record_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        fs::write(&path, "notes of somebody\n").unwrap();
        Lock::acquire(&path).unwrap();
    }
}
