//! A host without a GPU computes on the CPU, and says so plainly when asked for more.

use std::path::Path;

use bireme::device::{DeviceChoice, place};
use tch::Device;

#[test]
fn a_host_without_a_gpu_refuses_cuda_and_takes_the_cpu_otherwise() {
    if Path::new("/dev/nvidiactl").exists() {
        println!("skipped: this host has a GPU");
        return;
    }
    let refused = place(DeviceChoice::Cuda, 0, 0, 1).unwrap_err();
    assert!(
        refused.to_string().starts_with("`run.device` is `cuda`, but there is no NVIDIA driver"),
        "{refused}"
    );
    assert!(refused.hint().contains("--set run.device=cpu"));
    for choice in [DeviceChoice::Auto, DeviceChoice::Cpu] {
        let here = place(choice, 0, 0, 1).unwrap();
        assert_eq!((here.device, here.warnings.as_slice()), (Device::Cpu, [].as_slice()));
        assert!(here.n_threads >= 1);
        assert_eq!(place(choice, 3, 1, 2).unwrap().n_threads, 3);
    }
}
