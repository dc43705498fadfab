//! Bireme.

pub mod collective;
pub mod device;
