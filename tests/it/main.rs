//! Integration tests.

#![allow(clippy::print_stdout, reason = "a skipped test says so")]

mod baselines;
mod bundle;
mod collective;
mod console;
mod cuda;
mod device;
mod export;
mod faults;

mod fixtures;
mod fuzz;
mod golden;
mod models;
mod outputs;
mod mpirun;
mod pipeline;
mod ranking;
mod recommend;
mod refused;
mod report;
mod resume;
mod scaling;
mod serve;
mod serving;
mod sharded;
mod slurm;
mod train;
