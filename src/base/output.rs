//! The files and folders that commands write: each appears under its name when it is complete.
//!
//! A regular file and a folder are written in a staging folder and renamed. The staging folder of
//! `data` is `.data.partial` beside it; that of a folder that exists is `.bireme.partial` inside
//! it, because a mount point, the current folder or a folder in a protected parent cannot be
//! renamed. It holds a [`Lock`], so that a second writer is refused, and so that the next command
//! recognises and removes what an interrupted one left. Whatever is neither a regular file nor a
//! folder (a pipe, a device, a descriptor of this process) is written to directly.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::lock::{Lock, LockError};
use crate::user_error::{FAILED, REFUSED, UserError};

/// Why an output was not written. What was there before is unchanged.
#[derive(Debug, Error)]
pub enum OutputError {
    /// The path cannot be written to.
    #[error("cannot write to `{}`: {problem}", path.display())]
    Refused {
        /// As given.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
    /// Another process writes it.
    #[error("cannot write to `{}`", path.display())]
    InUse {
        /// As given.
        path: PathBuf,
        /// Names the process.
        source: LockError,
    },
    /// A folder that holds something.
    #[error("`{}` exists and is not empty", path.display())]
    Exists {
        /// As given.
        path: PathBuf,
        /// Whether an earlier command of the same kind wrote it.
        is_replaceable: bool,
    },
    /// Writing failed.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl UserError for OutputError {
    fn exit_code(&self) -> i32 {
        if matches!(self, Self::Io { .. }) { FAILED } else { REFUSED }
    }
}

impl OutputError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.into(), source }
    }

    fn refused(path: &Path) -> impl Fn(io::Error) -> Self {
        move |error| Self::Refused { path: path.into(), problem: error.to_string() }
    }
}

// Where a path leads.

/// What a path names, its symbolic links followed.
enum Target {
    /// A descriptor of this process, as `/dev/stdout` is.
    Descriptor(RawFd),
    /// Nothing yet, in a folder that exists or does not.
    Missing(PathBuf),
    File(PathBuf),
    Folder(PathBuf),
    /// A pipe, a device or a socket.
    Special(PathBuf),
}

impl Target {
    fn of(path: &Path) -> io::Result<Self> {
        /// As many as the kernel follows.
        const MOST_LINKS: usize = 40;
        let own = fs::canonicalize("/proc/self/fd").ok();
        let mut path = path.to_owned();
        for _ in 0..MOST_LINKS {
            let Some(name) = path.file_name() else {
                return fs::canonicalize(&path).map(Self::Folder);
            };
            let parent = match folder_of(&path).canonicalize() {
                Ok(parent) => parent,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    return Ok(Self::Missing(path));
                }
                Err(error) => return Err(error),
            };
            let descriptor = name.to_str().and_then(|name| name.parse().ok());
            if let (true, Some(descriptor)) = (own.as_ref() == Some(&parent), descriptor) {
                return Ok(Self::Descriptor(descriptor));
            }
            path = parent.join(name);
            let kind = match fs::symlink_metadata(&path) {
                Ok(metadata) => metadata.file_type(),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    return Ok(Self::Missing(path));
                }
                Err(error) => return Err(error),
            };
            if !kind.is_symlink() {
                return Ok(match () {
                    () if kind.is_dir() => Self::Folder(path),
                    () if kind.is_file() => Self::File(path),
                    () => Self::Special(path),
                });
            }
            path = parent.join(fs::read_link(&path)?);
        }
        Err(io::Error::other("too many levels of symbolic links"))
    }
}

/// Refuses an output inside a folder that the command reads.
///
/// # Errors
/// Names both.
pub fn check_outside(out: &Path, input: &Path) -> Result<(), OutputError> {
    let target = match Target::of(out) {
        Ok(Target::File(path) | Target::Folder(path) | Target::Missing(path)) => path,
        _ => return Ok(()),
    };
    let Ok(input_path) = input.canonicalize() else { return Ok(()) };
    if target
        .ancestors()
        .any(|folder| folder.canonicalize().is_ok_and(|folder| folder == input_path))
    {
        let problem = format!("it lies in `{}`, which is read", input.display());
        return Err(OutputError::Refused { path: out.into(), problem });
    }
    Ok(())
}

/// The parent folder of a path.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

// Staging folders.

/// The staging folder inside a folder that exists.
const INSIDE: &str = ".bireme.partial";
/// What a staging folder holds; one with anything else is not removed.
const LOCK: &str = "lock";
/// The output.
const OUT: &str = "out";
/// Whatever helps to make it.
const SCRATCH: &str = "scratch";
/// Entries of a folder that is overwritten.
const REPLACED: &str = "replaced";
/// Exists while the new entries take their places.
const PLACING: &str = "placing";

/// A staging folder that an interruption removes.
struct Staged {
    dir: PathBuf,
    /// Folders that were made for the output, outermost first.
    parents: Vec<PathBuf>,
}

