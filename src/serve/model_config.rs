//! A model's configuration: `config.pbtxt` in protobuf's text format, and the JSON that servers
//! show.

use std::sync::LazyLock;

use bireme_protocol::text::{self, Ignored, Parsed};
use prost::Message;
use prost_reflect::prost_types::FileDescriptorSet;
use prost_reflect::text_format::FormatOptions;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};

use crate::protocol::ModelConfig;
use crate::protocol::model_config::SchedulingChoice;

/// The file's name in a model's folder.
pub const CONFIG: &str = "config.pbtxt";

static DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

static DESCRIPTOR: LazyLock<MessageDescriptor> = LazyLock::new(|| descriptor(|_| {}));

/// Maps as lists of entries, as on the wire, so that a text keeps their order.
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
    let pool =
        DescriptorPool::from_file_descriptor_set(files).expect("the build script compiled it");
    pool.get_message_by_name("inference.ModelConfig").expect("it is in proto/model_config.proto")
}

fn dynamic(config: &ModelConfig, descriptor: &MessageDescriptor) -> DynamicMessage {
    let message = DynamicMessage::decode(descriptor.clone(), config.encode_to_vec().as_slice());
    message.expect("both are of the same descriptor")
}

/// The configuration as JSON, with the field names of `config.pbtxt`.
pub fn to_json(config: &ModelConfig) -> serde_json::Value {
    let options =
        SerializeOptions::new().use_proto_field_name(true).stringify_64_bit_integers(false);
    let message = dynamic(config, &DESCRIPTOR);
    let json = message
        .serialize_with_options(serde_json::value::Serializer, &options.skip_default_fields(false));
    json.expect("names and numbers only")
}

pub fn to_text(config: &ModelConfig) -> String {
    dynamic(config, &ORDERED).to_text_format_with_options(&FormatOptions::new().pretty(true)) + "\n"
}

#[derive(Clone, Debug, PartialEq)]
pub struct ParsedConfig {
    /// The fields that this server implements.
    pub config: ModelConfig,
    /// The other fields.
    pub ignored: Vec<Ignored>,
}

/// Reads a configuration. Fields that this server does not implement are ignored, unless they
/// change results.
///
/// # Errors
/// Text that cannot be parsed, with the place, or a field that this server would need.
pub fn from_text(text: &str) -> Result<ParsedConfig, String> {
    let Parsed { message, ignored, .. } =
        text::parse(&ORDERED, text).map_err(|error| error.to_string())?;
    let config = ModelConfig::decode(message.encode_to_vec().as_slice())
        .map_err(|error| error.to_string())?;
    match unsupported(&config) {
        Some(field) => {
            Err(format!("this server does not implement `{field}`, on which results depend"))
        }
        None => Ok(ParsedConfig { config, ignored }),
    }
}

