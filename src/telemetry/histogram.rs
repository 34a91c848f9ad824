//! A histogram for Prometheus from durations that were counted elsewhere.

use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};

use crate::engine::times::Noted;

/// The histogram `name` with one series for each database.
pub(super) fn family<'a>(
    name: &str,
    help: &str,
    databases: impl Iterator<Item = (&'a str, Noted)>,
) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(MetricType::HISTOGRAM);
    family.set_metric(databases.map(|(db, noted)| series(db, &noted)).collect());
    family
}

fn series(db: &str, noted: &Noted) -> Metric {
    let mut label = LabelPair::default();
    label.set_name("db".to_owned());
    label.set_value(db.to_owned());
    let bucket = |(bound, count): (std::time::Duration, u64)| {
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(bound.as_secs_f64());
        bucket.set_cumulative_count(count);
        bucket
    };
    let mut histogram = Histogram::default();
    histogram.set_bucket(noted.up_to().map(bucket).collect());
    histogram.set_sample_count(noted.count());
    histogram.set_sample_sum(noted.sum.as_secs_f64());
    let mut metric = Metric::from_label(vec![label]);
    metric.set_histogram(histogram);
    metric
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prometheus::{Encoder as _, TextEncoder};

    use super::*;
    use crate::engine::times::Times;

    #[test]
    fn buckets_sum_up_and_end_with_all() {
        let times = Times::default();
        for us in [10, 20, 5_000_000] {
            times.note(Duration::from_micros(us));
        }
        let family = family("took_seconds", "How long.", [("a.db", times.noted())].into_iter());
        let mut text = Vec::new();
        TextEncoder::new().encode(&[family], &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        for line in [
            "# TYPE took_seconds histogram",
            "took_seconds_bucket{db=\"a.db\",le=\"0.000016\"} 1",
            "took_seconds_bucket{db=\"a.db\",le=\"0.000064\"} 2",
            "took_seconds_bucket{db=\"a.db\",le=\"4.194304\"} 2",
            "took_seconds_bucket{db=\"a.db\",le=\"+Inf\"} 3",
            "took_seconds_sum{db=\"a.db\"} 5.00003",
            "took_seconds_count{db=\"a.db\"} 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in:\n{text}");
        }
    }
}
