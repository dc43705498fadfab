//! Integration tests, one module per promise; `support` holds the code that they share.

#![allow(clippy::print_stdout, reason = "a skipped test says so")]

mod architecture;
mod baselines;
mod bundle;
mod collective;
mod console;
mod cuda;
mod cuda_kernels;
mod device;
mod content;
mod evidence;
mod export;
mod fake_cuda;
mod faults;
mod fuzz;
mod golden;
mod models;
mod mpirun;
mod outputs;
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
mod support;
mod train;
mod tutorial;
