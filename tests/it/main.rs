//! Integration tests.

#![allow(clippy::print_stdout, reason = "a skipped test says so")]

mod baselines;
mod collective;
mod device;
mod export;
mod triton;
mod fixtures;
mod golden;
mod models;
mod mpirun;
mod pipeline;
mod ranking;
mod refused;
mod report;
mod train;
