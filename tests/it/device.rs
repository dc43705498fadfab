//! A host without a GPU computes on the CPU and refuses `cuda`.

use std::process::Command;

use bireme::device::{DeviceChoice, place};
use bireme_base::user_error::UserError;
use tch::Device;

use crate::support::mpirun::mpirun;
use crate::support::process::{LIMIT, PROGRAM, bireme};
use crate::support::requirements::has_nvidia_driver;

#[test]
fn a_host_without_a_gpu_refuses_cuda_and_takes_the_cpu_otherwise() {
    if has_nvidia_driver() {
        println!("skipped: this host has a GPU");
        return;
    }
    let refused = place(DeviceChoice::Cuda, 0, 0, 1).unwrap_err();
    assert!(
        refused.to_string().starts_with("`run.device` is `cuda`, but there is no NVIDIA driver"),
        "{refused}"
    );
    assert!(refused.hint().unwrap().contains("--set run.device=cpu"));
    for choice in [DeviceChoice::Auto, DeviceChoice::Cpu] {
        let here = place(choice, 0, 0, 1).unwrap();
        assert_eq!((here.device, here.warnings.as_slice()), (Device::Cpu, [].as_slice()));
        assert!(here.n_threads >= 1);
        assert_eq!(place(choice, 3, 1, 2).unwrap().n_threads, 3);
    }
}

#[test]
fn the_doctor_looks_at_one_rank_and_at_two() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let doctor = ["doctor", "--device", "cpu", "--dir", path];
    assert!(bireme(&doctor).success().stdout.contains("ranks                    1 (solo)"));
    let Some(two) = mpirun(2, Command::new(PROGRAM).args(doctor), LIMIT) else { return };
    let stdout = two.success().stdout;
    for part in ["2 (mpi)", "all-reduce of 64 MiB", "clocks", "GFLOP/s"] {
        assert!(stdout.contains(part), "{part} is not in\n{stdout}");
    }
    // Rank 0 alone speaks.
    assert_eq!(stdout.matches("GFLOP/s").count(), 1, "{stdout}");
}
