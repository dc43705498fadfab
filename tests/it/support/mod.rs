//! Code that several test modules share, by subject.
//!
//! A test module imports from here and never from another test module, which `architecture` checks.

pub mod compare;
pub mod configs;
pub mod event_shop;
pub mod fake_cuda;
pub mod files;
pub mod http;
pub mod mpirun;
pub mod process;
pub mod requests;
pub mod requirements;
pub mod server;
pub mod one_day;
pub mod session_data;
pub mod session_shop;
pub mod source;
pub mod tensors;
