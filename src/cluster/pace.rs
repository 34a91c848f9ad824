//! How often something is tried, and how often it is said.

use std::collections::VecDeque;
use std::fmt::Arguments;
use std::time::Duration;

use tokio::time::Instant;

/// The first pause: a primary that has just changed answers within some of these.
const FIRST: Duration = Duration::from_millis(50);

/// How often the log repeats what has not changed.
const REPEAT: Duration = Duration::from_secs(30);

/// Pauses that double up to a limit.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
    max: Duration,
}

impl Backoff {
    pub(super) fn new(max: Duration) -> Backoff {
        Backoff { next: FIRST.min(max), max }
    }

    /// The next pause.
    pub(super) fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.max);
        pause
    }

    /// Something went well: the pauses are short again.
    pub(super) fn reset(&mut self) {
        self.next = FIRST.min(self.max);
    }
}

/// How many lines are remembered that were said.
const REMEMBERED: usize = 8;

/// Log lines of which each is said when it is new, and then once in a while.
#[derive(Debug, Default)]
pub(super) struct Reports {
    /// What was said and when, the last one at the end.
    said: VecDeque<(String, Instant)>,
}

impl Reports {
    /// Warns, unless `key` was the last one and that is not long ago.
    pub(super) fn warn(&mut self, key: &str, text: Arguments<'_>) {
        if self.is_due(key) {
            tracing::warn!("{text}");
        }
    }

    /// As [`Reports::warn`], for what is as it should be.
    pub(super) fn info(&mut self, key: &str, text: Arguments<'_>) {
        if self.is_due(key) {
            tracing::info!("{text}");
        }
    }

    /// Whatever is said next is new.
    pub(super) fn clear(&mut self) {
        self.said.clear();
    }

    fn is_due(&mut self, key: &str) -> bool {
        let now = Instant::now();
        self.said.retain(|(_, at)| now - *at < REPEAT);
        if self.said.iter().any(|(said, _)| said == key) {
            return false;
        }
        if self.said.len() == REMEMBERED {
            self.said.pop_front();
        }
        self.said.push_back((key.to_owned(), now));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_the_limit() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(150));
        assert_eq!([(); 4].map(|()| backoff.next()), [ms(50), ms(100), ms(150), ms(150)]);
        backoff.reset();
        assert_eq!(backoff.next(), ms(50));
        assert_eq!(Backoff::new(ms(10)).next(), ms(10));
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_is_said_once_in_a_while() {
        let mut reports = Reports::default();
        assert!(reports.is_due("a") && !reports.is_due("a"));
        assert!(reports.is_due("b") && !reports.is_due("a"));
        tokio::time::advance(REPEAT).await;
        assert!(reports.is_due("a"));
    }
}
