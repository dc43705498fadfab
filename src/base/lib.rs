//! What every command shares, without polars and libtorch.
//!
//! | module | purpose |
//! | --- | --- |
//! | [`digest`] | digests of files |
//! | [`console`] | output whose loss never ends work |
//! | [`message`] | text from files, requests and libraries in messages of one line |
//! | [`lock`] | one process at a time writes to an output |
//! | [`signal`] | whether a signal is ignored |
//! | [`user_error`] | the exit code and the hint of an error |
//! | [`output`] | files and folders that appear under their name when they are complete |

pub mod console;
pub mod digest;
pub mod lock;
pub mod message;
pub mod output;
pub mod signal;
pub mod user_error;
