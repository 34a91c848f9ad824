//! `litefs status`: what the local node knows and does, as a table or as JSON.

use super::flags::{Flag, Flags, Kind, Spec};
use super::{Failure, block_on, call, say, usage};
use crate::http::report::{Status, StatusDatabase, StatusRole};

pub const SPEC: Spec = Spec {
    name: "status",
    arguments: "",
    about: "Shows role, primary, lag and databases of a node.",
    flags: &[
        Flag { name: "json", kind: Kind::Switch, about: "as JSON" },
        call::URL,
        call::CONFIG,
        call::NO_EXPAND_ENV,
    ],
};

pub fn run(flags: Flags) -> Result<u8, Failure> {
    if !flags.arguments.is_empty() {
        return Err(usage(anyhow::anyhow!("too many arguments")));
    }
    let client = call::client(&flags)?;
    let status = block_on(client.status())??;
    match flags.is_on("json") {
        true => say(serde_json::to_string_pretty(&status)?),
        false => say(table(&status)),
    }
    Ok(0)
}

fn table(status: &Status) -> String {
    let mut text = columns(&node(status), "");
    if status.databases.is_empty() {
        return text + "\n\nno databases";
    }
    let head = ["DATABASE", "POSITION", "MODE", "SIZE", "STATE"].map(str::to_owned).to_vec();
    let mut rows = vec![head];
    rows.extend(status.databases.iter().map(database));
    text += "\n\n";
    text += &columns(&rows, "");
    text
}

fn node(status: &Status) -> Vec<Vec<String>> {
    let role = match status.role {
        StatusRole::Primary => "primary",
        StatusRole::Replica => "replica",
        StatusRole::Unknown => "no primary known",
    };
    let primary = match (&status.primary, status.role) {
        (Some(primary), _) => format!("{} at {}", primary.hostname, primary.advertise_url),
        (None, StatusRole::Primary) => "this node".to_owned(),
        (None, _) => "-".to_owned(),
    };
    let lag = status.lag_ms.map_or("-".to_owned(), |lag| format!("{lag} ms"));
    let lines = [
        ("node", status.node_id.clone()),
        ("version", status.version.clone()),
        ("cluster", status.cluster_id.clone().unwrap_or("-".to_owned())),
        ("role", role.to_owned()),
        ("ready", if status.ready { "yes" } else { "no" }.to_owned()),
        ("candidate", if status.candidate { "yes" } else { "no" }.to_owned()),
        ("primary", primary),
        ("lag", lag),
        ("data", status.path.clone()),
    ];
    lines.map(|(name, value)| vec![format!("{name}:"), value]).to_vec()
}

fn database(database: &StatusDatabase) -> Vec<String> {
    let size = u64::from(database.page_size) * u64::from(database.page_count);
    let mut state = match &database.failure {
        Some(reason) => format!("FAILED: {reason}"),
        None => "ok".to_owned(),
    };
    if let Some(problem) = &database.backup_problem {
        state += &format!(", BACKUP STANDS STILL: {problem}");
    }
    if database.lost_found > 0 {
        state += &format!(", {} files in lost+found", database.lost_found);
    }
    let name = database.name.clone();
    vec![name, database.position.clone(), database.mode.clone(), human_size(size), state]
}

/// Bytes with a unit that leaves up to four digits.
fn human_size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let steps = (bytes.max(1).ilog2() / 10).min(units.len() as u32 - 1);
    match steps {
        0 => format!("{bytes} B"),
        steps => {
            format!("{:.1} {}", bytes as f64 / 1024_f64.powi(steps as i32), units[steps as usize])
        }
    }
}

/// Rows with their cells below each other. The last cell of a row is as long as it is.
fn columns(rows: &[Vec<String>], indent: &str) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<_> = (0..count).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        format!("{indent}{}", line.trim_end())
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::report::StatusPrimary;

    fn status() -> Status {
        Status {
            version: "LiteFS v1".to_owned(),
            node_id: "00000000000000AB".to_owned(),
            cluster_id: None,
            role: StatusRole::Replica,
            ready: true,
            candidate: true,
            path: "/data".to_owned(),
            primary: Some(StatusPrimary {
                hostname: "a".to_owned(),
                advertise_url: "http://a:20202".to_owned(),
            }),
            lag_ms: Some(12),
            peers: Vec::new(),
            databases: Vec::new(),
        }
    }

    #[test]
    fn a_table_shows_node_and_databases() {
        let db = StatusDatabase {
            name: "app.db".to_owned(),
            position: "01/02".to_owned(),
            mode: "wal".to_owned(),
            page_size: 4096,
            page_count: 640,
            failure: None,
            passthrough: None,
            hwm: 0,
            backup_problem: None,
            lost_found: 0,
        };
        let failed = StatusDatabase {
            name: "x".to_owned(),
            failure: Some("disk full".to_owned()),
            lost_found: 2,
            backup_problem: Some("two histories".to_owned()),
            page_count: 0,
            ..db.clone()
        };
        let status = Status { databases: vec![db, failed], ..status() };
        let expected = "\
node:       00000000000000AB
version:    LiteFS v1
cluster:    -
role:       replica
ready:      yes
candidate:  yes
primary:    a at http://a:20202
lag:        12 ms
data:       /data

DATABASE  POSITION  MODE  SIZE     STATE
app.db    01/02     wal   2.5 MiB  ok
x         01/02     wal   0 B      FAILED: disk full, BACKUP STANDS STILL: two histories, 2 files in lost+found";
        assert_eq!(table(&status), expected);
    }

    #[test]
    fn a_node_without_databases_says_so() {
        assert!(table(&status()).ends_with("data:       /data\n\nno databases"));
    }

    #[test]
    fn sizes_have_units() {
        let sizes = [0, 1023, 1024, 5 << 30].map(human_size);
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "5.0 GiB"]);
    }
}