static STAGED: Mutex<Vec<Staged>> = Mutex::new(Vec::new());
static IS_INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn staged() -> MutexGuard<'static, Vec<Staged>> {
    STAGED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes all staging folders of this process, before a signal ends it. An output that is being
/// published is completed first.
pub fn interrupt() {
    IS_INTERRUPTED.store(true, Ordering::SeqCst);
    for Staged { dir, parents } in staged().drain(..) {
        // Threads that still write may create files while others are removed.
        for _ in 0..100 {
            remove_staging(&dir);
            if !dir.exists() {
                break;
            }
        }
        parents.iter().rev().for_each(|parent| drop(fs::remove_dir(parent)));
    }
}

/// Whether [`interrupt`] was called: errors that follow are not worth a message.
pub fn is_interrupted() -> bool {
    IS_INTERRUPTED.load(Ordering::SeqCst)
}

/// What cannot be removed now is removed by the next command on the output.
fn remove_staging(dir: &Path) {
    for entry in [OUT, SCRATCH, REPLACED] {
        let _ = remove(&dir.join(entry));
    }
    for entry in [PLACING, LOCK] {
        let _ = fs::remove_file(dir.join(entry));
    }
    let _ = fs::remove_dir(dir);
}

/// Removes a file or a folder with all that it holds, if it exists.
fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    removed.or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// A locked staging folder, removed when dropped.
#[derive(Debug)]
struct Staging {
    dir: PathBuf,
    /// Folders that were made for the output, outermost first.
    parents: Vec<PathBuf>,
    /// Whether an interrupted command had left it.
    is_left: bool,
    is_kept: bool,
    lock: Option<Lock>,
}

impl Staging {
    /// For the output `given`, in a folder that exists.
    fn create(dir: PathBuf, given: &Path, parents: Vec<PathBuf>) -> Result<Self, OutputError> {
        let refused = OutputError::refused(given);
        /// Attempts where other commands remove the folder at the same time.
        const MOST: usize = 10;
        for _ in 0..MOST {
            let is_left = match DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => false,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => true,
                Err(error) => {
                    let folder = folder_of(&dir).display();
                    let problem = format!("cannot create a file in `{folder}`: {error}");
                    return Err(OutputError::Refused { path: given.into(), problem });
                }
            };
            if is_left && !is_staging(&dir) {
                let problem = format!("`{}` is in the way", dir.display());
                return Err(OutputError::Refused { path: given.into(), problem });
            }
            match Lock::acquire(&dir.join(LOCK)) {
                Ok(lock) => {
                    return Ok(Self { dir, parents, is_left, is_kept: false, lock: Some(lock) });
                }
                Err(LockError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
                Err(LockError::Io { source, .. }) => {
                    if !is_left {
                        remove_staging(&dir);
                    }
                    return Err(refused(source));
                }
                Err(source) => return Err(OutputError::InUse { path: given.into(), source }),
            }
        }
        Err(OutputError::Refused {
            path: given.into(),
            problem: "other commands are writing it".into(),
        })
    }

    /// Removes what an interrupted command left. From here on, the folder is removed in the end.
    fn begin(&self, given: &Path, note: &mut dyn FnMut(&str)) -> Result<(), OutputError> {
        if self.is_left {
            for entry in [OUT, SCRATCH, REPLACED, PLACING] {
                remove(&self.dir.join(entry)).map_err(OutputError::refused(given))?;
            }
            note(&format!("removed `{}`, which an interrupted command left", self.dir.display()));
        }
        staged().push(Staged { dir: self.dir.clone(), parents: self.parents.clone() });
        Ok(())
    }

    /// Keeps the folder, which holds the only copy of the previous output.
    fn keep(&mut self) {
        self.is_kept = true;
        staged().retain(|staged| staged.dir != self.dir);
    }

    fn out(&self) -> PathBuf {
        self.dir.join(OUT)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Not while an interruption removes it too.
        let mut all = staged();
        if !self.is_kept {
            all.retain(|staged| staged.dir != self.dir);
            remove_staging(&self.dir);
            // Only those that stayed empty.
            self.parents.iter().rev().for_each(|parent| drop(fs::remove_dir(parent)));
        }
        drop(self.lock.take());
    }
}

fn is_staging(dir: &Path) -> bool {
    let known = [LOCK, OUT, SCRATCH, REPLACED, PLACING];
    let is_dir = fs::symlink_metadata(dir).is_ok_and(|metadata| metadata.is_dir());
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    is_dir && entries.into_iter().all(|entry| known.iter().any(|known| entry.file_name() == *known))
}

/// `.NAME.partial`, beside a file or folder.
fn staging_beside(target: &Path) -> PathBuf {
    /// Leaves room for the rest within the 255 bytes of a name.
    const MOST: usize = 240;
    let name = target.file_name().unwrap_or_default().as_bytes();
    let staging = [b".", &name[..name.len().min(MOST)], b".partial"].concat();
    folder_of(target).join(OsStr::from_bytes(&staging))
}