/// The first field that changes results and is not implemented.
fn unsupported(config: &ModelConfig) -> Option<&'static str> {
    let is_in_sequences =
        matches!(config.scheduling_choice, Some(SchedulingChoice::SequenceBatching(_)));
    let is_decoupled =
        config.model_transaction_policy.as_ref().is_some_and(|policy| policy.decoupled);
    let fields = [
        ("sequence_batching", is_in_sequences),
        ("model_transaction_policy.decoupled", is_decoupled),
        ("input.reshape", config.input.iter().any(|input| input.reshape.is_some())),
        ("input.allow_ragged_batch", config.input.iter().any(|input| input.allow_ragged_batch)),
        ("output.reshape", config.output.iter().any(|output| output.reshape.is_some())),
        ("batch_input", !config.batch_input.is_empty()),
        ("batch_output", !config.batch_output.is_empty()),
    ];
    fields.into_iter().find_map(|(field, is_set)| is_set.then_some(field))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bireme_protocol::DataType;

    use crate::protocol::model_ensembling::Step;
    use crate::protocol::{DataType as MessageDataType, ModelEnsembling, ModelInput};

    #[test]
    fn types_have_the_numbers_of_the_messages() {
        for datatype in DataType::all() {
            let number = MessageDataType::try_from(datatype.number()).unwrap();
            let name = number.as_str_name().replace("STRING", "BYTES");
            assert_eq!(name, format!("TYPE_{datatype}"));
        }
    }

    #[test]
    fn a_configuration_survives_its_text() {
        let names = ["b", "a", "d", "c", "f", "e"];
        let map = || names.map(|name| (name.to_owned(), format!("\"{name}\" é"))).into();
        let step =
            Step { model_name: "m".into(), model_version: -1, input_map: map(), output_map: map() };
        let config = ModelConfig {
            name: "n".into(),
            input: vec![ModelInput {
                name: "x".into(),
                data_type: DataType::Bytes.number(),
                dims: vec![-1, 1],
                optional: true,
                ..ModelInput::default()
            }],
            scheduling_choice: Some(SchedulingChoice::EnsembleScheduling(ModelEnsembling {
                step: vec![step],
            })),
            ..ModelConfig::default()
        };
        let text = to_text(&config);
        assert_eq!(
            from_text(&text).unwrap(),
            ParsedConfig { config: config.clone(), ignored: Vec::new() }
        );
        assert_eq!(to_text(&config), text, "the same bytes each time");
        let json = to_json(&config);
        let step = &json["ensemble_scheduling"]["step"][0];
        assert_eq!(
            (&step["input_map"]["b"], &step["model_version"]),
            (&"\"b\" é".into(), &(-1).into())
        );
        assert_eq!(json["input"][0]["data_type"], "TYPE_STRING");
    }

    #[test]
    fn configurations_in_the_style_of_triton_are_read() {
        let text = r#"
            name: "n"
            input [ { name: "x" data_type: TYPE_INT64 dims: [ -1, 1 ] format: FORMAT_NONE } ]
            output [
              { name: "y", data_type: TYPE_FP32, dims: [ 1 ], label_filename: "labels.txt" }
            ]
            instance_group [
              { count: 3 kind: KIND_CPU rate_limiter { resources [ { name: "R" count: 4 } ] } }
            ]
            optimization {
              execution_accelerators { gpu_execution_accelerator: [ { name: "tensorrt" } ] }
            }
            model_warmup [
              { name: "w" batch_size: 1 inputs { key: "x" value: { zero_data: true } } }
            ]
            response_cache { enable: true }
            dynamic_batching { priority_levels: 2, preferred_batch_size: [ 4, 8 ] }
            model_transaction_policy { decoupled: false }
            version_policy: { all { } }
            parameters: { key: "INFERENCE_MODE" value: { string_value: 'true' } }"#;
        let ParsedConfig { config, ignored } = from_text(text).unwrap();
        assert_eq!(
            (config.instance_group[0].count, config.input[0].dims.as_slice()),
            (3, &[-1, 1][..])
        );
        let ignored: Vec<&str> = ignored.iter().map(|field| field.path.as_str()).collect();
        let expected = [
            "input.format",
            "output.label_filename",
            "instance_group.rate_limiter",
            "optimization",
            "model_warmup",
            "response_cache",
            "dynamic_batching.priority_levels",
        ];
        assert_eq!(ignored, expected);
    }

    #[test]
    fn what_changes_results_is_refused() {
        for (text, field) in [
            ("sequence_batching { max_sequence_idle_microseconds: 5 }", "sequence_batching"),
            ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled"),
            ("input [ { name: 'x' reshape: { shape: [ ] } } ]", "input.reshape"),
            ("output { reshape { shape: [ 1 ] } }", "output.reshape"),
            ("batch_input [ { kind: BATCH_ITEM_SHAPE } ]", "batch_input"),
        ] {
            let problem = from_text(text).unwrap_err();
            assert!(problem.contains(&format!("`{field}`")), "{problem}");
        }
        let problem = from_text("name: 'n'\ninput [ { name 'x' } ]").unwrap_err();
        assert!(problem.starts_with("line 2, column 16: expected ':'"), "{problem}");
    }
}
