//! The Prometheus metrics of a node.
//!
//! Format: the text exposition format 0.0.4. The names are those of LiteFS, so that its dashboards
//! go on working: counters carry no `_total` suffix. Beside them stand the `process_*` metrics,
//! read from `/proc` when they are asked for, and a few of our own.
//!
//! Invariant: counting costs one atomic addition. The label lookup is done once for a database, in
//! [`Metrics::database`], and for what a stream sends once for a piece.

use std::collections::BTreeMap;
use std::sync::Mutex;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Encoder as _, Gauge, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use super::histogram;
use crate::engine::times::Noted;
use crate::os::Syncs;

mod proxy;

pub use proxy::{InFlight, ProxyMetrics, ProxyWait};

/// The `Content-Type` of what [`Metrics::encode`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Why the metrics could not be set up or written.
#[derive(Debug, thiserror::Error)]
#[error("encode metrics")]
pub struct Error(#[from] prometheus::Error);

/// All metrics of one node, on a registry of their own.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Databases known.
    pub db_count: IntGauge,
    /// 1 on the primary, else 0.
    pub is_primary: IntGauge,
    /// Who listens for changes: connected replicas.
    pub subscriber_count: IntGauge,
    /// Lag behind the primary in seconds, or time since this node was it; 0 on the primary and before
    /// the first sync.
    pub lag_seconds: Gauge,
    /// Open `/stream` requests.
    pub stream_count: IntGauge,
    /// 1 if the kernel reads and writes files past the daemon, else 0.
    pub passthrough: IntGauge,
    /// When the primary last gave news, in seconds since the Unix epoch; 0 before the first.
    pub last_news_seconds: Gauge,
    /// Attempts to back up that failed.
    pub backup_errors: IntCounter,
    /// When everything was in the backup, in seconds since the Unix epoch; 0 for never.
    pub backup_complete_seconds: Gauge,
    transport: IntGaugeVec,
    sync_count: IntCounterVec,
    /// What the proxy counts.
    pub proxy: ProxyMetrics,
    frame_send_count: IntCounterVec,
    databases: DatabaseVecs,
    times: Times,
}

/// The metrics of one database; cheap to clone and to keep beside it.
#[derive(Debug, Clone)]
pub struct DbMetrics {
    /// Current TXID.
    pub txid: IntGauge,
    /// Page writes to the database file.
    pub database_writes: IntCounter,
    /// Writes to the journal.
    pub journal_writes: IntCounter,
    /// Writes to the WAL.
    pub wal_writes: IntCounter,
    /// Writes to the shared-memory file.
    pub shm_writes: IntCounter,
    /// Local commits, not applied ones.
    pub commits: IntCounter,
    /// LTX files.
    pub ltx_count: IntGauge,
    /// Bytes of LTX files.
    pub ltx_bytes: IntGauge,
    /// Files removed by retention.
    pub ltx_reaped: IntGauge,
    /// From an LTX file's timestamp to its apply, in seconds; 0 after a local commit.
    pub lag_seconds: Gauge,
    /// Writes refused because this node is not the primary.
    pub refused_writes: IntCounter,
    /// 1 while the database is in its failed state, else 0.
    pub failed: IntGauge,
    /// Transactions that wait for their LTX file.
    pub chain_backlog: IntGauge,
    /// Received LTX files that wait to be applied.
    pub apply_backlog: IntGauge,
    /// LTX files in `lost+found/`.
    pub lost_found: IntGauge,
    /// Size in bytes.
    pub size_bytes: IntGauge,
    /// The transaction before which everything is in the backup.
    pub backup_hwm: IntGauge,
    /// 1 while the backup stands still for want of a decision, else 0.
    pub backup_stalled: IntGauge,
}

