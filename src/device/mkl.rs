//! Lets MKL, with which libtorch multiplies matrices on the CPU, use AVX-512 on every CPU with it.
//!
//! MKL looks at the instructions that the CPU has, and at its maker: `mkl_serv_intel_cpu_true`
//! answers whether that is Intel. On a CPU of another maker MKL uses instructions of an older
//! generation, which costs an AMD EPYC with AVX-512 a fifth of its speed. MKL is linked into
//! `libtorch_cpu.so`; there a symbol of the program takes precedence over one of the library, and
//! `build.rs` exports the one below.
//!
//! No file of MKL is changed. Intel distributes oneMKL under the Intel Simplified Software License.
//! Its version of October 2022 permits use and redistribution in binary form without modification.
//! It permits neither reverse engineering, decompilation or disassembly, nor to modify or alter the
//! software "or its operation at any time, including during execution". Which version covers the
//! MKL of a libtorch wheel has not been verified. The function below alters which instructions MKL
//! chooses. [`MKL_AVX512`] set to `0` makes it answer as MKL's own.

use std::arch::x86_64::__cpuid;
use std::env;
use std::ffi::c_int;
use std::sync::LazyLock;

use crate::env::MKL_AVX512;

/// What MKL asks before it chooses its instructions.
#[unsafe(no_mangle)]
extern "C" fn mkl_serv_intel_cpu_true() -> c_int {
    // MKL asks more than once, and from any thread.
    static ANSWER: LazyLock<bool> = LazyLock::new(|| !is_switched_off() || is_intel());
    (*ANSWER).into()
}

fn is_switched_off() -> bool {
    env::var_os(MKL_AVX512).is_some_and(|value| value == "0")
}

/// As MKL's own function answers.
fn is_intel() -> bool {
    let vendor = __cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
}

#[cfg(test)]
mod tests {
    use std::fs;

    use libloading::os::unix::Library;

    use super::*;

    #[test]
    fn the_maker_of_the_cpu_is_the_one_that_linux_names() {
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap();
        assert_eq!(is_intel(), cpus.contains("GenuineIntel"));
    }

    #[test]
    fn libraries_find_the_function_of_the_program() {
        type Function = extern "C" fn() -> c_int;
        // SAFETY: the type is that of the function here and in MKL.
        let found = unsafe { Library::this().get::<Function>(b"mkl_serv_intel_cpu_true\0") };
        assert_eq!(*found.unwrap() as usize, mkl_serv_intel_cpu_true as Function as usize);
    }
}
