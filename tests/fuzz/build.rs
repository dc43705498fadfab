//! Writes where libtorch lies into the programs.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo::rustc-link-arg-bins=-Wl,-rpath,{lib}");
    }
}
