//! What `bireme-etl` promises, a module for each promise.
//!
//! Tests that need the shared data say `skipped: ...` and pass where it is absent: it lies in `../shared` beside
//! the checkout, or where `BIREME_SHARED` says.

#![allow(clippy::print_stdout, reason = "a skipped test says so")]

mod bad_input;
mod extend;
mod formats;
mod golden;
mod parquet_types;
mod real_files;
mod reproducible;
mod schema_file;
mod serving;
mod settings;
mod split;
mod support;
