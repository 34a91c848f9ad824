//! Which requests are not answered for long. A request that hangs is a process that hangs; who looks for
//! the reason needs to know which it is.
//!
//! A request takes a place in a table of fixed size when it begins and leaves it when it is answered:
//! a few writes to memory that no other request uses, no clock, no allocation. A thread looks at the table once a second,
//! and each look is a tick of the only clock there is. If a place is taken the request is simply not
//! watched. Lock calls that wait because their client wants to wait are not watched while they do.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::abi::InHeader;

/// Requests that are watched at a time, at the most; far above what applications have under way.
const PLACES: usize = 512;
/// Numbers of requests are a multiple of this.
const UNIQUE_STEP: u64 = 2;
/// The time between two looks.
pub(crate) const TICK: Duration = Duration::from_secs(1);
/// Ticks after which a request is reported, and then each time that its age has doubled.
pub(crate) const PATIENCE: u32 = 5;

/// A request that is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stuck {
    /// What it asks for, by the kernel's number.
    pub opcode: u32,
    /// The node that it names.
    pub node: u64,
    /// The process that waits.
    pub pid: u32,
    /// How old it is.
    pub ticks: u32,
}

/// The table.
#[derive(Debug)]
pub(crate) struct Watch {
    places: Box<[Arc<Place>]>,
    /// Never zero.
    tick: AtomicU32,
    ended: Mutex<bool>,
    changed: Condvar,
}

/// One request, or none. A cache line of its own: requests of two CPUs have nothing to share.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Place {
    /// When it began; zero: nobody is here.
    since: AtomicU32,
    opcode: AtomicU32,
    pid: AtomicU32,
    node: AtomicU64,
}

/// A place that is taken; dropped, it is free again.
#[derive(Debug)]
pub(crate) struct Watched(Arc<Place>);

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.since.store(0, Ordering::Release);
    }
}

impl Watch {
    /// An empty table.
    pub fn new() -> Watch {
        Watch {
            places: (0..PLACES).map(|_| Arc::default()).collect(),
            tick: AtomicU32::new(1),
            ended: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    /// A request begins; none if its place is taken.
    pub fn begin(&self, header: &InHeader) -> Option<Watched> {
        let at = (header.unique / UNIQUE_STEP) as usize % PLACES;
        let place = &self.places[at];
        let now = self.tick.load(Ordering::Relaxed);
        place.since.compare_exchange(0, now, Ordering::Acquire, Ordering::Relaxed).ok()?;
        place.opcode.store(header.opcode, Ordering::Relaxed);
        place.pid.store(header.pid, Ordering::Relaxed);
        place.node.store(header.nodeid, Ordering::Relaxed);
        Some(Watched(place.clone()))
    }

    /// Time goes on by one tick: who is to be reported now.
    pub fn look(&self) -> Vec<Stuck> {
        let now = self.tick.load(Ordering::Relaxed).wrapping_add(1).max(1);
        self.tick.store(now, Ordering::Relaxed);
        let stuck = self.places.iter().filter_map(|place| {
            let since = place.since.load(Ordering::Acquire);
            let ticks = now.wrapping_sub(since);
            let is_due = ticks.is_multiple_of(PATIENCE) && (ticks / PATIENCE).is_power_of_two();
            (since != 0 && is_due).then(|| Stuck {
                opcode: place.opcode.load(Ordering::Relaxed),
                node: place.node.load(Ordering::Relaxed),
                pid: place.pid.load(Ordering::Relaxed),
                ticks,
            })
        });
        stuck.collect()
    }

    /// Looks once a tick until [`Watch::stop`].
    pub fn run(&self, report: impl Fn(Stuck)) {
        let mut ended = self.ended.lock().unwrap();
        while !*ended {
            let (guard, waited) = self.changed.wait_timeout(ended, TICK).unwrap();
            drop(guard);
            if waited.timed_out() {
                self.look().into_iter().for_each(&report);
            }
            ended = self.ended.lock().unwrap();
        }
    }

    /// Ends [`Watch::run`].
    pub fn stop(&self) {
        *self.ended.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros as _;

    use super::*;

    fn header(unique: u64) -> InHeader {
        InHeader { unique, opcode: 32, nodeid: 7, pid: 99, ..InHeader::new_zeroed() }
    }

    #[test]
    fn a_request_is_reported_when_it_is_old_and_again_when_twice_as_old() {
        let watch = Watch::new();
        let watched = watch.begin(&header(2)).unwrap();
        let quick = watch.begin(&header(4)).unwrap();
        drop(quick);
        let reported: Vec<u32> =
            (0..21).flat_map(|_| watch.look()).map(|stuck| stuck.ticks).collect();
        assert_eq!(reported, [5, 10, 20]);
        drop(watched);
        assert!((0..30).all(|_| watch.look().is_empty()));
    }

    #[test]
    fn a_report_says_which_request_it_is() {
        let watch = Watch::new();
        let _watched = watch.begin(&header(2)).unwrap();
        let reported: Vec<Stuck> = (0..5).flat_map(|_| watch.look()).collect();
        assert_eq!(reported, [Stuck { opcode: 32, node: 7, pid: 99, ticks: 5 }]);
    }

    #[test]
    fn a_place_that_is_taken_is_left_alone() {
        let watch = Watch::new();
        let first = watch.begin(&header(2)).unwrap();
        assert!(watch.begin(&header(2 + UNIQUE_STEP * PLACES as u64)).is_none());
        drop(first);
        assert!(watch.begin(&header(2)).is_some());
    }
}