/// Lets only one of an interruption and a publication happen.
fn uninterrupted(path: &Path) -> Result<MutexGuard<'static, Vec<Staged>>, OutputError> {
    let guard = staged();
    if is_interrupted() {
        return Err(OutputError::Io {
            action: "write",
            path: path.into(),
            source: ErrorKind::Interrupted.into(),
        });
    }
    Ok(guard)
}

// Files.

/// A file that is being written.
///
/// Dropped without [`OutputFile::publish`], it keeps the previous file.
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
    file: File,
    /// Of a regular file.
    staged: Option<StagedFile>,
    is_stdout: bool,
}

#[derive(Debug)]
struct StagedFile {
    staging: Staging,
    target: PathBuf,
}

impl OutputFile {
    /// Opens `path` for writing; `-` stands for the standard output. `note` is given a line where
    /// what an interrupted command left is removed.
    ///
    /// # Errors
    /// The path cannot be written to, or another process writes it.
    pub fn create(path: &Path, note: &mut dyn FnMut(&str)) -> Result<Self, OutputError> {
        let refused = OutputError::refused(path);
        let problem =
            |problem: &str| OutputError::Refused { path: path.into(), problem: problem.into() };
        let direct = |file, is_stdout| Self { path: path.into(), file, staged: None, is_stdout };
        if path == Path::new("-") {
            return descriptor(libc::STDOUT_FILENO).map(|file| direct(file, true)).map_err(refused);
        }
        if path.as_os_str().is_empty() {
            return Err(problem("the path is empty"));
        }
        let target = match Target::of(path).map_err(&refused)? {
            Target::Folder(_) => return Err(problem("it is a folder, and a file is needed")),
            Target::Descriptor(number) => {
                let is_stdout = number == libc::STDOUT_FILENO;
                return descriptor(number).map(|file| direct(file, is_stdout)).map_err(refused);
            }
            Target::Special(target) => {
                if fs::symlink_metadata(&target).is_ok_and(|of| of.file_type().is_socket()) {
                    return Err(problem("it is a socket"));
                }
                let file = OpenOptions::new().write(true).open(target).map_err(refused)?;
                return Ok(direct(file, false));
            }
            _ if path.as_os_str().as_bytes().ends_with(b"/") => {
                return Err(problem("the name of a folder is given, and a file is needed"));
            }
            Target::Missing(target) => {
                if let Err(error) = folder_of(&target).canonicalize() {
                    return Err(problem(&format!("`{}`: {error}", folder_of(&target).display())));
                }
                target
            }
            Target::File(target) => {
                // A file that its owner protects is not replaced either.
                let file = OpenOptions::new().write(true).open(&target).map_err(&refused)?;
                if !is_writable(folder_of(&target)) {
                    return Self::in_place(path, file);
                }
                target
            }
        };
        let staging = Staging::create(staging_beside(&target), path, Vec::new())?;
        staging.begin(path, note)?;
        let file = File::create(staging.out()).map_err(refused)?;
        let staged = Some(StagedFile { staging, target });
        Ok(Self { path: path.into(), file, staged, is_stdout: false })
    }

    /// For a file in a folder where no other can be created.
    fn in_place(path: &Path, file: File) -> Result<Self, OutputError> {
        match file.try_lock() {
            Err(fs::TryLockError::WouldBlock) => {
                Err(OutputError::InUse { path: path.into(), source: LockError::HeldByUnknown })
            }
            _ => {
                file.set_len(0).map_err(OutputError::refused(path))?;
                Ok(Self { path: path.into(), file, staged: None, is_stdout: false })
            }
        }
    }

    /// Whether this is the standard output of the process.
    pub fn is_stdout(&self) -> bool {
        self.is_stdout
    }

    /// Completes the file: it takes its name, and the permissions of the file that it replaces.
    ///
    /// # Errors
    /// The disk is full, say.
    pub fn publish(self) -> Result<(), OutputError> {
        let Self { path, mut file, staged, .. } = self;
        let failed = |source| OutputError::Io { action: "write", path: path.clone(), source };
        file.flush().map_err(failed)?;
        let Some(StagedFile { staging, target }) = staged else { return Ok(()) };
        file.sync_all().map_err(failed)?;
        let guard = uninterrupted(&path)?;
        if let Ok(before) = fs::metadata(&target) {
            // Only root may give a file away.
            let _ = chown(staging.out(), Some(before.uid()), Some(before.gid()));
            file.set_permissions(before.permissions()).map_err(failed)?;
        }
        match fs::rename(staging.out(), &target) {
            // A file that is a mount point keeps its place and gets the content.
            Err(error)
                if matches!(error.kind(), ErrorKind::ResourceBusy | ErrorKind::CrossesDevices) =>
            {
                let from = &mut File::open(staging.out()).map_err(failed)?;
                let mut to =
                    OpenOptions::new().write(true).truncate(true).open(&target).map_err(failed)?;
                io::copy(from, &mut to).and_then(|_| to.sync_all()).map_err(failed)?;
            }
            renamed => renamed.map_err(failed)?,
        }
        sync_folder(folder_of(&target));
        drop(guard);
        drop(staging);
        Ok(())
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl From<OutputError> for io::Error {
    fn from(error: OutputError) -> Self {
        match error {
            OutputError::Io { source, .. } => source,
            error => Self::other(error),
        }
    }
}

/// Writes a whole file.
///
/// # Errors
/// See [`OutputFile`].
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), OutputError> {
    let mut file = OutputFile::create(path, &mut |_| {})?;
    file.write_all(bytes).map_err(OutputError::io("write", path))?;
    file.publish()
}

/// A duplicate of a descriptor of this process.
fn descriptor(number: RawFd) -> io::Result<File> {
    // SAFETY: `dup` takes any number, and returns a new descriptor or -1.
    let copy = unsafe { libc::dup(number) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, so that nothing else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(copy) }))
}

