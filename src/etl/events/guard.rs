//! Turns panics of libraries that decode files into errors.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::path::Path;
use std::sync::Once;

use bireme_base::console::panic_text;

use crate::error::Error;

thread_local! {
    /// Whether this thread runs guarded code.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `decode` on this thread and turns a panic into an error that names the file. The panic is
/// not printed; its message is in the error.
pub(super) fn guarded<T>(
    path: &Path,
    decode: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let outside = take_hook();
        set_hook(Box::new(move |panic| {
            if !INSIDE.get() {
                outside(panic);
            }
        }));
    });
    let was_inside = INSIDE.replace(true);
    // All that `decode` borrows is dropped with the error.
    let decoded = catch_unwind(AssertUnwindSafe(decode));
    INSIDE.set(was_inside);
    decoded.unwrap_or_else(|panic| {
        let text = panic_text(&*panic).unwrap_or("no reason given");
        Err(Error::unreadable(path)(format!("its reader failed: {text}").into()))
    })
}

#[cfg(test)]
mod tests {
    use bireme_base::user_error::UserError;

    use super::*;

    #[test]
    fn a_panic_becomes_an_error_of_the_file() {
        let error =
            guarded(Path::new("x.parquet"), || -> Result<(), Error> { panic!("broken page") });
        let error = error.expect_err("a panic");
        assert_eq!(error.exit_code(), 2);
        let text = bireme_base::message::chain(&error);
        assert_eq!(text, "cannot read the events `x.parquet`: its reader failed: broken page");
        assert!(!INSIDE.get());
    }
}
