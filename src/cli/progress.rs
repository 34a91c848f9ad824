//! How far a transfer is: one line on stderr that rewrites itself, on a terminal only.

use std::io::{self, IsTerminal as _, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, ReadBuf};

/// How often the line is written: often enough to move, seldom enough to cost nothing.
const PERIOD: Duration = Duration::from_millis(100);
const MEGABYTE: f64 = 1_000_000.0;

/// Counts the bytes that pass through a reader or a writer.
pub struct Progress<T> {
    inner: T,
    meter: Meter,
}

struct Meter {
    bytes: u64,
    total: Option<u64>,
    started: Instant,
    /// When the line is due; `None` where there is no terminal.
    due: Option<Instant>,
}

impl<T> Progress<T> {
    /// Wraps `inner`, through which `total` bytes will pass if that is known.
    pub fn new(inner: T, total: Option<u64>) -> Progress<T> {
        let started = Instant::now();
        let due = io::stderr().is_terminal().then_some(started + PERIOD);
        Progress { inner, meter: Meter { bytes: 0, total, started, due } }
    }

    /// Takes the line away; returns what was wrapped.
    pub fn finish(self) -> T {
        if self.meter.due.is_some() {
            show("");
        }
        self.inner
    }
}

impl Meter {
    fn count(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        let now = Instant::now();
        if self.due.is_some_and(|due| now >= due) {
            self.due = Some(now + PERIOD);
            show(&line(self.bytes, self.total, now - self.started));
        }
    }
}

/// Writes the line anew. The terminal may have gone, which is no reason to stop the transfer.
fn show(line: &str) {
    let _ = write!(io::stderr(), "\r\x1b[K{line}");
}

fn line(bytes: u64, total: Option<u64>, time: Duration) -> String {
    let megabytes = bytes as f64 / MEGABYTE;
    let rate = megabytes / time.as_secs_f64();
    match total {
        Some(total) => {
            format!("{megabytes:.1} of {:.1} MB, {rate:.0} MB/s", total as f64 / MEGABYTE)
        }
        None => format!("{megabytes:.1} MB, {rate:.0} MB/s"),
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Progress<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        self.meter.count(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<T: Write> Write for Progress<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.meter.count(written);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::line;
    use std::time::Duration;

    #[test]
    fn a_line_tells_amount_and_rate() {
        let two = Duration::from_secs(2);
        assert_eq!(line(3_000_000, Some(12_000_000), two), "3.0 of 12.0 MB, 2 MB/s");
        assert_eq!(line(3_000_000, None, two), "3.0 MB, 2 MB/s");
    }
}
