//! Moments as RFC 3339 text, in UTC, as LiteFS writes them: `2026-11-23T06:53:10.13Z`.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch, with the fraction's trailing zeros dropped.
pub(super) fn rfc3339(timestamp_ms: i64) -> String {
    let (seconds, ms) = (timestamp_ms.div_euclid(1000), timestamp_ms.rem_euclid(1000));
    text(seconds, &format!("{ms:03}"))
}

/// The same to the nanosecond.
pub(super) fn rfc3339_nanos(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    text(seconds, &format!("{:09}", since.subsec_nanos()))
}

fn text(seconds: i64, fraction: &str) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let fraction = fraction.trim_end_matches('0');
    let point = if fraction.is_empty() { "" } else { "." };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{point}{fraction}Z")
}

/// Year, month and day of the day `days` after 1970-01-01, by the Gregorian rules. Counted in years
/// that begin in March, so that a leap day is the last of its year.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468; // since 0000-03-01
    let era = days.div_euclid(146_097); // of 400 years
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn timestamps_drop_the_zeros_of_their_fraction() {
        let check = |ms, expected: &str| assert_eq!(rfc3339(ms), expected);
        check(0, "1970-01-01T00:00:00Z");
        check(-1, "1969-12-31T23:59:59.999Z");
        check(951_782_400_000, "2000-02-29T00:00:00Z");
        check(1_795_416_790_135, "2026-11-23T06:53:10.135Z");
        check(1_795_416_790_130, "2026-11-23T06:53:10.13Z");
        check(1_795_416_790_100, "2026-11-23T06:53:10.1Z");
        check(4_102_444_799_000, "2099-12-31T23:59:59Z");
    }

    #[test]
    fn nanoseconds_are_kept() {
        let at = |nanos| UNIX_EPOCH + Duration::new(1_795_416_088, nanos);
        let check = |nanos, expected: &str| assert_eq!(rfc3339_nanos(at(nanos)), expected);
        check(552_771_732, "2026-11-23T06:41:28.552771732Z");
        check(552_771_000, "2026-11-23T06:41:28.552771Z");
        check(0, "2026-11-23T06:41:28Z");
    }
}
