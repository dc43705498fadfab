//! Compiles the C++ sources against libtorch, and writes the folder of libtorch into the tests, so
//! that they start without `LD_LIBRARY_PATH`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// Sources that are linked with the program.
const LINKED: [&str; 3] = ["autograd.cpp", "torchscript.cpp", "transfer.cpp"];

/// The source of the library that is loaded behind libtorch's CUDA library.
const GRAPH: &str = "cuda/graph.cpp";

/// Declares the types of the CUDA runtime, under the names of the toolkit's headers.
const RUNTIME_TYPES: &str = "cuda/runtime_types.h";

fn main() {
    for source in LINKED.iter().chain(&["build.rs", "guarded.h", GRAPH, RUNTIME_TYPES]) {
        println!("cargo::rerun-if-changed={source}");
    }
    let Ok(lib) = env::var("DEP_TCH_LIBTORCH_LIB") else { return };
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    let include = Path::new(&lib).with_file_name("include");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        // The warnings are about libtorch's headers.
        .warnings(false)
        // These functions only call libtorch; an optimised build would take a minute longer.
        .opt_level(0)
        .debug(false);
    build.clone().files(LINKED).compile("bireme_torch");
    build_graph_library(build.opt_level(1));
}

/// Builds a shared object that is linked with nothing: its functions of libtorch are looked up when
/// it is loaded.
fn build_graph_library(build: &mut cc::Build) {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let headers = out.join("cuda");
    fs::create_dir_all(&headers).expect("the build's own folder is writable");
    for name in ["cuda.h", "cuda_runtime.h", "cuda_runtime_api.h"] {
        fs::copy(RUNTIME_TYPES, headers.join(name)).expect("the header can be copied");
    }
    let mut compiler = build.include(headers).get_compiler().to_command();
    compiler.args(["-shared", "-fPIC", "-s", GRAPH, "-o"]).arg(out.join("libbireme_graph.so"));
    let status = compiler.status().expect("the C++ compiler starts");
    assert!(status.success(), "{GRAPH} does not compile: {status}");
}
