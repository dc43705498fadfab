//! Writes the folder of libtorch into the binary, so that it starts without `LD_LIBRARY_PATH`, and
//! exports the function that MKL asks about the CPU.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else { return };
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    // See src/device/mkl.rs.
    let answer = "mkl_serv_intel_cpu_true";
    println!("cargo::rustc-link-arg=-Wl,--undefined={answer},--export-dynamic-symbol={answer}");
}
