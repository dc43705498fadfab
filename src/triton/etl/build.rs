//! Keeps the library in memory after the server closes it: the threads of its pools live as long as
//! the process. Without symbols, which every exported model would carry along.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-cdylib=-Wl,-z,nodelete,--strip-all");
}
