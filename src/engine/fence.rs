//! Until when this node may commit. A lease that is kept elsewhere allows it for a short time after
//! each confirmation, so that a primary that is cut off or suspended stops by itself before another
//! one can begin.
//!
//! Who commits asks the clock, at the lock request and again at the commit: no timer has to fire, and
//! a process that was suspended finds the fence closed at its first request. A commit that could not
//! be refused any more waits here until the lease is confirmed again or lost.
//!
//! Invariant: what waits is answered once; nothing waits while the fence is open or the node is not
//! the primary.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::boot_time::BootTime;

/// What became of the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// The node was the primary all the time.
    Confirmed,
    /// Another node may have been the primary.
    Lost,
}

/// Something that waits for the lease to be confirmed or lost.
type Waiting = Box<dyn FnOnce(Settled) + Send>;

/// The moment up to which this node may commit.
pub struct Fence {
    /// As [`BootTime::nanos`]; beyond every moment where no lease ends.
    until: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The node is the primary.
    leads: bool,
    waiting: Vec<Waiting>,
}

impl Default for Fence {
    fn default() -> Fence {
        Fence { until: AtomicU64::new(BootTime::NEVER.nanos()), state: Mutex::default() }
    }
}

impl Fence {
    /// Whether this moment is before the end.
    pub fn is_open(&self) -> bool {
        let until = BootTime::from_nanos(self.until.load(Ordering::SeqCst));
        until == BootTime::NEVER || BootTime::now() < until
    }

    /// The lease was confirmed: commits are allowed until then.
    pub fn confirm(&self, until: BootTime) {
        self.until.store(until.nanos(), Ordering::SeqCst);
        if self.is_open() {
            let waiting = std::mem::take(&mut self.state.lock().unwrap().waiting);
            answer(waiting, Settled::Confirmed);
        }
    }

    /// The node is the primary, or is not any more.
    pub fn set_leads(&self, leads: bool) {
        let waiting = {
            let mut state = self.state.lock().unwrap();
            state.leads = leads;
            if leads { Vec::new() } else { std::mem::take(&mut state.waiting) }
        };
        answer(waiting, Settled::Lost);
    }

    /// Calls `done` as soon as it is known whether the lease was kept until this moment.
    pub fn when_settled(&self, done: impl FnOnce(Settled) + Send + 'static) {
        let mut state = self.state.lock().unwrap();
        let settled = match (state.leads, self.is_open()) {
            (false, _) => Settled::Lost,
            (true, true) => Settled::Confirmed,
            (true, false) => return state.waiting.push(Box::new(done)),
        };
        drop(state);
        done(settled);
    }
}

fn answer(waiting: Vec<Waiting>, settled: Settled) {
    for done in waiting {
        done(settled);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    fn soon() -> BootTime {
        BootTime::now().after(Duration::from_secs(3600))
    }

    /// What was answered so far.
    fn ask(fence: &Fence) -> Arc<Mutex<Vec<Settled>>> {
        let answers = Arc::new(Mutex::new(Vec::new()));
        let into = answers.clone();
        fence.when_settled(move |settled| into.lock().unwrap().push(settled));
        answers
    }

    #[test]
    fn a_lease_without_end_is_always_open() {
        let fence = Fence::default();
        fence.set_leads(true);
        assert!(fence.is_open());
        assert_eq!(*ask(&fence).lock().unwrap(), [Settled::Confirmed]);
    }

    #[test]
    fn what_waits_is_answered_by_the_confirmation() {
        let fence = Fence::default();
        fence.set_leads(true);
        fence.confirm(BootTime::now());
        assert!(!fence.is_open());
        let answers = ask(&fence);
        fence.confirm(BootTime::now());
        assert!(answers.lock().unwrap().is_empty(), "a late confirmation allows nothing");
        fence.confirm(soon());
        fence.set_leads(false);
        assert_eq!(*answers.lock().unwrap(), [Settled::Confirmed]);
    }

    #[test]
    fn what_waits_is_answered_by_the_loss() {
        let fence = Fence::default();
        fence.set_leads(true);
        fence.confirm(BootTime::START);
        let answers = ask(&fence);
        fence.set_leads(false);
        fence.confirm(soon());
        assert_eq!(*answers.lock().unwrap(), [Settled::Lost]);
        assert_eq!(*ask(&fence).lock().unwrap(), [Settled::Lost], "nobody leads");
    }
}
