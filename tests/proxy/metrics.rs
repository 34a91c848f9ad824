//! What dashboards ask nodes for.

use std::collections::BTreeSet;

use super::{Plan, Site, http_get};
use crate::support::vault::Vault;
use crate::support::wait;

/// The metrics of LiteFS 0.5.14, but for those of Go's own library.
const OF_LITEFS: [&str; 16] = [
    "litefs_db_count",
    "litefs_is_primary",
    "litefs_subscriber_count",
    "litefs_lag_seconds",
    "litefs_db_txid",
    "litefs_db_database_write_count",
    "litefs_db_journal_write_count",
    "litefs_db_wal_write_count",
    "litefs_db_shm_write_count",
    "litefs_db_commit_count",
    "litefs_db_ltx_count",
    "litefs_db_ltx_bytes",
    "litefs_db_ltx_reap_count",
    "litefs_db_lag_seconds",
    "litefs_http_stream_count",
    "litefs_http_frame_send_count",
];

/// The names of the metrics of a node.
fn exported(site: &Site, node: usize) -> BTreeSet<String> {
    let text = http_get(&site.nodes[node].url(), "/metrics");
    let names = text.lines().filter(|line| !line.starts_with('#'));
    names.filter_map(|line| Some(line.split(['{', ' ']).next()?.to_owned())).collect()
}

#[test]
fn every_metric_of_litefs_and_of_the_dashboard_is_exported() {
    let backup = Vault::new();
    let lines = format!(
        "backup: {{type: file, path: {}, delay: 20ms, full-sync-interval: 300ms}}",
        backup.path().display()
    );
    let site = Site::with(2, &Plan { lines: Box::leak(lines.into_boxed_str()), ..Plan::default() });
    assert_eq!(site.ask(1, "POST", "/add/a", "").text(), "1");
    // A replica waits for what it cannot have, and asks its primary then.
    let ahead = "cookie: __txid=00000000ffffffff\r\n";
    assert_eq!(site.ask(1, "GET", "/get/a", ahead).text(), "1");
    backup.wait_for_pos("app.db", site.nodes[0].pos("app.db"));
    // The backup listens for changes too.
    let subscribers = || site.metric(0, "litefs_subscriber_count");
    wait::until_true("a replica and the backup", || subscribers() == 2.0);
    let nodes = [exported(&site, 0), exported(&site, 1)];
    for name in OF_LITEFS {
        assert!(nodes.iter().all(|names| names.contains(name)), "{name} is missing");
    }
    let dashboard = include_str!("../../docs/grafana.json");
    let words = dashboard.split(|c: char| !c.is_ascii_lowercase() && c != '_');
    let is_metric = |word: &&str| word.starts_with("litefs_") || word.starts_with("process_");
    let asked: BTreeSet<&str> = words.filter(is_metric).collect();
    assert!(asked.len() > 25, "the dashboard names {asked:?} only");
    for name in asked {
        assert!(nodes.iter().any(|names| names.contains(name)), "nobody exports {name}");
    }
    let complete = site.metric(0, "litefs_backup_complete_timestamp_seconds");
    assert!(complete > 0.0, "the backup has all, and says when");
}
