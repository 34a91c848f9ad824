//! Log lines on stderr.
//!
//! ```text
//! level=INFO msg="database opened" db=app.db txid=0000000000000005
//! time=2026-11-23T07:11:00.890Z level=INFO msg=...       with `log.timestamp`
//! {"time":"2026-11-23T07:11:00.890Z","level":"INFO","msg":"...","db":"app.db"}
//! ```
//!
//! A text value stands in quotes when it is empty or holds a blank, a quote, an equals sign or a
//! control character. One event is one line, whatever its values hold.

use std::fmt::{self, Write as _};
use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serializer as _;
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;

use super::trace::{RollingFile, SharedFile};
use crate::config::{Log, LogFormat};

const SECONDS_PER_DAY: u64 = 86_400;

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("init logger")]
pub struct InitError(#[source] tracing::subscriber::SetGlobalDefaultError);

/// Where every line goes beside the log, debug lines too, each with its time.
#[derive(Debug, Default)]
pub struct Traces {
    /// The trace file.
    pub file: Option<RollingFile>,
    /// Standard output too, `-tracing`.
    pub on_stdout: bool,
}

/// Sends the events of the whole process to stderr, and to `traces`; debug events of `verbose`
/// modules in any case. To be called once.
///
/// # Errors
/// A logger is there already.
pub fn init(config: &Log, verbose: &[&str], traces: Traces) -> Result<(), InitError> {
    let layer = tracing_subscriber::fmt::layer()
        .event_format(Lines::new(config))
        .with_writer(io::stderr)
        .with_filter(levels(config, verbose));
    let timed = Log { timestamp: true, debug: true, ..Log::default() };
    let file = traces.file.map(|file| {
        let layer = tracing_subscriber::fmt::layer().event_format(Lines::new(&timed));
        layer.with_writer(Arc::new(SharedFile::new(file))).with_filter(ours())
    });
    let stdout = traces.on_stdout.then(|| {
        let layer = tracing_subscriber::fmt::layer().event_format(Lines::new(&timed));
        layer.with_writer(io::stdout).with_filter(ours())
    });
    let subscriber = tracing_subscriber::registry().with(layer).with(file).with(stdout);
    tracing::subscriber::set_global_default(subscriber).map_err(InitError)
}

/// Everything that our own code says; libraries only what is worth a log line.
fn ours() -> Targets {
    let ours = ["litefs", "fuse", "ltx"].map(|target| (target, LevelFilter::DEBUG));
    Targets::new().with_default(LevelFilter::INFO).with_targets(ours)
}

fn levels(config: &Log, verbose: &[&str]) -> Targets {
    let level = if config.debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let verbose = verbose.iter().map(|target| (*target, LevelFilter::DEBUG));
    Targets::new().with_default(level).with_targets(verbose)
}

/// Turns events into lines.
struct Lines {
    format: LogFormat,
    clock: Option<fn() -> SystemTime>,
}

impl Lines {
    /// JSON lines always carry a time, text lines on request.
    fn new(config: &Log) -> Lines {
        let timed = config.timestamp || config.format == LogFormat::Json;
        Lines { format: config.format, clock: timed.then_some(SystemTime::now) }
    }
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let mut fields = Fields::default();
        if let Some(clock) = self.clock {
            fields.0.push(("time", timestamp(clock()).into()));
        }
        fields.0.push(("level", level_name(*metadata.level()).into()));
        fields.0.push((MESSAGE, Value::Null));
        event.record(&mut fields);
        match self.format {
            LogFormat::Json => write_json(&mut writer, &fields.0),
            LogFormat::Text => write_text(&mut writer, &fields.0),
        }
    }
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARN",
        Level::INFO => "INFO",
        _ => "DEBUG",
    }
}

/// What the message is called on a line.
const MESSAGE: &str = "msg";

