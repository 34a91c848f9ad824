//! The clock that leases are measured by: time since the machine started, sleep included, so that
//! a suspended process or machine does not find more time left than there is (CLOCK_BOOTTIME).

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// A moment, in nanoseconds since the machine started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(u64);

impl BootTime {
    /// Before everything.
    pub const START: BootTime = BootTime(0);
    /// After everything.
    pub const NEVER: BootTime = BootTime(u64::MAX);

    /// This moment.
    pub fn now() -> BootTime {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has it since 2.6.39");
        let nanos = Duration::from(now).as_nanos();
        BootTime(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// The moment `wait` later.
    pub fn after(self, wait: Duration) -> BootTime {
        let nanos = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        BootTime(self.0.saturating_add(nanos))
    }

    /// The time from `earlier` to this; nothing if that is later.
    pub fn since(self, earlier: BootTime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// For storing in an atomic.
    pub fn nanos(self) -> u64 {
        self.0
    }

    /// What [`BootTime::nanos`] gave.
    pub fn from_nanos(nanos: u64) -> BootTime {
        BootTime(nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_on_and_never_overflows() {
        let now = BootTime::now();
        assert!(BootTime::START < now && now <= BootTime::now() && now < BootTime::NEVER);
        assert_eq!(now.after(Duration::from_secs(1)).since(now), Duration::from_secs(1));
        assert_eq!(now.since(now.after(Duration::from_secs(1))), Duration::ZERO);
        assert_eq!(now.after(Duration::MAX), BootTime::NEVER);
    }
}
