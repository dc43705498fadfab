//! Writes where libtorch lies into the library, and keeps it in memory after the server closes it,
//! as libtorch's threads live as long as the process.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-cdylib=-Wl,-z,nodelete");
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo::rustc-link-arg-cdylib=-Wl,-rpath,{lib}");
    }
}