#[derive(Debug)]
struct DatabaseVecs {
    txid: IntGaugeVec,
    database_writes: IntCounterVec,
    journal_writes: IntCounterVec,
    wal_writes: IntCounterVec,
    shm_writes: IntCounterVec,
    commits: IntCounterVec,
    ltx_count: IntGaugeVec,
    ltx_bytes: IntGaugeVec,
    ltx_reaped: IntGaugeVec,
    lag_seconds: GaugeVec,
    refused_writes: IntCounterVec,
    failed: IntGaugeVec,
    chain_backlog: IntGaugeVec,
    apply_backlog: IntGaugeVec,
    lost_found: IntGaugeVec,
    size_bytes: IntGaugeVec,
    backup_hwm: IntGaugeVec,
    backup_stalled: IntGaugeVec,
}

impl Metrics {
    /// Fresh metrics, all zero.
    ///
    /// # Errors
    /// None in practice: the names are constants.
    pub fn new() -> Result<Metrics, Error> {
        let registry = Registry::new();
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let register = Register(&registry);
        Ok(Metrics {
            db_count: register.gauge("litefs_db_count", "Number of managed databases.")?,
            is_primary: register.gauge("litefs_is_primary", "1 on the primary, else 0.")?,
            subscriber_count: register
                .gauge("litefs_subscriber_count", "Number of change subscribers.")?,
            lag_seconds: register
                .add(Gauge::new("litefs_lag_seconds", "Lag behind the primary.")?)?,
            stream_count: register.gauge("litefs_http_stream_count", "Open streams.")?,
            proxy: ProxyMetrics::register(&register)?,
            frame_send_count: register.add(IntCounterVec::new(
                Opts::new("litefs_http_frame_send_count", "Frames sent."),
                &["db", "type"],
            )?)?,
            passthrough: register
                .gauge("litefs_passthrough", "1 if the kernel serves file contents itself.")?,
            last_news_seconds: register.add(Gauge::new(
                "litefs_last_news_timestamp_seconds",
                "When the primary was last heard.",
            )?)?,
            backup_errors: register.add(IntCounter::new(
                "litefs_backup_error_count",
                "Attempts to back up that failed.",
            )?)?,
            backup_complete_seconds: register.add(Gauge::new(
                "litefs_backup_complete_timestamp_seconds",
                "When everything was in the backup.",
            )?)?,
            transport: register.add(IntGaugeVec::new(
                Opts::new("litefs_transport", "1 for how requests come from the kernel."),
                &["type"],
            )?)?,
            sync_count: register.add(IntCounterVec::new(
                Opts::new("litefs_sync_count", "Files, directories and file systems made durable."),
                &["for"],
            )?)?,
            databases: DatabaseVecs::register(&register)?,
            times: Times::default(),
            registry,
        })
    }

    /// The metrics of the database `name`; the same counters for the same name.
    pub fn database(&self, name: &str) -> DbMetrics {
        // They are there from the beginning, as zeros.
        let _sent = (self.frames_sent(name), self.snapshots_sent(name));
        let vecs = &self.databases;
        let db = &[name];
        DbMetrics {
            txid: vecs.txid.with_label_values(db),
            database_writes: vecs.database_writes.with_label_values(db),
            journal_writes: vecs.journal_writes.with_label_values(db),
            wal_writes: vecs.wal_writes.with_label_values(db),
            shm_writes: vecs.shm_writes.with_label_values(db),
            commits: vecs.commits.with_label_values(db),
            ltx_count: vecs.ltx_count.with_label_values(db),
            ltx_bytes: vecs.ltx_bytes.with_label_values(db),
            ltx_reaped: vecs.ltx_reaped.with_label_values(db),
            lag_seconds: vecs.lag_seconds.with_label_values(db),
            refused_writes: vecs.refused_writes.with_label_values(db),
            failed: vecs.failed.with_label_values(db),
            chain_backlog: vecs.chain_backlog.with_label_values(db),
            apply_backlog: vecs.apply_backlog.with_label_values(db),
            lost_found: vecs.lost_found.with_label_values(db),
            size_bytes: vecs.size_bytes.with_label_values(db),
            backup_hwm: vecs.backup_hwm.with_label_values(db),
            backup_stalled: vecs.backup_stalled.with_label_values(db),
        }
    }

    /// The LTX files of the database `name` that were sent, without snapshots.
    pub fn frames_sent(&self, name: &str) -> IntCounter {
        self.frame_send_count.with_label_values(&[name, "ltx"])
    }

