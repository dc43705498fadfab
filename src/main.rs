//! Bireme.
fn main() {}
