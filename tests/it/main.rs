//! Integration tests.

#![allow(clippy::print_stdout, reason = "a skipped test says so")]

mod collective;
mod device;
mod fixtures;
mod golden;
mod mpirun;
mod pipeline;
mod ranking;
mod refused;
mod report;
mod train;
