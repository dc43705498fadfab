//! Lets MKL, with which libtorch multiplies matrices on the CPU, use AVX-512 on every CPU with it.
//!
//! MKL looks at the instructions that the CPU has, and at its maker: `mkl_serv_intel_cpu_true`
//! answers whether that is Intel. On a CPU of another maker MKL uses instructions of an older
//! generation, which costs an AMD EPYC with AVX-512 a fifth of its speed. MKL is linked into
//! `libtorch_cpu.so`; there a symbol of the program takes precedence over one of the library, and
//! `build.rs` exports the one below.
//!
//! No file of MKL is changed. libtorch redistributes oneMKL under the Intel Simplified Software
//! License (version of October 2022). That licence permits use and redistribution in binary form
//! without modification. It permits neither reverse engineering, decompilation or disassembly, nor
//! to modify or alter the software "or its operation at any time, including during execution". The
//! function below alters which instructions MKL chooses. [`MKL_AVX512`] set to `0` makes it answer
//! as MKL's own.

use std::arch::x86_64::__cpuid;
use std::env;

use crate::env::MKL_AVX512;

/// MKL's question whether the CPU is Intel's.
#[unsafe(no_mangle)]
extern "C" fn mkl_serv_intel_cpu_true() -> i32 {
    let by_maker = env::var_os(MKL_AVX512).is_some_and(|value| value == "0");
    i32::from(!by_maker || is_by_intel())
}

fn is_by_intel() -> bool {
    let id = __cpuid(0);
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}
