//! Compiles the schema's messages, without a protobuf compiler on the machine.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["schema.proto"], ["proto"])?;
    let descriptors = PathBuf::from(std::env::var("OUT_DIR")?).join("schema.bin");
    Ok(std::fs::write(descriptors, files.encode_to_vec())?)
}
