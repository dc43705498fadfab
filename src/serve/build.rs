//! Compiles the protocol's messages, without a protobuf compiler on the machine, and writes where
//! libtorch lies into the tests.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    }
    let files = protox::compile(["grpc_service.proto"], ["proto"])?;
    // The text and JSON forms of a configuration need them when the program runs.
    let descriptors = PathBuf::from(std::env::var("OUT_DIR")?).join("descriptors.bin");
    std::fs::write(descriptors, files.encode_to_vec())?;
    let mut config = tonic_prost_build::Config::new();
    config.btree_map(["."]);
    // Tensors are not copied out of a message.
    config.bytes([".inference.ModelInferRequest.raw_input_contents"]);
    tonic_prost_build::configure().build_client(false).compile_fds_with_config(files, config)?;
    Ok(())
}