/// Whether entries of a folder can be created and renamed.
fn is_writable(folder: &Path) -> bool {
    let Ok(path) = std::ffi::CString::new(folder.as_os_str().as_bytes()) else { return false };
    // SAFETY: the path is a terminated text.
    unsafe { libc::access(path.as_ptr(), libc::W_OK | libc::X_OK) == 0 }
}

// Folders.

/// What a kind of folder holds.
#[derive(Clone, Copy, Debug)]
pub struct FolderKind {
    /// The entry that is written last and removed first: a folder that has it is complete.
    pub marker: &'static str,
    /// Whether an entry of that name belongs to the output. Others stay when it is overwritten.
    pub is_ours: fn(&str) -> bool,
}

/// A folder that is being written.
///
/// Dropped without [`OutputFolder::publish`], it keeps the previous folder.
#[derive(Debug)]
pub struct OutputFolder {
    given: PathBuf,
    target: PathBuf,
    kind: FolderKind,
    mode: Mode,
    staging: Staging,
}

/// Where a folder is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// In a staging folder beside it, which is renamed.
    Beside,
    /// In a staging folder inside it, from which the entries are moved.
    Inside,
    InPlace,
}

impl OutputFolder {
    /// Prepares `path`, which may be missing, empty or, with `overwrite`, a folder of the same
    /// kind. `note` is given a line where what an interrupted command left is removed.
    ///
    /// # Errors
    /// The path cannot be written to, holds something, or another process writes it.
    pub fn create(
        path: &Path,
        kind: FolderKind,
        overwrite: bool,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, OutputError> {
        let problem =
            |problem: &str| OutputError::Refused { path: path.into(), problem: problem.into() };
        if path.as_os_str().is_empty() {
            return Err(problem("the path is empty"));
        }
        let (target, mode) = match Target::of(path).map_err(OutputError::refused(path))? {
            Target::Folder(target) => (target, Mode::Inside),
            Target::Missing(target) => (target, Mode::Beside),
            _ => return Err(problem("it is not a folder")),
        };
        let mut staging = if mode == Mode::Inside {
            // Before anything is created in a folder that is refused.
            check_free(&target, path, kind, overwrite)?;
            // Of a command that began before the folder existed.
            let beside = staging_beside(&target);
            if is_staging(&beside) {
                Staging::create(beside, path, Vec::new())?.begin(path, note)?;
            }
            Staging::create(target.join(INSIDE), path, Vec::new())?
        } else {
            let made = make_folders(folder_of(&target)).map_err(OutputError::refused(path))?;
            let staging = Staging::create(staging_beside(&target), path, made.clone());
            staging
                .inspect_err(|_| made.iter().rev().for_each(|made| drop(fs::remove_dir(made))))?
        };
        if mode == Mode::Inside
            && let Err(error) = recover(&staging.dir, &target, kind)
        {
            staging.keep();
            return Err(OutputError::refused(path)(error));
        }
        staging.begin(path, note)?;
        if target.is_dir() {
            // Another command may have published before the lock was acquired.
            check_free(&target, path, kind, overwrite && mode == Mode::Inside)?;
        }
        for entry in [OUT, SCRATCH] {
            fs::create_dir(staging.dir.join(entry)).map_err(OutputError::refused(path))?;
        }
        Ok(Self { given: path.into(), target, kind, mode, staging })
    }

    /// Prepares `path`, which may be missing or empty, to be written in place: for a command whose
    /// messages name files in it, and which leaves them where it fails. `note` is given a line
    /// where what an interrupted command left is removed.
    ///
    /// # Errors
    /// See [`OutputFolder::create`].
    pub fn in_place(
        path: &Path,
        kind: FolderKind,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, OutputError> {
        let refused = OutputError::refused(path);
        let is_left = is_staging(&path.join(INSIDE));
        if path.is_dir() && !is_left {
            check_free(path, path, kind, false)?;
        }
        let made = make_folders(path).map_err(&refused)?;
        let target = path.canonicalize().map_err(&refused)?;
        let staging = Staging::create(target.join(INSIDE), path, made)?;
        if staging.is_left {
            for name in ours(&target, kind).map_err(&refused)? {
                remove(&target.join(name)).map_err(&refused)?;
            }
            note(&format!("removed from `{}` what an interrupted command left", path.display()));
        }
        check_free(&target, path, kind, false)?;
        Ok(Self { given: path.into(), target, kind, mode: Mode::InPlace, staging })
    }

    /// The folder to write into.
    pub fn path(&self) -> PathBuf {
        match self.mode {
            Mode::InPlace => self.given.clone(),
            Mode::Beside | Mode::Inside => self.staging.out(),
        }
    }

    /// A folder for what helps to write, on the same file system.
    pub fn scratch(&self) -> PathBuf {
        self.staging.dir.join(SCRATCH)
    }

    /// Completes the folder: its entries appear under its name.
    ///
    /// # Errors
    /// The disk is full, say.
    pub fn publish(self) -> Result<(), OutputError> {
        let Self { given, target, kind, mode, mut staging } = self;
        let failed = OutputError::io("write", &given);
        // Before the sync, which would write its blocks.
        let _ = fs::remove_dir_all(staging.dir.join(SCRATCH));
        let written = if mode == Mode::InPlace { target.clone() } else { staging.out() };
        sync_tree(&written).map_err(OutputError::io("write", &given))?;
        let guard = uninterrupted(&given)?;
        let published = match mode {
            Mode::Beside => {
                fs::rename(staging.out(), &target).map(|()| sync_folder(folder_of(&target)))
            }
            Mode::Inside => place(&staging.dir, &target, kind),
            Mode::InPlace => Ok(()),
        };
        drop(guard);
        if published.is_err() && !is_empty(&staging.dir.join(REPLACED)) {
            staging.keep();
        }
        published.map_err(failed)
    }
}

/// What a command adds to a folder.
///
/// Dropped without [`OutputEntries::publish`], it keeps the previous entries.
#[derive(Debug)]
pub struct OutputEntries {
    given: PathBuf,
    staging: Staging,
}

impl OutputEntries {
    /// Prepares `folder`, which may be missing, for entries that belong to `name`: one command at a
    /// time adds them. `note` is given a line where what an interrupted command left is removed.
    ///
    /// # Errors
    /// The folder cannot be written to, or another process adds entries of that name.
    pub fn create(
        folder: &Path,
        name: &str,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, OutputError> {
        check_folder(folder)?;
        let refused = OutputError::refused(folder);
        let made = make_folders(folder).map_err(&refused)?;
        let target = folder.canonicalize().map_err(&refused)?;
        let staging = Staging::create(staging_beside(&target.join(name)), folder, made)?;
        staging.begin(folder, note)?;
        fs::create_dir(staging.out()).map_err(refused)?;
        Ok(Self { given: folder.into(), staging })
    }

    /// The folder to write into.
    pub fn path(&self) -> PathBuf {
        self.staging.out()
    }

    /// Completes the entries; `place` moves them from the folder that they were written in.
    ///
    /// # Errors
    /// The disk is full, say.
    pub fn publish(self, place: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), OutputError> {
        let out = self.path();
        sync_tree(&out).map_err(OutputError::io("write", &self.given))?;
        let guard = uninterrupted(&self.given)?;
        let placed = place(&out);
        sync_folder(&self.given);
        drop(guard);
        placed.map_err(OutputError::io("write", &self.given))
    }
}

/// Refuses a path that is not a folder, or a folder that cannot be written to or created.
///
/// # Errors
/// Says why.
pub fn check_folder(path: &Path) -> Result<(), OutputError> {
    let problem = |problem: String| OutputError::Refused { path: path.into(), problem };
    let target = match Target::of(path).map_err(OutputError::refused(path))? {
        _ if path.as_os_str().is_empty() => return Err(problem("the path is empty".into())),
        Target::Folder(target) | Target::Missing(target) => target,
        _ => return Err(problem("it is not a folder".into())),
    };
    let mut ancestors = target.ancestors().filter(|folder| !folder.as_os_str().is_empty());
    let folder = ancestors.find(|folder| folder.exists()).unwrap_or(Path::new("."));
    if !folder.is_dir() || !is_writable(folder) {
        return Err(problem(format!("cannot create a file in `{}`", folder.display())));
    }
    Ok(())
}

/// Refuses a folder that holds something that is not to be replaced.
fn check_free(
    target: &Path,
    given: &Path,
    kind: FolderKind,
    overwrite: bool,
) -> Result<(), OutputError> {
    let entries = fs::read_dir(target).map_err(OutputError::refused(given))?;
    let mut is_free = true;
    for entry in entries {
        let name = entry.map_err(OutputError::refused(given))?.file_name();
        // The root of a new ext4 volume holds `lost+found`.
        is_free &= name == INSIDE || name == "lost+found";
    }
    let is_replaceable = target.join(kind.marker).exists();
    // Decided again when the entries that an interrupted command moved are back.
    let is_recoverable = target.join(INSIDE).join(REPLACED).is_dir();
    if is_free || (overwrite && is_replaceable) || is_recoverable {
        return Ok(());
    }
    Err(OutputError::Exists { path: given.into(), is_replaceable })
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none())
}

/// Makes a folder and those above it, also where symbolic links lead to folders that are missing.
///
/// # Errors
/// A part of the path is a file, or a folder cannot be created.
pub fn create_folder(folder: &Path) -> io::Result<()> {
    make_folders(folder).map(drop)
}

/// As [`create_folder`]; returns the folders that were missing, outermost first.
fn make_folders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut made = Vec::new();
    let remove_made =
        |made: &[PathBuf]| made.iter().rev().for_each(|made| drop(fs::remove_dir(made)));
    let mut parts: Vec<&Path> =
        folder.ancestors().filter(|path| !path.as_os_str().is_empty()).collect();
    parts.reverse();
    for part in parts.into_iter().filter(|part| !part.exists()) {
        // `mkdir` does not follow a link.
        let created = match Target::of(part) {
            Ok(Target::Missing(target)) if target != part && part.is_symlink() => {
                make_folders(&target)
            }
            Ok(_) => fs::create_dir(part).map(|()| vec![part.to_owned()]),
            Err(error) => Err(error),
        };
        match created {
            Ok(folders) => made.extend(folders),
            // Another process has made it meanwhile.
            Err(error) if error.kind() == ErrorKind::AlreadyExists && part.is_dir() => {}
            Err(error) => {
                remove_made(&made);
                return Err(error);
            }
        }
    }
    if folder.is_dir() || folder.as_os_str().is_empty() {
        return Ok(made);
    }
    remove_made(&made);
    Err(ErrorKind::NotADirectory.into())
}

/// The names in a folder that belong to the output, the marker last.
fn ours(folder: &Path, kind: FolderKind) -> io::Result<Vec<OsString>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        if name.to_str().is_some_and(|name| (kind.is_ours)(name)) {
            names.insert((name == kind.marker, name));
        }
    }
    Ok(names.into_iter().map(|(_, name)| name).collect())
}

