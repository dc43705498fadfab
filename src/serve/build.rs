//! Compiles the protocol's messages, without a protobuf compiler on the machine.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["grpc_service.proto"], ["proto"])?;
    // The text format needs them when the program runs.
    let descriptors = PathBuf::from(std::env::var("OUT_DIR")?).join("descriptors.bin");
    std::fs::write(descriptors, files.encode_to_vec())?;
    let mut config = tonic_prost_build::Config::new();
    config.btree_map(["."]);
    tonic_prost_build::configure().build_client(false).compile_fds_with_config(files, config)?;
    Ok(())
}
