//! Compiles the C++ sources against libtorch, and writes the folder of libtorch into the tests, so
//! that they start without `LD_LIBRARY_PATH`.

use std::path::Path;

fn main() {
    let sources = ["autograd.cpp", "torchscript.cpp", "transfer.cpp"];
    for source in sources.iter().chain(&["build.rs", "guarded.h"]) {
        println!("cargo::rerun-if-changed={source}");
    }
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else { return };
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    let include = Path::new(&lib).with_file_name("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        // The warnings are about libtorch's headers.
        .warnings(false)
        // These functions only call libtorch; an optimised build would take a minute longer.
        .opt_level(0)
        .debug(false)
        .files(sources)
        .compile("bireme_torch");
}