/// Puts the entries of a staging folder into the folder around it. The old ones move away first and
/// come back where that fails.
fn place(staging: &Path, target: &Path, kind: FolderKind) -> io::Result<()> {
    let (out, replaced) = (staging.join(OUT), staging.join(REPLACED));
    let placed = (|| {
        fs::create_dir(&replaced)?;
        for name in ours(target, kind)?.iter().rev() {
            fs::rename(target.join(name), replaced.join(name))?;
        }
        File::create(staging.join(PLACING))?.sync_all()?;
        for name in ours(&out, kind)? {
            fs::rename(out.join(&name), target.join(&name))?;
        }
        Ok(())
    })();
    if placed.is_err() {
        recover(staging, target, kind)?;
    }
    sync_folder(target);
    placed
}

/// Restores a folder whose entries were being replaced when the command was interrupted.
fn recover(staging: &Path, target: &Path, kind: FolderKind) -> io::Result<()> {
    let replaced = staging.join(REPLACED);
    if !replaced.is_dir() {
        return Ok(());
    }
    if staging.join(PLACING).exists() {
        if target.join(kind.marker).exists() {
            // The new entries are complete.
            return Ok(());
        }
        for name in ours(target, kind)? {
            remove(&target.join(name))?;
        }
    }
    for name in ours(&replaced, kind)? {
        fs::rename(replaced.join(&name), target.join(&name))?;
    }
    Ok(())
}

