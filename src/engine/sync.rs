//! The locks and threads of the hand-over from a commit to its LTX file: those of the standard library.
//!
//! In unit tests they are those of a scheduler that plays other orders of the threads with each run
//! (`model.rs`), where a thread of that scheduler makes them.

#[cfg(not(test))]
pub use std::sync::{Condvar, Mutex};

#[cfg(not(test))]
pub use self::real::{JoinHandle, spawn};

#[cfg(test)]
pub use self::model::{Condvar, JoinHandle, Mutex, spawn};

#[cfg(test)]
pub mod model;

#[cfg(not(test))]
mod real {
    pub use std::thread::JoinHandle;

    /// Starts a thread of that name.
    pub fn spawn(
        name: &str,
        run: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(name.to_owned()).spawn(run)
    }
}
