//! Go's duration syntax: `300ms`, `1.5h`, `-2m`, `1h30m`; units ns, us, ms, s, m, h; `0` alone.

/// Nanoseconds of each unit, longest spelling first where one is a prefix of another.
const UNITS: &[(&str, i128)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000), // U+00B5, the micro sign
    ("μs", 1_000), // U+03BC, the Greek letter
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Why a text is no duration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid duration {text:?}: {reason}")]
pub struct DurationError {
    text: String,
    reason: &'static str,
}

/// The duration in nanoseconds.
///
/// # Errors
/// The text is no duration, or one of more than about 292 years.
pub fn parse_nanos(text: &str) -> Result<i64, DurationError> {
    let error = |reason| DurationError { text: text.to_owned(), reason };
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(error("expected a number and a unit, such as \"10s\""));
    }
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let (nanos, after) = parse_part(rest).map_err(error)?;
        total += nanos;
        if total > i128::from(i64::MAX) {
            return Err(error("too long"));
        }
        rest = after;
    }
    let total = if negative { -total } else { total };
    i64::try_from(total).map_err(|_| error("too long"))
}

/// One number with its unit: the nanoseconds and the text after it.
fn parse_part(text: &str) -> Result<(i128, &str), &'static str> {
    let (whole, rest) = split_digits(text);
    let (fraction, rest) = rest.strip_prefix('.').map_or(("", rest), split_digits);
    if whole.is_empty() && fraction.is_empty() {
        return Err("expected a number and a unit, such as \"10s\"");
    }
    let unit_len = rest.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(unit_len);
    if unit.is_empty() {
        return Err("a unit is missing: ns, us, ms, s, m or h");
    }
    let scale = UNITS.iter().find(|(name, _)| *name == unit);
    let scale = scale.ok_or("unknown unit, expected ns, us, ms, s, m or h")?.1;
    Ok((decimal(whole, fraction, scale)?, rest))
}

fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// `whole.fraction` times `scale`; digits below a nanosecond are cut off.
fn decimal(whole: &str, fraction: &str, scale: i128) -> Result<i128, &'static str> {
    let whole: i64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| "too long")? };
    let mut nanos = i128::from(whole) * scale;
    let mut place = scale;
    for digit in fraction.bytes() {
        place /= 10;
        nanos += i128::from(digit - b'0') * place;
    }
    Ok(nanos)
}

#[cfg(test)]
mod tests {
    use super::parse_nanos;

    #[track_caller]
    fn check(text: &str, expected: Option<i64>) {
        assert_eq!(parse_nanos(text).ok(), expected, "{text:?}");
    }

    #[test]
    fn go_durations_are_read() {
        check("0", Some(0));
        check("10s", Some(10_000_000_000));
        check("300ms", Some(300_000_000));
        check("1h30m", Some(5_400_000_000_000));
        check("1.5s", Some(1_500_000_000));
        check(".5s", Some(500_000_000));
        check("1.m", Some(60_000_000_000));
        check("-2m", Some(-120_000_000_000));
        check("+1us", Some(1_000));
        check("1µs1μs", Some(2_000));
        check("2540400h10m10s", Some(9_145_440_610_000_000_000));
    }

    #[test]
    fn other_texts_are_refused() {
        let texts = ["", "-", "5", "s", ".s", "10 s", "1d", "1h30", "ten", "1e3s", "9999999999h"];
        for text in texts {
            check(text, None);
        }
        check("99999999999999999999s", None);
    }
}
