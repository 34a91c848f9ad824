//! Interrupted lock calls.
//!
//! A process that waits in F_SETLKW and gets a signal, even SIGKILL, goes on waiting until its
//! request is answered; FUSE_INTERRUPT asks for that. It may overtake the request it names, or
//! come when [`Volume::interrupt`] cannot find it yet, because the call is still on its way into the
//! queue or held by someone else. Answering EAGAIN would make the kernel ask again at once and
//! before everything else, so that one worker could turn in circles while the unlock that it
//! needs stays unread. Instead an interrupt is remembered here: one that came early until its request
//! comes, one that was not heeded until the request is answered, and repeated by a thread of its own.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::volume::{Volume, WaitId};

/// How many interrupts of unknown requests are remembered. Only those whose request another
/// worker has just read matter, so at most one per worker; the rest are of other requests.
const EARLY_MAX: usize = 256;
/// The pause before the first repetition, and its limit; it doubles.
const RETRY_MIN: Duration = Duration::from_millis(1);
const RETRY_MAX: Duration = Duration::from_millis(128);

/// The lock calls that wait for an answer.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Request to whether it was interrupted in vain.
    waiting: HashMap<u64, Interrupted>,
    early: VecDeque<u64>,
    ended: bool,
}

/// Whether an interrupt of a waiting call is still to be heeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interrupted {
    /// Yes.
    Yes,
    /// There was none, or it was.
    No,
}

impl Waits {
    /// A call begins that may wait.
    pub fn begin(&self, unique: u64) {
        let mut state = self.state();
        let early = state.early.iter().position(|id| *id == unique);
        let interrupted = match early {
            Some(index) => {
                state.early.remove(index);
                Interrupted::Yes
            }
            None => Interrupted::No,
        };
        state.waiting.insert(unique, interrupted);
    }

    /// The call is answered.
    pub fn end(&self, unique: u64) {
        self.state().waiting.remove(&unique);
    }

    /// The volume has got the call: pass on the interrupt that came meanwhile.
    pub fn begun(&self, unique: u64, volume: &impl Volume) {
        if self.state().waiting.get(&unique) == Some(&Interrupted::Yes) {
            self.interrupt(unique, volume);
        }
    }

    /// The kernel wants request `unique` ended.
    pub fn interrupt(&self, unique: u64, volume: &impl Volume) {
        if !self.is_waiting(unique) || volume.interrupt(WaitId(unique)) {
            return;
        }
        if let Some(interrupted) = self.state().waiting.get_mut(&unique) {
            *interrupted = Interrupted::Yes;
            self.changed.notify_one();
        }
    }

    /// Whether the request waits; if it is unknown, it may still come.
    fn is_waiting(&self, unique: u64) -> bool {
        let mut state = self.state();
        if state.waiting.contains_key(&unique) {
            return true;
        }
        if state.early.len() == EARLY_MAX {
            state.early.pop_front();
        }
        state.early.push_back(unique);
        false
    }

    /// Repeats what was not heeded, until [`Waits::stop`].
    pub fn repeat(self: Arc<Self>, volume: Arc<impl Volume>) {
        let mut pause = RETRY_MIN;
        while let Some(pending) = self.next_pending() {
            if pending.iter().filter(|unique| !volume.interrupt(WaitId(**unique))).count() == 0 {
                pause = RETRY_MIN;
                continue;
            }
            pause = RETRY_MAX.min(pause * 2);
            let state = self.state();
            let _ = self.changed.wait_timeout(state, pause).unwrap();
        }
    }

    /// Waits for interrupts to repeat; none any more when stopped.
    fn next_pending(&self) -> Option<Vec<u64>> {
        let is_pending = |state: &State| {
            state.waiting.values().any(|interrupted| *interrupted == Interrupted::Yes)
        };
        let idle = |state: &mut State| !state.ended && !is_pending(state);
        let state = self.changed.wait_while(self.state(), idle).unwrap();
        let pending = state.waiting.iter().filter(|(_, flag)| **flag == Interrupted::Yes);
        (!state.ended).then(|| pending.map(|(unique, _)| *unique).collect())
    }

    /// Ends [`Waits::repeat`].
    pub fn stop(&self) {
        self.state().ended = true;
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}
