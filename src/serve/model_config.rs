//! `config.pbtxt`: a model's configuration in protobuf's text format.

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::text_format::FormatOptions;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};

use crate::protocol::ModelConfig;

/// The file's name in a model's folder.
pub const CONFIG: &str = "config.pbtxt";

static DESCRIPTOR: LazyLock<MessageDescriptor> = LazyLock::new(|| {
    let pool =
        DescriptorPool::decode(include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin")).as_slice());
    let message = pool.ok().and_then(|pool| pool.get_message_by_name("inference.ModelConfig"));
    message.expect("the build script compiled it")
});

/// The configuration as text.
pub fn to_text(config: &ModelConfig) -> String {
    let message = DynamicMessage::decode(DESCRIPTOR.clone(), config.encode_to_vec().as_slice());
    let message = message.expect("both are of the same descriptor");
    message.to_text_format_with_options(&FormatOptions::new().pretty(true)) + "\n"
}

/// Reads a configuration; fields that this program does not know are refused.
///
/// # Errors
/// Says what is wrong where.
pub fn from_text(text: &str) -> Result<ModelConfig, String> {
    let message =
        DynamicMessage::parse_text_format(DESCRIPTOR.clone(), text).map_err(|error| error.to_string())?;
    ModelConfig::decode(message.encode_to_vec().as_slice()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::model_config::SchedulingChoice;
    use crate::protocol::model_ensembling::Step;
    use crate::protocol::{DataType, ModelEnsembling, ModelInput};

    #[test]
    fn a_configuration_survives_its_text() {
        let names = ["b", "a", "d", "c", "f", "e"];
        let map = || names.map(|name| (name.to_owned(), format!("\"{name}\" é"))).into();
        let step = Step { model_name: "m".into(), model_version: -1, input_map: map(), output_map: map() };
        let config = ModelConfig {
            name: "n".into(),
            input: vec![ModelInput {
                name: "x".into(),
                data_type: DataType::TypeString.into(),
                dims: vec![-1, 1],
                optional: true,
            }],
            scheduling_choice: Some(SchedulingChoice::EnsembleScheduling(ModelEnsembling {
                step: vec![step],
            })),
            ..ModelConfig::default()
        };
        let text = to_text(&config);
        assert_eq!(from_text(&text).unwrap(), config);
        assert_eq!(to_text(&config), text, "the same bytes each time");
        assert!(from_text("nmae: \"n\"").unwrap_err().contains("nmae"));
    }
}
