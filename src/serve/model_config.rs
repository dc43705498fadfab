//! A model's configuration: `config.pbtxt` in protobuf's text format, and the JSON that servers show.

use std::sync::LazyLock;

use bireme_etl::tensor::DataType as Type;
use prost::Message;
use prost_reflect::prost_types::FileDescriptorSet;
use prost_reflect::text_format::FormatOptions;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};

use crate::protocol::{DataType, ModelConfig};

/// The file's name in a model's folder.
pub const CONFIG: &str = "config.pbtxt";

static DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

static DESCRIPTOR: LazyLock<MessageDescriptor> = LazyLock::new(|| descriptor(|_| {}));

/// A map is what it is on the wire here, a list of entries, so that a text keeps their order.
static ORDERED: LazyLock<MessageDescriptor> = LazyLock::new(|| {
    descriptor(|files| {
        for message in files.file.iter_mut().flat_map(|file| &mut file.message_type) {
            let nested = message.nested_type.iter_mut().flat_map(|nested| {
                std::iter::once(&mut nested.options)
                    .chain(nested.nested_type.iter_mut().map(|entry| &mut entry.options))
            });
            nested.for_each(|options| *options = None);
        }
    })
});

fn descriptor(change: impl FnOnce(&mut FileDescriptorSet)) -> MessageDescriptor {
    let mut files = FileDescriptorSet::decode(DESCRIPTORS).expect("the build script wrote it");
    change(&mut files);
    let pool = DescriptorPool::from_file_descriptor_set(files).expect("the build script compiled it");
    pool.get_message_by_name("inference.ModelConfig").expect("it is in proto/model_config.proto")
}

/// The protocol's number of a type.
pub fn number(datatype: Type) -> i32 {
    let number = match datatype {
        Type::Bool => DataType::TypeBool,
        Type::Uint8 => DataType::TypeUint8,
        Type::Uint16 => DataType::TypeUint16,
        Type::Uint32 => DataType::TypeUint32,
        Type::Uint64 => DataType::TypeUint64,
        Type::Int8 => DataType::TypeInt8,
        Type::Int16 => DataType::TypeInt16,
        Type::Int32 => DataType::TypeInt32,
        Type::Int64 => DataType::TypeInt64,
        Type::Fp16 => DataType::TypeFp16,
        Type::Bf16 => DataType::TypeBf16,
        Type::Fp32 => DataType::TypeFp32,
        Type::Fp64 => DataType::TypeFp64,
        Type::Bytes => DataType::TypeString,
    };
    number.into()
}

/// The type of a number.
pub fn datatype(of: i32) -> Option<Type> {
    Type::ALL.into_iter().find(|&datatype| number(datatype) == of)
}

fn dynamic(config: &ModelConfig, descriptor: &MessageDescriptor) -> DynamicMessage {
    let message = DynamicMessage::decode(descriptor.clone(), config.encode_to_vec().as_slice());
    message.expect("both are of the same descriptor")
}

/// The configuration as JSON, with the names of the text.
pub fn to_json(config: &ModelConfig) -> serde_json::Value {
    let options = SerializeOptions::new().use_proto_field_name(true).stringify_64_bit_integers(false);
    let message = dynamic(config, &DESCRIPTOR);
    let json =
        message.serialize_with_options(serde_json::value::Serializer, &options.skip_default_fields(false));
    json.expect("names and numbers only")
}

/// The configuration as text.
pub fn to_text(config: &ModelConfig) -> String {
    dynamic(config, &ORDERED).to_text_format_with_options(&FormatOptions::new().pretty(true)) + "\n"
}

/// Reads a configuration; fields that this program does not know are refused.
///
/// # Errors
/// Says what is wrong where.
pub fn from_text(text: &str) -> Result<ModelConfig, String> {
    let message =
        DynamicMessage::parse_text_format(ORDERED.clone(), text).map_err(|error| error.to_string())?;
    ModelConfig::decode(message.encode_to_vec().as_slice()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::model_config::SchedulingChoice;
    use crate::protocol::model_ensembling::Step;
    use crate::protocol::{ModelEnsembling, ModelInput};

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
        let json = to_json(&config);
        let step = &json["ensemble_scheduling"]["step"][0];
        assert_eq!((&step["input_map"]["b"], &step["model_version"]), (&"\"b\" é".into(), &(-1).into()));
        assert_eq!(json["input"][0]["data_type"], "TYPE_STRING");
        assert!(from_text("nmae: \"n\"").unwrap_err().contains("nmae"));
    }
}
