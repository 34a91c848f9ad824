//! The thread that turns queued transactions into LTX files, for all databases of a node.
//!
//! It does not wake once per commit: after a round it rests for [`limits::WRITER_REST`], in which
//! only somebody who waits for durability wakes it. A commit on a quiet node wakes it at once.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::Chain;
use crate::engine::error::chain_text;
use crate::engine::sync::{self, Condvar, JoinHandle, Mutex};
use crate::limits;

/// The writer thread; dropped, it writes what is queued and ends. Durable is then what was synced
/// before, as each database is when it is closed.
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Wakes the writer for a chain.
#[derive(Clone)]
pub struct Waker(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    /// Chains with queued transactions or waiters.
    dirty: Vec<Weak<Chain>>,
    /// Somebody waits for durability.
    urgent: bool,
    mood: Mood,
    stop: bool,
}

/// What the thread is doing, which says whether a commit has to wake it.
#[derive(Default, PartialEq, Eq, Clone, Copy)]
enum Mood {
    #[default]
    Busy,
    /// Rests after a round; only something urgent wakes it.
    Resting,
    /// Waits for the next commit.
    Idle,
}

impl Writer {
    /// Starts the thread.
    pub fn start() -> Writer {
        let shared = Arc::new(Shared { state: Mutex::default(), wake: Condvar::new() });
        let run = shared.clone();
        let thread = sync::spawn("litefs-ltx", move || run.run())
            .expect("a thread can be started at start-up");
        Writer { shared, thread: Some(thread) }
    }

    /// A handle that wakes the thread.
    pub fn waker(&self) -> Waker {
        Waker(self.shared.clone())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Waker {
    /// `chain` has something to write, some time soon. What was queued before this is written: either the writer is told
    /// now, or it has yet to look at what it was told of.
    pub fn queued(&self, chain: &Arc<Chain>) {
        if !chain.is_told.swap(true, Ordering::SeqCst) {
            self.mark(chain, Urgency::Relaxed);
        }
    }

    /// Somebody waits for `chain` to be durable.
    pub fn urgent(&self, chain: &Arc<Chain>) {
        self.mark(chain, Urgency::Urgent);
    }

    fn mark(&self, chain: &Arc<Chain>, urgency: Urgency) {
        let mut state = self.0.state.lock().unwrap();
        state.add(chain);
        let urgent = urgency == Urgency::Urgent;
        state.urgent |= urgent;
        let sleeps = state.mood == Mood::Idle || (urgent && state.mood == Mood::Resting);
        drop(state);
        if sleeps {
            self.0.wake.notify_one();
        }
    }
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum Urgency {
    Relaxed,
    Urgent,
}

impl Shared {
    fn run(&self) {
        loop {
            let (dirty, stop) = self.wait();
            let mut rest = limits::WRITER_REST;
            for chain in dirty.iter().filter_map(Weak::upgrade) {
                if !self.round(&chain, stop) {
                    rest = limits::WRITER_RETRY;
                }
            }
            if stop {
                return;
            }
            self.rest(rest);
        }
    }

    /// Waits until a chain is dirty or the thread is to end.
    fn wait(&self) -> (Vec<Weak<Chain>>, bool) {
        let mut state = self.state.lock().unwrap();
        state.mood = Mood::Idle;
        while state.dirty.is_empty() && !state.stop {
            state = self.wake.wait(state).unwrap();
        }
        state.mood = Mood::Busy;
        state.urgent = false;
        (std::mem::take(&mut state.dirty), state.stop)
    }

    fn rest(&self, duration: Duration) {
        let end = Instant::now() + duration;
        let mut state = self.state.lock().unwrap();
        state.mood = Mood::Resting;
        while !state.urgent && !state.stop {
            let left = end.saturating_duration_since(Instant::now());
            let (woken, waited) = self.wake.wait_timeout(state, left).unwrap();
            state = woken;
            if waited.timed_out() {
                break;
            }
        }
        state.mood = Mood::Busy;
    }

    /// Writes what is queued in one chain; whether that worked.
    fn round(&self, chain: &Arc<Chain>, stop: bool) -> bool {
        chain.is_told.store(false, Ordering::SeqCst);
        let had_failed = chain.has_failed();
        let result = if stop || chain.wants_sync() { chain.sync() } else { chain.flush() };
        let Err(error) = result else {
            if had_failed {
                tracing::info!(db = %chain.db, "ltx files can be written again");
            }
            return true;
        };
        if !had_failed {
            tracing::error!(db = %chain.db, error = chain_text(&error), "write ltx files, writers are refused");
        }
        // Space may come back.
        self.state.lock().unwrap().add(chain);
        false
    }
}

impl State {
    /// Notes that `chain` is dirty, once however often it is said.
    fn add(&mut self, chain: &Arc<Chain>) {
        let known = self.dirty.iter().any(|one| std::ptr::eq(one.as_ptr(), Arc::as_ptr(chain)));
        if !known {
            self.dirty.push(Arc::downgrade(chain));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::chain::tests::{open, transaction};

    /// Commits go on while the disk fails: each of them marks the chain, and so does each attempt.
    #[test]
    fn a_chain_that_cannot_be_written_is_dirty_once() {
        let temp = tempfile::tempdir().unwrap();
        let chain = Arc::new(open(temp.path()));
        drop(temp);
        chain.push(transaction(2, 1));
        let shared = Arc::new(Shared { state: Mutex::default(), wake: Condvar::new() });
        for _ in 0..3 {
            Waker(shared.clone()).queued(&chain);
            assert!(!shared.round(&chain, false), "there is no directory");
        }
        assert_eq!(shared.state.lock().unwrap().dirty.len(), 1);
    }
}