// Syncing.

/// Writes a folder and all that it holds to the disk.
fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => sync_tree(&entry.path())?,
            kind if kind.is_file() => File::open(entry.path())?.sync_all()?,
            _ => {}
        }
    }
    sync_folder(folder);
    Ok(())
}

/// Some file systems cannot sync folders.
fn sync_folder(folder: &Path) {
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::thread;

    use super::*;

    const KIND: FolderKind =
        FolderKind { marker: "done", is_ours: |name| matches!(name, "done" | "days" | "old") };

    fn silent(line: &str) {
        panic!("nothing was left behind: {line}");
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn write_folder(folder: &OutputFolder, text: &str) {
        fs::create_dir(folder.path().join("days")).unwrap();
        fs::write(folder.path().join("days/1"), text).unwrap();
        fs::write(folder.path().join("done"), text).unwrap();
    }

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        (dir, path)
    }

    #[test]
    fn a_file_is_what_it_was_until_it_is_published() {
        let (_dir, dir) = scratch();
        let path = dir.join("x.csv");
        for (before, names_after) in [(None, vec![]), (Some("before"), vec!["x.csv"])] {
            if let Some(before) = before {
                fs::write(&path, before).unwrap();
            }
            let mut file = OutputFile::create(&path, &mut silent).unwrap();
            file.write_all(b"half").unwrap();
            assert_eq!(fs::read_to_string(&path).ok().as_deref(), before);
            drop(file);
            assert_eq!(names(&dir), names_after);
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        write(&path, b"whole").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "whole");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(names(&dir), ["x.csv"]);
    }

    #[test]
    fn links_are_followed_and_stay() {
        let (_dir, dir) = scratch();
        fs::create_dir(dir.join("large")).unwrap();
        symlink("large/x.csv", dir.join("link")).unwrap();
        symlink("link", dir.join("second")).unwrap();
        for text in ["new", "replaced"] {
            write(&dir.join("second"), text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(dir.join("large/x.csv")).unwrap(), text);
        }
        assert!(dir.join("second").is_symlink() && dir.join("link").is_symlink());

        symlink("large/data", dir.join("data")).unwrap();
        let folder = OutputFolder::create(&dir.join("data"), KIND, false, &mut silent).unwrap();
        write_folder(&folder, "1");
        folder.publish().unwrap();
        assert!(dir.join("data").is_symlink());
        assert_eq!(names(&dir.join("large")), ["data", "x.csv"]);
        symlink("turn", dir.join("turn")).unwrap();
        assert!(OutputFile::create(&dir.join("turn"), &mut silent).is_err());
    }

    #[test]
    fn pipes_and_devices_are_written_to() {
        let (_dir, dir) = scratch();
        let path = dir.join("pipe");
        let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the path is a terminated text.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let text = thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut text = String::new();
                File::open(&path).unwrap().read_to_string(&mut text).unwrap();
                text
            });
            write(&path, b"through").unwrap();
            reader.join().unwrap()
        });
        assert_eq!(text, "through");
        assert!(fs::symlink_metadata(&path).unwrap().file_type().is_fifo());
        symlink("/dev/null", dir.join("null")).unwrap();
        write(&dir.join("null"), b"nothing").unwrap();
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
        assert_eq!(names(&dir), ["null", "pipe"]);

        // A descriptor of any kind of file is appended to.
        let target = dir.join("log");
        fs::write(&target, "before ").unwrap();
        let open = OpenOptions::new().append(true).open(&target).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&open);
        write(Path::new(&format!("/dev/fd/{number}")), b"after").unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "before after");
        assert!(OutputFile::create(Path::new("/dev/stdout"), &mut silent).unwrap().is_stdout());
        assert!(OutputFile::create(Path::new("-"), &mut silent).unwrap().is_stdout());
    }

    #[test]
    fn paths_that_cannot_be_written_to_are_refused() {
        let (_dir, dir) = scratch();
        fs::write(dir.join("file"), "").unwrap();
        let socket = std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap();
        for name in ["", "no/x.csv", "x.csv/", ".", "file/x.csv", "socket"] {
            let path = if name.is_empty() { PathBuf::new() } else { dir.join(name) };
            let error = OutputFile::create(&path, &mut silent).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
        }
        for name in ["file", "file/data", "socket"] {
            let error =
                OutputFolder::create(&dir.join(name), KIND, false, &mut silent).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
        }
        drop(socket);
        fs::create_dir(dir.join(".x.csv.partial")).unwrap();
        fs::write(dir.join(".x.csv.partial/thesis.tex"), "").unwrap();
        let error = OutputFile::create(&dir.join("x.csv"), &mut silent).unwrap_err();
        assert!(error.to_string().ends_with("is in the way"), "{error}");
        assert_eq!(names(&dir), [".x.csv.partial", "file", "socket"]);
    }

    #[test]
    fn a_second_writer_is_refused() {
        let (_dir, dir) = scratch();
        let path = dir.join("x.csv");
        let first = OutputFile::create(&path, &mut silent).unwrap();
        symlink(&path, dir.join("link")).unwrap();
        for path in [&path, &dir.join("link")] {
            let error = OutputFile::create(path, &mut silent).unwrap_err();
            assert!(matches!(error, OutputError::InUse { .. }) && error.exit_code() == 2);
        }
        drop(first);
        for is_there in [false, true] {
            let path = dir.join(format!("data-{is_there}"));
            if is_there {
                fs::create_dir(&path).unwrap();
            }
            let first = OutputFolder::create(&path, KIND, false, &mut silent).unwrap();
            let error = OutputFolder::create(&path, KIND, false, &mut silent).unwrap_err();
            assert!(matches!(error, OutputError::InUse { .. }), "{error}");
            write_folder(&first, "first");
            first.publish().unwrap();
            assert_eq!(names(&path), ["days", "done"]);
        }
    }

    #[test]
    fn folders_are_made_where_links_lead() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        symlink("elsewhere/large", at("link")).unwrap();
        assert_eq!(make_folders(&at("link/a/b")).unwrap().len(), 4);
        assert!(at("elsewhere/large/a/b").is_dir() && at("link").is_symlink());
        assert_eq!(make_folders(&at("link/a/b")).unwrap(), [] as [PathBuf; 0]);

        fs::write(at("file"), "").unwrap();
        assert!(make_folders(&at("file")).is_err() && make_folders(&at("file/x")).is_err());
        symlink("loop", at("loop")).unwrap();
        assert!(make_folders(&at("loop/x")).is_err());
    }

    #[test]
    fn a_folder_is_what_it_was_until_it_is_published() {
        let (_dir, dir) = scratch();
        let path = dir.join("deep/er/data");
        drop(OutputFolder::create(&path, KIND, false, &mut silent).unwrap());
        assert_eq!(names(&dir), [""; 0]);
        let folder = OutputFolder::create(&path, KIND, false, &mut silent).unwrap();
        write_folder(&folder, "first");
        folder.publish().unwrap();
        let error = OutputFolder::create(&path, KIND, false, &mut silent).unwrap_err();
        assert!(matches!(error, OutputError::Exists { is_replaceable: true, .. }), "{error}");

        fs::write(path.join("old"), "").unwrap();
        fs::write(path.join("notes"), "of somebody").unwrap();
        drop(OutputFolder::create(&path, KIND, true, &mut silent).unwrap());
        assert_eq!(names(&path), ["days", "done", "notes", "old"]);
        let folder = OutputFolder::create(&path, KIND, true, &mut silent).unwrap();
        write_folder(&folder, "second");
        assert_eq!(fs::read_to_string(path.join("days/1")).unwrap(), "first");
        folder.publish().unwrap();
        assert_eq!(fs::read_to_string(path.join("days/1")).unwrap(), "second");
        assert_eq!(names(&path), ["days", "done", "notes"]);

        let other = dir.join("other");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("thesis.tex"), "").unwrap();
        let error = OutputFolder::create(&other, KIND, true, &mut silent).unwrap_err();
        assert!(matches!(error, OutputError::Exists { is_replaceable: false, .. }), "{error}");
        assert_eq!(names(&other), ["thesis.tex"]);
    }

    /// Puts an output into the state in which a killed process leaves it.
    fn kill(mut folder: OutputFolder) {
        folder.staging.keep();
    }

    #[test]
    fn what_an_interrupted_command_left_is_removed_by_the_next() {
        let (_dir, dir) = scratch();
        fs::create_dir(dir.join("there")).unwrap();
        for name in ["new", "there"] {
            let path = dir.join(name);
            let folder = OutputFolder::create(&path, KIND, false, &mut silent).unwrap();
            write_folder(&folder, "lost");
            kill(folder);
            let mut notes = Vec::new();
            let mut note = |line: &str| notes.push(line.to_owned());
            let folder = OutputFolder::create(&path, KIND, false, &mut note).unwrap();
            assert!(matches!(&notes[..], [line] if line.contains(".partial")), "{notes:?}");
            write_folder(&folder, "kept");
            folder.publish().unwrap();
            assert_eq!(names(&path), ["days", "done"]);
        }
        assert_eq!(names(&dir), ["new", "there"]);

        // The folder was made after the command was killed.
        let path = dir.join("made");
        kill(OutputFolder::create(&path, KIND, false, &mut silent).unwrap());
        fs::create_dir(&path).unwrap();
        drop(OutputFolder::create(&path, KIND, false, &mut |_| {}).unwrap());
        assert_eq!(names(&dir), ["made", "new", "there"]);
    }

    #[test]
    fn an_interrupted_replacement_is_undone_or_complete() {
        let (_dir, dir) = scratch();
        for n_steps in 0..=5 {
            let path = dir.join(n_steps.to_string());
            fs::create_dir(&path).unwrap();
            let folder = OutputFolder::create(&path, KIND, false, &mut silent).unwrap();
            write_folder(&folder, "old");
            folder.publish().unwrap();
            fs::write(path.join("old"), "").unwrap();
            let folder = OutputFolder::create(&path, KIND, true, &mut silent).unwrap();
            write_folder(&folder, "new");
            let (out, replaced) = (folder.path(), folder.staging.dir.join(REPLACED));
            fs::create_dir(&replaced).unwrap();
            let away = |name| fs::rename(path.join(name), replaced.join(name)).unwrap();
            let into = |name| fs::rename(out.join(name), path.join(name)).unwrap();
            let steps: [&dyn Fn(); 5] = [
                &|| away("done"),
                &|| ["old", "days"].map(away).into_iter().collect(),
                &|| drop(File::create(folder.staging.dir.join(PLACING)).unwrap()),
                &|| into("days"),
                &|| into("done"),
            ];
            steps[..n_steps].iter().for_each(|step| step());
            kill(folder);
            drop(OutputFolder::create(&path, KIND, true, &mut |_| {}).unwrap());
            let (text, entries) = match n_steps {
                5 => ("new", vec!["days", "done"]),
                _ => ("old", vec!["days", "done", "old"]),
            };
            assert_eq!(names(&path), entries, "{n_steps}");
            assert_eq!(fs::read_to_string(path.join("days/1")).unwrap(), text, "{n_steps}");
        }
    }
}
