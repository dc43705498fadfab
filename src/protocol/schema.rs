//! The messages of a `tensorflow_metadata` schema.

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, MessageDescriptor};

static MESSAGES: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/schema.bin"));
    DescriptorPool::decode(bytes.as_ref()).expect("the build script compiled it")
});

/// The message that a schema file holds.
pub fn descriptor() -> MessageDescriptor {
    let schema = MESSAGES.get_message_by_name("tensorflow.metadata.v0.Schema");
    schema.expect("it is in proto/schema.proto")
}

/// Fields of `tensorflow_metadata` that say nothing about the values a model reads.
pub const UNREAD: &[&str] = &[
    "annotation",
    "dataset_constraints",
    "default_environment",
    "feature.annotation.comment",
    "feature.annotation.extra_metadata",
    "feature.bool_domain",
    "feature.deprecated",
    "feature.distribution_constraints",
    "feature.domain",
    "feature.drift_comparator",
    "feature.group_presence",
    "feature.image_domain",
    "feature.in_environment",
    "feature.lifecycle_stage",
    "feature.mid_domain",
    "feature.natural_language_domain",
    "feature.not_in_environment",
    "feature.presence",
    "feature.sequence_metadata",
    "feature.shape",
    "feature.skew_comparator",
    "feature.string_domain",
    "feature.struct_domain",
    "feature.time_domain",
    "feature.time_of_day_domain",
    "feature.unique_constraints",
    "feature.url_domain",
    "feature.validation_derived_source",
    "feature.value_counts",
    "feature.float_domain.disallow_inf",
    "feature.float_domain.disallow_nan",
    "feature.float_domain.is_categorical",
    "feature.float_domain.is_embedding",
    "feature.float_domain.embedding_type",
    "feature.float_domain.embedding_dim",
    "float_domain",
    "int_domain",
    "represent_variable_length_as_ragged",
    "sparse_feature",
    "string_domain",
    "tensor_representation_group",
    "weighted_feature",
];
