//! Golden tensors, and helpers for tensors.

use std::collections::HashMap;
use std::path::PathBuf;

use tch::Tensor;

use super::files::root;

/// A file of tests/golden, whose README describes them.
pub fn golden_path(name: &str) -> PathBuf {
    root().join("tests/golden").join(name)
}

/// Named tensors of `tests/golden/NAME.safetensors`.
pub fn golden(name: &str) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(golden_path(&format!("{name}.safetensors")))
        .unwrap()
        .into_iter()
        .collect()
}

/// Largest absolute difference.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    if a.numel() == 0 { 0.0 } else { (a - b).abs().max().double_value(&[]) }
}

/// For each of `n` sessions: no item is excluded from its ranking.
pub fn nothing_hidden(n: i64) -> Tensor {
    Tensor::empty([n, 0], (tch::Kind::Int64, tch::Device::Cpu))
}
