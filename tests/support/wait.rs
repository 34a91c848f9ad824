//! Waiting for a condition. Every wait ends: the deadline is far above what any of these takes on a
//! slow machine, and who misses it says what it waited for.

use std::time::{Duration, Instant};

/// The longest wait for something that must come.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// [`DEADLINE`], or the seconds that `LITEFS_TEST_WAIT_MAX` says for programs that are slow on purpose.
fn wait_max() -> Duration {
    let given = std::env::var("LITEFS_TEST_WAIT_MAX").ok().and_then(|text| text.parse().ok());
    given.map_or(DEADLINE, Duration::from_secs)
}

/// Time between two looks.
const PERIOD: Duration = Duration::from_millis(2);

/// Waits until `look` finds something.
#[track_caller]
pub fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    until_or(|| what.to_owned(), look)
}

/// Waits until `look` finds something; `what` is asked for only if it does not come.
#[track_caller]
pub fn until_or<T>(what: impl Fn() -> String, mut look: impl FnMut() -> Option<T>) -> T {
    let max = wait_max();
    let end = Instant::now() + max;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited {max:?} in vain: {}", what());
        std::thread::park_timeout(PERIOD);
    }
}

/// Waits until `holds` says so.
#[track_caller]
pub fn until_true(what: &str, mut holds: impl FnMut() -> bool) {
    until(what, || holds().then_some(()));
}
