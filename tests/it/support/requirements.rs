//! Checks whether this machine has what a test needs.
//!
//! Where something is missing, a check prints a line that starts with `skipped:`, and the test
//! returns. `REQUIRE_MPI=1`, `REQUIRE_GPU=1` and `REQUIRE_TRITON=1` make the check fail instead.

use std::env;
use std::path::{Path, PathBuf};

use super::files::root;

/// Whether `mpirun` is in `PATH`; `consequence` completes the skipped line.
pub fn has_mpirun(consequence: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let has_mpirun = env::split_paths(&path).any(|folder| folder.join("mpirun").is_file());
    if !has_mpirun {
        assert_ne!(env::var("REQUIRE_MPI").as_deref(), Ok("1"), "there is no `mpirun` in `PATH`");
        println!("skipped: there is no `mpirun` in `PATH`, so {consequence}");
    }
    has_mpirun
}

/// Whether there is an NVIDIA driver, without a word if there is none.
pub fn has_nvidia_driver() -> bool {
    Path::new("/dev/nvidiactl").exists()
}

/// Whether there is a GPU.
pub fn has_gpu() -> bool {
    let has_gpu = has_nvidia_driver();
    if !has_gpu {
        assert_ne!(env::var("REQUIRE_GPU").as_deref(), Ok("1"), "there is no GPU");
        println!("skipped: there is no GPU, so nothing ran on one");
    }
    has_gpu
}

/// The folder of real events: `BIREME_SHARED`, or `../shared`.
pub fn shared() -> Option<PathBuf> {
    let beside = root().join("../shared");
    let dir = env::var_os("BIREME_SHARED").map_or(beside, PathBuf::from);
    if dir.is_dir() {
        return Some(dir);
    }
    println!(
        "skipped: there is no `{}` with real events (`BIREME_SHARED` names another)",
        dir.display()
    );
    None
}

/// The fake CUDA runtime that tests/fake_cuda/install.sh installs.
pub fn fake_cuda() -> Option<PathBuf> {
    let dir = root().join(".fake_cuda");
    if dir.join("STAMP").is_file() {
        return Some(dir);
    }
    let is_required = env::var_os("REQUIRE_FAKE_CUDA").is_some();
    assert!(!is_required, "tests/fake_cuda/install.sh has not been run");
    println!("skipped: there is no fake CUDA runtime in `{}`", dir.display());
    None
}

/// The Triton Inference Server that tests/serving/install.sh installs.
pub fn triton() -> Option<PathBuf> {
    let dir = root().join(".triton");
    if dir.join("VERSION").is_file() {
        return Some(dir);
    }
    assert!(env::var_os("REQUIRE_TRITON").is_none(), "tests/serving/install.sh has not been run");
    println!("skipped: there is no Triton in `{}` (tests/serving/install.sh)", dir.display());
    None
}
