//! What an application does, timed: commits, reads and locks of one process, through its own
//! bundled SQLite.

use std::fs::OpenOptions;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::fcntl::{FcntlArg, fcntl};
use rusqlite::Connection;

/// Bytes of a row of a one-row commit.
const ROW_BYTES: usize = 100;
/// Bytes of a row that fills a database: nearly a page.
const FILL_ROW_BYTES: usize = 4000;
/// Bytes of a transaction that fills a database.
const FILL_COMMIT_BYTES: u64 = 32 << 20;
/// The byte of the wal-index that the lock calls take: READ4, which one idle connection leaves alone.
const LOCK_BYTE: i64 = 127;

/// How a database is journalled and synced.
#[derive(Debug, Clone, Copy)]
pub enum Journal {
    /// WAL, `synchronous=NORMAL`.
    WalNormal,
    /// WAL, `synchronous=FULL`.
    WalFull,
    /// DELETE, `synchronous=FULL`.
    DeleteFull,
}

/// Opens a database with a table `t(k, v)`.
pub fn open(path: &Path, journal: Journal) -> Result<Connection> {
    let (mode, synchronous) = match journal {
        Journal::WalNormal => ("wal", "normal"),
        Journal::WalFull => ("wal", "full"),
        Journal::DeleteFull => ("delete", "full"),
    };
    let db = Connection::open(path).with_context(|| format!("open {}", path.display()))?;
    db.busy_timeout(Duration::from_secs(10))?;
    db.execute_batch(&format!(
        "pragma page_size = 4096; pragma journal_mode = {mode}; pragma synchronous = {synchronous};
         create table if not exists t(k integer primary key, v blob)"
    ))?;
    Ok(db)
}

/// Commits one row after the other for `time`; commits per second.
pub fn commits(db: &Connection, time: Duration) -> Result<f64> {
    let mut insert = db.prepare("insert into t(v) values (?1)")?;
    let row = [7_u8; ROW_BYTES];
    let (start, mut count) = (Instant::now(), 0_u32);
    while start.elapsed() < time {
        insert.execute([&row[..]])?;
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

/// Inserts `rows` rows in one transaction; seconds.
pub fn bulk(db: &Connection, rows: u64) -> Result<f64> {
    let start = Instant::now();
    db.execute_batch("begin immediate")?;
    let mut insert = db.prepare("insert into t(v) values (?1)")?;
    let row = [7_u8; ROW_BYTES];
    for _ in 0..rows {
        insert.execute([&row[..]])?;
    }
    db.execute_batch("commit")?;
    Ok(start.elapsed().as_secs_f64())
}

/// Reads rows by random keys up to `rows` for `time`, each in a transaction; reads per second.
pub fn reads(db: &Connection, rows: u64, time: Duration) -> Result<f64> {
    let mut select = db.prepare("select v from t where k = ?1")?;
    let mut random = Random(1);
    let (start, mut count) = (Instant::now(), 0_u32);
    while start.elapsed() < time {
        let key = (random.next() % rows + 1) as i64;
        let found = select.query_row([key], |row| Ok(row.get_ref(0)?.as_blob()?.len()))?;
        anyhow::ensure!(found == ROW_BYTES, "row {key} has {found} bytes");
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

/// Fills a database with `bytes` of rows that do not compress.
pub fn fill(db: &Connection, bytes: u64) -> Result<()> {
    let mut insert = db.prepare("insert into t(v) values (?1)")?;
    let mut random = Random(bytes | 1);
    let mut row = [0_u8; FILL_ROW_BYTES];
    let mut left = bytes;
    while left > 0 {
        let mut now = left.min(FILL_COMMIT_BYTES);
        left -= now;
        db.execute_batch("begin immediate")?;
        while now > 0 {
            row.chunks_exact_mut(8).for_each(|to| to.copy_from_slice(&random.next().to_le_bytes()));
            insert.execute([&row[..]])?;
            now = now.saturating_sub(FILL_ROW_BYTES as u64);
        }
        db.execute_batch("commit")?;
    }
    db.query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(()))?;
    Ok(())
}

/// The pages of a database.
pub fn page_count(db: &Connection) -> Result<u64> {
    Ok(db.query_row("pragma page_count", [], |row| row.get::<_, i64>(0))? as u64)
}

/// Locks and unlocks a byte of the wal-index at `path` for `time`; microseconds of each call.
pub fn locks(path: &Path, time: Duration) -> Result<Vec<f64>> {
    let file = OpenOptions::new().read(true).write(true).open(path).context("open wal-index")?;
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < time {
        for kind in [libc::F_WRLCK, libc::F_UNLCK] {
            let lock = libc::flock {
                l_type: kind as libc::c_short,
                l_whence: libc::SEEK_SET as libc::c_short,
                l_start: LOCK_BYTE,
                l_len: 1,
                l_pid: 0,
            };
            let call = Instant::now();
            fcntl(&file, FcntlArg::F_SETLK(&lock)).context("lock byte of wal-index")?;
            times.push(call.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(times)
}

/// Commits rows on `primary`, some milliseconds apart, and looks for each on `replica`: milliseconds
/// from the commit's return to the first read that sees it.
pub fn visible(primary: &Connection, replica: &Connection, count: u64) -> Result<Vec<f64>> {
    let mut insert = primary.prepare("insert into t(v) values (?1)")?;
    let mut select = replica.prepare("select max(k) from t")?;
    let mut random = Random(count | 1);
    let mut times = Vec::new();
    for _ in 0..count {
        insert.execute([&[7_u8; ROW_BYTES][..]])?;
        let committed = Instant::now();
        let key = primary.last_insert_rowid();
        while select.query_row([], |row| row.get::<_, Option<i64>>(0))? < Some(key) {
            anyhow::ensure!(committed.elapsed() < Duration::from_secs(30), "row {key} never came");
            std::thread::sleep(Duration::from_micros(50));
        }
        times.push(committed.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep(Duration::from_micros(2000 + random.next() % 8000));
    }
    Ok(times)
}

/// Numbers that look random, the same ones each time (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
