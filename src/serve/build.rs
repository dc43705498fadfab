//! Compiles the protocol's messages, without a protobuf compiler on the machine.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["grpc_service.proto"], ["proto"])?;
    // The text format needs them when the program runs. There a map is what it is on the wire, a list of entries, so that
    // a text keeps their order.
    let mut described = files.clone();
    for message in described.file.iter_mut().flat_map(|file| &mut file.message_type) {
        let nested = message.nested_type.iter_mut();
        let entries = nested.flat_map(|nested| {
            std::iter::once(&mut nested.options)
                .chain(nested.nested_type.iter_mut().map(|entry| &mut entry.options))
        });
        entries.for_each(|options| *options = None);
    }
    let descriptors = PathBuf::from(std::env::var("OUT_DIR")?).join("descriptors.bin");
    std::fs::write(descriptors, described.encode_to_vec())?;
    let mut config = tonic_prost_build::Config::new();
    config.btree_map(["."]);
    tonic_prost_build::configure().build_client(false).compile_fds_with_config(files, config)?;
    Ok(())
}
