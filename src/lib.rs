//! Bireme.

pub mod synth;
