//! Bireme.
