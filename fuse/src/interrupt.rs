//! Interrupted lock calls.
//!
//! A process that waits in F_SETLKW and gets a signal, even SIGKILL, goes on waiting until its
//! request is answered; FUSE_INTERRUPT asks for that. It may overtake the request it names, or
//! come when [`Volume::interrupt`] cannot find it yet, because the call is still on its way into the
//! queue or held by someone else. Answering EAGAIN would make the kernel ask again at once and
//! before everything else, so that one worker could turn in circles while the unlock that it
//! needs stays unread. Instead an interrupt is remembered here: one that came early until its request
//! comes, one that was not heeded until the request is answered, and repeated by a thread of its own.
//!
//! Over io_uring an interrupt can get lost: up to Linux 6.18 at least, the kernel sends none for a
//! request that was interrupted before the ring's thread had taken it, and then nothing ends the
//! wait. But it shows: an undisturbed client sleeps interruptibly (`S` in `/proc/TID/stat`), and
//! from there an interrupt is sent; a client once interrupted sleeps uninterruptibly (`D`). So the
//! client of a waiting call that came over a ring is looked at until it is in one of the two.

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
    /// Request to what is to be done about it.
    waiting: HashMap<u64, Concern>,
    early: VecDeque<u64>,
    ended: bool,
}

/// What is to be done about a waiting call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Concern {
    /// Nothing.
    None,
    /// It was interrupted, and the volume has to hear of it again.
    Interrupted,
    /// Whether it was interrupted is to be seen from its thread.
    Unknown(Client),
}

/// The thread that waits in a call, by its number in the mount's process namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Client(pub u32);

impl Waits {
    /// A call begins that may wait. With `unsure`, its interrupt may get lost.
    pub fn begin(&self, unique: u64, unsure: Option<Client>) {
        let mut state = self.state();
        let early = state.early.iter().position(|id| *id == unique);
        let concern = match (early, unsure) {
            (Some(index), _) => {
                state.early.remove(index);
                Concern::Interrupted
            }
            (None, Some(client)) => Concern::Unknown(client),
            (None, None) => Concern::None,
        };
        state.waiting.insert(unique, concern);
    }

    /// The call is answered.
    pub fn end(&self, unique: u64) {
        self.state().waiting.remove(&unique);
    }

    /// The volume has got the call: see to what happened meanwhile.
    pub fn begun(&self, unique: u64, volume: &impl Volume) {
        let concern = self.state().waiting.get(&unique).copied();
        match concern {
            None | Some(Concern::None) => {}
            Some(Concern::Interrupted) => self.interrupt(unique, volume),
            Some(Concern::Unknown(_)) => self.changed.notify_one(),
        }
    }

    /// The kernel wants request `unique` ended.
    pub fn interrupt(&self, unique: u64, volume: &impl Volume) {
        if self.is_waiting(unique) && !volume.interrupt(WaitId(unique)) {
            self.concern(unique, Concern::Interrupted);
        }
    }

    /// Has the repeater care for a call that is not answered.
    fn concern(&self, unique: u64, concern: Concern) {
        if let Some(before) = self.state().waiting.get_mut(&unique) {
            *before = concern;
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

    /// Repeats interrupts that were not heeded and looks at clients, until [`Waits::stop`].
    pub fn repeat(self: Arc<Self>, volume: Arc<impl Volume>) {
        let mut pause = RETRY_MIN;
        while let Some(concerns) = self.next_concerns() {
            let open =
                |(unique, concern): &(u64, Concern)| !self.settle(*unique, *concern, &*volume);
            if concerns.iter().filter(|concern| open(concern)).count() == 0 {
                pause = RETRY_MIN;
                continue;
            }
            let state = self.state();
            drop(self.changed.wait_timeout(state, pause).unwrap());
            pause = RETRY_MAX.min(pause * 2);
        }
    }

    /// Does what is to be done about a call; whether it is done.
    fn settle(&self, unique: u64, concern: Concern, volume: &impl Volume) -> bool {
        let interrupted = match concern {
            Concern::None => return true,
            Concern::Interrupted => true,
            Concern::Unknown(client) => match client.was_interrupted() {
                Some(interrupted) => interrupted,
                None => return false,
            },
        };
        if interrupted {
            return volume.interrupt(WaitId(unique));
        }
        self.concern(unique, Concern::None);
        true
    }

    /// Waits for calls to care for; none any more when stopped.
    fn next_concerns(&self) -> Option<Vec<(u64, Concern)>> {
        let is_open = |concern: &Concern| *concern != Concern::None;
        let idle = |state: &mut State| !state.ended && !state.waiting.values().any(is_open);
        let state = self.changed.wait_while(self.state(), idle).unwrap();
        let concerns = state.waiting.iter().filter(|(_, concern)| is_open(concern));
        let concerns = concerns.map(|(unique, concern)| (*unique, *concern)).collect();
        (!state.ended).then_some(concerns)
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

impl Client {
    /// Whether it got a signal while it waited; unknown while it is on its way.
    fn was_interrupted(self) -> Option<bool> {
        match std::fs::read(format!("/proc/{}/stat", self.0)) {
            Ok(stat) => match state_of(&stat)? {
                b'S' => Some(false),
                b'D' => Some(true),
                _ => None,
            },
            // Not to be seen from here: nothing can be done for it.
            Err(_) => Some(false),
        }
    }
}

/// The state in a line of `/proc/PID/stat`: behind the name, which may hold anything, in brackets.
fn state_of(stat: &[u8]) -> Option<u8> {
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    stat.get(name_end + 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_stands_behind_the_name() {
        assert_eq!(state_of(b"7 (a) S) D 1 7 7 0"), Some(b'D'));
        assert_eq!(state_of(b"7 (sh"), None);
        assert_eq!(state_of(b"7 (sh)"), None);
    }
}