    /// The snapshots of the database `name` that were sent.
    pub fn snapshots_sent(&self, name: &str) -> IntCounter {
        self.frame_send_count.with_label_values(&[name, "ltx:snapshot"])
    }

    /// Says how requests come from the kernel: `dev` or `uring`.
    pub fn set_transport(&self, name: &str) {
        self.transport.with_label_values(&[name]).set(1);
    }

    /// How often something was made durable, because an application asked for it and otherwise.
    pub fn set_syncs(&self, syncs: Syncs) {
        for (label, total) in [("application", syncs.applications), ("litefs", syncs.own)] {
            let counter = self.sync_count.with_label_values(&[label]);
            // Two scrapes at a time can only count less, never down.
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }

    /// How long things took on the database `name` so far.
    pub fn set_times(&self, name: &str, capture: Noted, apply: Noted) {
        self.times.set(name, [capture, apply]);
    }

    /// The text for `GET /metrics`.
    ///
    /// # Errors
    /// A metric that cannot be written as text.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let mut text = Vec::new();
        let mut families = self.registry.gather();
        families.extend(self.times.families());
        TextEncoder::new().encode(&families, &mut text)?;
        Ok(text)
    }
}

impl DatabaseVecs {
    fn register(register: &Register<'_>) -> Result<DatabaseVecs, Error> {
        let gauge = |name, help| register.gauges(name, help);
        let counter = |name, help| register.counters(name, help);
        Ok(DatabaseVecs {
            txid: gauge("litefs_db_txid", "Current transaction ID.")?,
            database_writes: counter("litefs_db_database_write_count", "Database page writes.")?,
            journal_writes: counter("litefs_db_journal_write_count", "Journal writes.")?,
            wal_writes: counter("litefs_db_wal_write_count", "WAL writes.")?,
            shm_writes: counter("litefs_db_shm_write_count", "Shared-memory writes.")?,
            commits: counter("litefs_db_commit_count", "Local commits.")?,
            ltx_count: gauge("litefs_db_ltx_count", "LTX files on disk.")?,
            ltx_bytes: gauge("litefs_db_ltx_bytes", "Bytes of LTX files on disk.")?,
            ltx_reaped: gauge("litefs_db_ltx_reap_count", "LTX files removed by retention.")?,
            lag_seconds: register.add(GaugeVec::new(
                Opts::new("litefs_db_lag_seconds", "Commit to apply of the last transaction."),
                &["db"],
            )?)?,
            refused_writes: counter("litefs_db_refused_write_count", "Writes refused here.")?,
            failed: gauge("litefs_db_failed", "1 while the database is in its failed state.")?,
            chain_backlog: gauge("litefs_db_chain_backlog", "Transactions without LTX file yet.")?,
            apply_backlog: gauge("litefs_db_apply_backlog", "LTX files received, not applied.")?,
            lost_found: gauge("litefs_db_lost_found_count", "LTX files set aside.")?,
            size_bytes: gauge("litefs_db_size_bytes", "Size of the database.")?,
            backup_hwm: gauge("litefs_db_backup_hwm", "Everything before it is backed up.")?,
            backup_stalled: gauge("litefs_db_backup_stalled", "1 while a decision is needed.")?,
        })
    }
}

/// How long things took, by database: names and helps beside [`Times::set`]'s order.
#[derive(Debug, Default)]
struct Times(Mutex<BTreeMap<String, [Noted; 2]>>);

impl Times {
    const NAMES: [(&str, &str); 2] = [
        ("litefs_db_capture_seconds", "From the end of a transaction to the answer."),
        ("litefs_db_apply_seconds", "To apply what was received at a time."),
    ];

    fn set(&self, name: &str, times: [Noted; 2]) {
        self.0.lock().unwrap().insert(name.to_owned(), times);
    }

    fn families(&self) -> Vec<MetricFamily> {
        let times = self.0.lock().unwrap();
        if times.is_empty() {
            return Vec::new();
        }
        let family = |(kind, (name, help)): (usize, (&str, &str))| {
            let databases = times.iter().map(|(db, noted)| (db.as_str(), noted[kind]));
            histogram::family(name, help, databases)
        };
        Self::NAMES.into_iter().enumerate().map(family).collect()
    }
}

