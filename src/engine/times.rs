//! How long something took, counted in buckets for the metrics.
//!
//! Each bound is four times the one before, from 16 us to 4 s: enough to tell a commit that waited for
//! nothing from one that waited for a disk. Invariant: noting a duration is two atomic additions; it
//! never locks, and it allocates nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The bound of the first bucket, as a power of two of microseconds.
const FIRST_BITS: u32 = 4;

/// Buckets with a bound; one more has no bound.
const BOUNDED: usize = 10;

/// Durations of one kind.
#[derive(Debug, Default)]
pub struct Times {
    counts: [AtomicU64; BOUNDED + 1],
    sum_us: AtomicU64,
}

/// What was noted so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noted {
    counts: [u64; BOUNDED + 1],
    /// All durations together.
    pub sum: Duration,
}

impl Times {
    /// Notes the time since `start`.
    pub fn note_since(&self, start: Instant) {
        self.note(start.elapsed());
    }

    /// Notes a duration.
    pub fn note(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.counts[bucket(us)].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// What was noted so far. What is noted meanwhile may be missing in part.
    pub fn noted(&self) -> Noted {
        Noted {
            counts: std::array::from_fn(|bucket| self.counts[bucket].load(Ordering::Relaxed)),
            sum: Duration::from_micros(self.sum_us.load(Ordering::Relaxed)),
        }
    }
}

impl Noted {
    /// How many durations were noted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Each bound, and how many durations did not exceed it.
    pub fn up_to(&self) -> impl Iterator<Item = (Duration, u64)> {
        let mut sum = 0;
        (0..BOUNDED).map(move |bucket| {
            sum += self.counts[bucket];
            (Duration::from_micros(1 << (FIRST_BITS as usize + 2 * bucket)), sum)
        })
    }
}

/// The first bucket whose bound is at least `us`.
fn bucket(us: u64) -> usize {
    let bits = u64::BITS - (us.saturating_sub(1) >> FIRST_BITS).leading_zeros();
    (bits.div_ceil(2) as usize).min(BOUNDED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(us: u64, bound_us: u64) {
        let times = Times::default();
        times.note(Duration::from_micros(us));
        let noted = times.noted();
        let first = noted.up_to().find(|(_, count)| *count == 1);
        let first = first.map_or(u64::MAX, |(bound, _)| bound.as_micros() as u64);
        assert_eq!(first, bound_us, "bucket of {us} us");
        assert_eq!((noted.count(), noted.sum), (1, Duration::from_micros(us)));
    }

    #[test]
    fn a_duration_counts_below_the_first_bound_that_it_does_not_exceed() {
        check(0, 16);
        check(16, 16);
        check(17, 64);
        check(64, 64);
        check(65, 256);
        check(1024, 1024);
        check(1025, 4096);
        check(4_194_304, 4_194_304);
        check(4_194_305, u64::MAX);
        check(u64::from(u32::MAX), u64::MAX);
    }
}
