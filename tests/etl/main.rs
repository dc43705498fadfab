//! The promises of `bireme-etl`, one module for each.
//!
//! Tests that need the shared data print `skipped: ...` and pass where it is absent. It is looked
//! for in `../shared` beside the checkout, or in `BIREME_SHARED`.

#![allow(clippy::print_stdout, reason = "a skipped test says so")]

mod bad_input;
mod extend;
mod formats;
mod golden;
mod inputs;
mod order;
mod outputs;
mod parquet_types;
mod real_files;
mod reproducible;
mod schema_file;
mod serving;
mod settings;
mod split;
mod support;
