//! What every command shares, without polars and libtorch.
//!
//! | module | purpose |
//! | --- | --- |
//! | [`message`] | text from files, requests and libraries in messages of one line |
//! | [`lock`] | one process at a time writes to an output |

pub mod lock;
pub mod message;
