//! Threads that are started from within a call that a FUSE worker may make.

use std::io;
use std::sync::OnceLock;
use std::thread::JoinHandle;

/// What each of them does first.
static BEGIN: OnceLock<fn()> = OnceLock::new();

/// From now on each thread of [`spawn`] begins with a call of `begin`. Only the first call counts.
pub fn begin_with(begin: fn()) {
    let _ = BEGIN.set(begin);
}

/// Starts a thread. By itself it would begin with the CPU and the priority of the worker that starts it, which are not
/// right for others' work.
///
/// # Errors
/// There is no thread to be had.
pub fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let run = move || {
        if let Some(begin) = BEGIN.get() {
            begin();
        }
        run()
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run)
}
