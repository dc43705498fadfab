//! Writes the folder of libtorch into the binary, so that it starts without `LD_LIBRARY_PATH`,
//! exports the function that MKL asks about the CPU, and compiles what tch leaves out of libtorch's
//! autograd, optimizers and tracer.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let sources = ["src/device/operation.cpp", "src/export/trace.cpp", "src/optim/fused.cpp"];
    sources
        .iter()
        .chain(&["src/device/guarded.h"])
        .for_each(|source| println!("cargo::rerun-if-changed={source}"));
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else { return };
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    // See src/device/mkl.rs.
    let answer = "mkl_serv_intel_cpu_true";
    println!("cargo::rustc-link-arg=-Wl,--undefined={answer},--export-dynamic-symbol={answer}");
    let include = Path::new(&lib).with_file_name("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        // libtorch's headers are not ours to mend.
        .warnings(false)
        // Nothing here is worth the time of an optimiser.
        .opt_level(0)
        .debug(false)
        .files(sources)
        .compile("bireme_torch");
}