/// Makes metrics and puts them on a registry.
struct Register<'a>(&'a Registry);

impl Register<'_> {
    fn add<M: Collector + Clone + 'static>(&self, metric: M) -> Result<M, Error> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.add(IntGauge::new(name, help)?)
    }

    fn gauges(&self, name: &str, help: &str) -> Result<IntGaugeVec, Error> {
        self.add(IntGaugeVec::new(Opts::new(name, help), &["db"])?)
    }

    fn counters(&self, name: &str, help: &str) -> Result<IntCounterVec, Error> {
        self.add(IntCounterVec::new(Opts::new(name, help), &["db"])?)
    }
}

#[cfg(test)]
mod tests {
    use super::Metrics;

    /// Dashboards match on these lines.
    #[test]
    fn names_types_and_labels_are_those_of_litefs() {
        let metrics = Metrics::new().unwrap();
        let db = metrics.database("app.db");
        db.txid.set(7);
        db.commits.inc_by(2);
        metrics.snapshots_sent("app.db").inc();
        metrics.is_primary.set(1);
        let text = String::from_utf8(metrics.encode().unwrap()).unwrap();
        for line in [
            "# TYPE litefs_db_count gauge",
            "litefs_is_primary 1",
            "litefs_subscriber_count 0",
            "litefs_lag_seconds 0",
            "litefs_db_txid{db=\"app.db\"} 7",
            "# TYPE litefs_db_database_write_count counter",
            "litefs_db_database_write_count{db=\"app.db\"} 0",
            "litefs_db_journal_write_count{db=\"app.db\"} 0",
            "litefs_db_wal_write_count{db=\"app.db\"} 0",
            "litefs_db_shm_write_count{db=\"app.db\"} 0",
            "litefs_db_commit_count{db=\"app.db\"} 2",
            "litefs_db_ltx_count{db=\"app.db\"} 0",
            "litefs_db_ltx_bytes{db=\"app.db\"} 0",
            "# TYPE litefs_db_ltx_reap_count gauge",
            "litefs_db_lag_seconds{db=\"app.db\"} 0",
            "litefs_http_stream_count 0",
            "litefs_http_frame_send_count{db=\"app.db\",type=\"ltx\"} 0",
            "litefs_http_frame_send_count{db=\"app.db\",type=\"ltx:snapshot\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in:\n{text}");
        }
        for name in ["cpu_seconds_total", "open_fds", "resident_memory_bytes", "start_time_seconds"]
        {
            assert!(text.contains(&format!("\nprocess_{name} ")), "process_{name} is missing");
        }
    }

    #[test]
    fn the_dashboard_asks_for_metrics_that_exist() {
        let metrics = Metrics::new().unwrap();
        let db = metrics.database("app.db");
        db.txid.set(1);
        metrics.set_transport("dev");
        metrics.proxy.count("read", "local");
        metrics.proxy.wait("txid").end(true);
        let times = crate::engine::times::Times::default().noted();
        metrics.set_times("app.db", times, times);
        let text = String::from_utf8(metrics.encode().unwrap()).unwrap();
        let dashboard = include_str!("../../docs/grafana.json");
        let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
        let words = dashboard.split(|c| !is_name(c));
        let asked: Vec<_> = words.filter(|word| word.starts_with("litefs_")).collect();
        assert!(asked.len() > 20, "only {} metrics", asked.len());
        for name in asked {
            let exists = text.lines().any(|line| line.split(['{', ' ']).next() == Some(name));
            assert!(exists, "{name} is not in:\n{text}");
        }
    }

    #[test]
    fn one_database_has_one_set_of_counters() {
        let metrics = Metrics::new().unwrap();
        metrics.database("a").commits.inc();
        metrics.database("a").commits.inc();
        assert_eq!(metrics.database("a").commits.get(), 2);
        assert_eq!(metrics.database("b").commits.get(), 0);
    }
}
