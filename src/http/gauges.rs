//! `GET /metrics`: brings the metrics up to date with the engine when they are asked for, so that
//! nothing counts twice while it works.

use std::sync::atomic::{AtomicU64, Ordering};

use ltx::Pgno;
use prometheus::IntCounter;

use crate::engine::{Db, DbState, Engine, Role};
use crate::os;
use crate::telemetry::Metrics;

/// Brings `metrics` up to date. Blocking: looks at each database.
pub(super) fn collect(engine: &Engine, metrics: &Metrics, streams: usize) {
    let databases = engine.databases();
    let is_primary = engine.role() == Role::Primary;
    metrics.db_count.set(databases.len() as i64);
    metrics.is_primary.set(i64::from(is_primary));
    metrics.subscriber_count.set(engine.subscriber_count() as i64);
    metrics.stream_count.set(streams as i64);
    metrics.passthrough.set(i64::from(engine.shared().is_passthrough()));
    metrics.last_news_seconds.set(engine.lag_timestamp_ms().unwrap_or(0) as f64 / 1000.0);
    metrics.lag_seconds.set(engine.silence_ms().unwrap_or(0) as f64 / 1000.0);
    let backup = &engine.shared().backup;
    count(&metrics.backup_errors, &backup.errors);
    metrics.backup_complete_seconds.set(backup.complete_ms.load(Ordering::Relaxed) as f64 / 1000.0);
    metrics.set_syncs(os::syncs());
    for db in databases {
        collect_database(&db, metrics);
    }
}

fn count(counter: &IntCounter, total: &AtomicU64) {
    // Two scrapes at a time can only count less, never down.
    counter.inc_by(total.load(Ordering::Relaxed).saturating_sub(counter.get()));
}

fn collect_database(db: &Db, metrics: &Metrics) {
    let (view, counters, stats) = (db.view(), &db.counters, db.chain().stats());
    metrics.set_times(db.name().as_str(), counters.capture.noted(), counters.apply.noted());
    let metrics = metrics.database(db.name().as_str());
    count(&metrics.database_writes, &counters.database_writes);
    count(&metrics.journal_writes, &counters.journal_writes);
    count(&metrics.wal_writes, &counters.wal_writes);
    count(&metrics.shm_writes, &counters.shm_writes);
    count(&metrics.commits, &counters.commits);
    count(&metrics.refused_writes, &counters.refused_writes);
    metrics.txid.set(view.pos.txid.0 as i64);
    metrics.ltx_count.set(stats.count as i64);
    metrics.ltx_bytes.set(stats.bytes as i64);
    metrics.ltx_reaped.set(stats.reaped as i64);
    metrics.lag_seconds.set(counters.lag_ms.load(Ordering::Relaxed) as f64 / 1000.0);
    metrics.chain_backlog.set(stats.backlog as i64);
    metrics.apply_backlog.set(db.apply_backlog() as i64);
    metrics.lost_found.set(db.lost_found_count() as i64);
    metrics
        .size_bytes
        .set(view.page_size.map_or(0, |size| size.offset(Pgno(view.pages + 1))) as i64);
    metrics.backup_hwm.set(db.hwm().0 as i64);
    metrics.backup_stalled.set(i64::from(db.backup_problem().is_some()));
    metrics.failed.set(i64::from(db.state() != DbState::Ready));
}