/// The fields of an event, in the order of the line.
#[derive(Default)]
struct Fields(Vec<(&'static str, Value)>);

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        let message = self.0.iter_mut().find(|(name, _)| *name == MESSAGE);
        match message {
            Some((_, place)) if field.name() == "message" => *place = value,
            _ => self.0.push((field.name(), value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, chain(value).into());
    }
}

/// An error with its causes: `apply transaction: write page: No space left on device`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

fn write_json(writer: &mut Writer<'_>, fields: &[(&str, Value)]) -> fmt::Result {
    let mut line = Vec::new();
    let mut json = serde_json::Serializer::new(&mut line);
    let pairs = fields.iter().map(|(name, value)| (name, value));
    json.collect_map(pairs).map_err(|_| fmt::Error)?;
    writeln!(writer, "{}", String::from_utf8_lossy(&line))
}

fn write_text(writer: &mut Writer<'_>, fields: &[(&str, Value)]) -> fmt::Result {
    for (index, (name, value)) in fields.iter().enumerate() {
        let separator = if index == 0 { "" } else { " " };
        match value {
            Value::String(text) if is_bare(text) => write!(writer, "{separator}{name}={text}")?,
            value => write!(writer, "{separator}{name}={value}")?,
        }
    }
    writer.write_char('\n')
}

/// Whether a text can stand without quotes.
fn is_bare(text: &str) -> bool {
    !text.is_empty()
        && !text.contains(|c: char| c.is_whitespace() || c.is_control() || "\"=".contains(c))
}

/// UTC, RFC 3339, milliseconds.
fn timestamp(time: SystemTime) -> String {
    let micros = timestamp_micros(time);
    format!("{}Z", &micros[..micros.len() - 3])
}

/// The same with microseconds, and without the zone.
pub(super) fn timestamp_micros(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / SECONDS_PER_DAY, since.as_secs() % SECONDS_PER_DAY);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let micros = since.subsec_micros();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}")
}

/// Year, month and day of a day counted from 1970-01-01.
///
/// Years begin in March here, so that the leap day is a year's last; 400 such years are an era.
fn civil(days: u64) -> (u64, u64, u64) {
    const DAYS_TO_EPOCH: u64 = 719_468; // from 0000-03-01 to 1970-01-01
    const DAYS_PER_ERA: u64 = 146_097;
    let days = days + DAYS_TO_EPOCH;
    let (era, day) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (era * 400 + year, month + 3);
    if month > 12 { (year + 1, month - 12, day) } else { (year, month, day) }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[track_caller]
    fn check(lines: Lines, log: fn(), expected: &str) {
        let buffer = Buffer::default();
        let make = buffer.clone();
        let subscriber = tracing_subscriber::fmt()
            .event_format(lines)
            .with_max_level(LevelFilter::DEBUG)
            .with_writer(move || make.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        assert_eq!(String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap(), expected);
    }

    fn at_1() -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(1_795_417_860_890)
    }

    #[test]
    fn a_text_line_quotes_what_needs_it() {
        let log = || {
            let error = io::Error::other("disk \"a\" full\n");
            let error: &(dyn std::error::Error + 'static) = &error;
            tracing::info!(
                db = "app.db",
                pages = 3,
                ok = true,
                error,
                empty = "",
                "commit written"
            );
        };
        let lines = Lines::new(&Log::default());
        let expected = "level=INFO msg=\"commit written\" db=app.db pages=3 ok=true \
                        error=\"disk \\\"a\\\" full\\n\" empty=\"\"\n";
        check(lines, log, expected);
    }

    #[test]
    fn times_stand_first_and_are_utc() {
        let lines = Lines { format: LogFormat::Text, clock: Some(at_1) };
        check(lines, || tracing::debug!("x"), "time=2026-11-23T07:11:00.890Z level=DEBUG msg=x\n");
    }

    #[test]
    fn a_json_line_is_one_object() {
        let lines = Lines { format: LogFormat::Json, clock: Some(at_1) };
        let expected = "{\"time\":\"2026-11-23T07:11:00.890Z\",\"level\":\"WARN\",\
                        \"msg\":\"a\\nb\",\"n\":-1}\n";
        check(lines, || tracing::warn!(n = -1, "a\nb"), expected);
    }

    #[test]
    fn one_module_can_be_verbose() {
        let levels = levels(&Log::default(), &["noisy"]);
        assert!(levels.would_enable("noisy::part", &Level::DEBUG));
        assert!(levels.would_enable("litefs::engine", &Level::INFO));
        assert!(!levels.would_enable("litefs::engine", &Level::DEBUG));
        assert!(
            super::levels(&Log { debug: true, ..Log::default() }, &[])
                .would_enable("litefs::engine", &Level::DEBUG)
        );
    }

    #[test]
    fn days_become_dates() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (19_782, (2024, 2, 29)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(civil(days), date);
        }
    }
}
