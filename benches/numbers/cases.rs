//! What is measured, a function each: it starts the nodes it needs and gives rows of the table.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use super::Plan;
use super::node::Node;
use super::report::{Row, Stats, Target, Ways};
use super::work::{self, Journal};

/// How long commits and reads of one round go on at scale 1.
const ROUND_MS: u64 = 2000;
/// Rows of the large transaction.
const BULK_ROWS: u64 = 200_000;
/// Rows of the database that is read.
const READ_ROWS: u64 = 100_000;
/// Bytes of the small and the large database in which a row is committed.
const SIZES: [u64; 2] = [8 << 20, 1 << 30];
/// Bytes of the database that is restarted and sent to a new replica.
const RESTART_BYTES: u64 = 4 << 30;
/// Commits that are looked for on a replica.
const VISIBLE_COMMITS: u64 = 500;
/// Memory that a node may use whatever the size of its databases.
const MEMORY_BASE: u64 = 64 << 20;
/// At most this many new replicas are filled: each takes as much disk as the primary.
const FILLS_MAX: usize = 2;

/// One case.
pub struct Case {
    /// The word for `ONLY`.
    pub name: &'static str,
    /// Measures.
    pub run: fn(&Bench) -> Result<Vec<Row>>,
}

/// In the order of the table.
pub const ALL: &[Case] = &[
    Case { name: "wal-normal", run: wal_normal },
    Case { name: "wal-full", run: wal_full },
    Case { name: "delete-full", run: delete_full },
    Case { name: "bulk", run: bulk },
    Case { name: "reads", run: reads },
    Case { name: "locks", run: locks },
    Case { name: "replica", run: replica },
    Case { name: "visible", run: visible },
    Case { name: "db-size", run: db_size },
    Case { name: "restart", run: restart },
];

/// What a case works with: directories of its own.
pub struct Bench<'a> {
    plan: &'a Plan,
    root: PathBuf,
    ways: RefCell<Option<Ways>>,
}

impl<'a> Bench<'a> {
    /// In `root`, which is made.
    pub fn new(plan: &'a Plan, root: PathBuf) -> Result<Bench<'a>> {
        std::fs::create_dir_all(root.join("bare")).context("make bare directory")?;
        Ok(Bench { plan, root, ways: RefCell::default() })
    }

    /// How the nodes of the case served their mounts.
    pub fn ways(&self) -> Option<Ways> {
        self.ways.borrow().clone()
    }

    fn primary(&self) -> Result<Node> {
        let mut node = Node::primary(self.root.join("primary"), self.plan)?;
        node.start()?;
        *self.ways.borrow_mut() = Some(Ways::of_log(&node.log(), &self.plan.passthrough));
        Ok(node)
    }

    fn replica(&self, name: &str, primary: &Node) -> Result<Node> {
        let mut node = Node::replica(self.root.join(name), self.plan, primary)?;
        node.start()?;
        Ok(node)
    }

    fn round_time(&self) -> Duration {
        Duration::from_millis(self.plan.scaled(ROUND_MS))
    }

    /// Measures on a new database in the bare directory, then in the mount, round by round.
    fn alternate(
        &self,
        node: &Node,
        journal: Journal,
        measure: impl Fn(&rusqlite::Connection) -> Result<f64>,
    ) -> Result<Vec<[f64; 2]>> {
        let one = |dir: &Path, round: usize| -> Result<f64> {
            let db = work::open(&dir.join(format!("round{round}")), journal)?;
            self.settle()?;
            measure(&db)
        };
        let bare = self.root.join("bare");
        let rounds = 0..self.plan.rounds;
        rounds.map(|round| Ok([one(&bare, round)?, one(&node.mount(), round)?])).collect()
    }

    /// Lets the disk finish what was written before, so that the next measurement does not pay.
    fn settle(&self) -> Result<()> {
        let root = std::fs::File::open(&self.root)?;
        nix::unistd::syncfs(&root).context("sync file system")
    }
}

fn wal_normal(bench: &Bench) -> Result<Vec<Row>> {
    one_row_commits(bench, "WAL NORMAL, one-row commits", Journal::WalNormal, (0.04, 0.20))
}

fn wal_full(bench: &Bench) -> Result<Vec<Row>> {
    one_row_commits(bench, "WAL FULL, one-row commits", Journal::WalFull, (0.30, 0.70))
}

fn delete_full(bench: &Bench) -> Result<Vec<Row>> {
    one_row_commits(bench, "DELETE FULL, one-row commits", Journal::DeleteFull, (0.25, 0.40))
}

fn one_row_commits(
    bench: &Bench,
    name: &str,
    journal: Journal,
    (dev, uring): (f64, f64),
) -> Result<Vec<Row>> {
    let node = bench.primary()?;
    let rounds = bench.alternate(&node, journal, |db| work::commits(db, bench.round_time()))?;
    Ok(vec![Row::beside(name, "commits/s", &rounds, Target::AtLeast(dev, uring))])
}

fn bulk(bench: &Bench) -> Result<Vec<Row>> {
    let node = bench.primary()?;
    let rows = bench.plan.scaled(BULK_ROWS);
    let rounds = bench.alternate(&node, Journal::WalNormal, |db| work::bulk(db, rows))?;
    let name = format!("{rows} rows in one transaction");
    Ok(vec![Row::beside(&name, "s", &rounds, Target::AtMost(2.5))])
}

fn reads(bench: &Bench) -> Result<Vec<Row>> {
    let node = bench.primary()?;
    let rows = bench.plan.scaled(READ_ROWS);
    let rounds = bench.alternate(&node, Journal::WalNormal, |db| {
        work::bulk(db, rows)?;
        db.query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(()))?;
        work::reads(db, rows, bench.round_time())
    })?;
    Ok(vec![Row::beside("point reads by key", "reads/s", &rounds, Target::AtLeast(0.04, 0.25))])
}

fn locks(bench: &Bench) -> Result<Vec<Row>> {
    let node = bench.primary()?;
    let mut calls = Vec::new();
    for round in 0..bench.plan.rounds {
        let mut both = [(0.0, 0.0); 2];
        for (dir, found) in [bench.root.join("bare"), node.mount()].iter().zip(&mut both) {
            let path = dir.join(format!("round{round}"));
            // The wal-index lives as long as somebody has the database open.
            let _db = work::open(&path, Journal::WalNormal)?;
            let index = dir.join(format!("round{round}-shm"));
            let times = Stats::new(work::locks(&index, bench.round_time())?);
            *found = (times.quantile(0.5), times.quantile(0.99));
        }
        calls.push(both);
    }
    let rounds = |part: fn(&(f64, f64)) -> f64| -> Vec<[f64; 2]> {
        calls.iter().map(|both| [part(&both[0]), part(&both[1])]).collect()
    };
    Ok(vec![
        Row::beside("lock call p50", "us", &rounds(|times| times.0), Target::None),
        Row::beside("lock call p99", "us", &rounds(|times| times.1), Target::None),
    ])
}

/// Commits with a replica that follows; then a replica that has some seconds to catch up on.
fn replica(bench: &Bench) -> Result<Vec<Row>> {
    let primary = bench.primary()?;
    let replica = bench.replica("replica", &primary)?;
    let time = bench.round_time();
    let rounds = bench.alternate(&primary, Journal::WalNormal, |db| work::commits(db, time))?;
    let mut applied = Vec::new();
    for round in 0..bench.plan.rounds {
        let name = format!("behind{round}");
        let db = work::open(&primary.mount().join(&name), Journal::WalNormal)?;
        caught_up(&primary, &replica, &name)?;
        replica.signal(Signal::SIGSTOP)?;
        let commits = work::commits(&db, time).map(|rate| rate * time.as_secs_f64());
        let start = Instant::now();
        replica.signal(Signal::SIGCONT)?;
        caught_up(&primary, &replica, &name)?;
        applied.push(commits? / start.elapsed().as_secs_f64());
    }
    let name = "WAL NORMAL, one-row commits with one replica";
    Ok(vec![
        Row::beside(name, "commits/s", &rounds, Target::AtLeast(0.02, 0.10)),
        Row::alone("catching up on one-row commits", "commits/s", applied, Target::None),
    ])
}

/// Waits until `replica` stands where `primary` stands.
fn caught_up(primary: &Node, replica: &Node, name: &str) -> Result<()> {
    let pos = primary.pos(name).context("read position of primary")?;
    replica.wait_for_pos(name, Some(pos))
}

fn visible(bench: &Bench) -> Result<Vec<Row>> {
    let primary = bench.primary()?;
    let replica = bench.replica("replica", &primary)?;
    let ours = work::open(&primary.mount().join("db"), Journal::WalNormal)?;
    caught_up(&primary, &replica, "db")?;
    let theirs = rusqlite::Connection::open(replica.mount().join("db"))?;
    let (mut p50, mut p99) = (Vec::new(), Vec::new());
    for _ in 0..bench.plan.rounds {
        let times = work::visible(&ours, &theirs, bench.plan.scaled(VISIBLE_COMMITS))?;
        let times = Stats::new(times);
        p50.push(times.quantile(0.5));
        p99.push(times.quantile(0.99));
    }
    Ok(vec![
        Row::alone("commit to visible on a replica p50", "ms", p50, Target::AtMost(2.0)),
        Row::alone("commit to visible on a replica p99", "ms", p99, Target::AtMost(10.0)),
    ])
}

/// One-row commits in a small and in a large database, both in the mount.
fn db_size(bench: &Bench) -> Result<Vec<Row>> {
    let node = bench.primary()?;
    let open = |size: u64| -> Result<_> {
        let db = work::open(&node.mount().join(format!("size{size}")), Journal::WalNormal)?;
        work::fill(&db, bench.plan.scaled(size))?;
        Ok(db)
    };
    let [small, large] = SIZES.map(open);
    let (small, large) = (small?, large?);
    bench.settle()?;
    let micros = |db| work::commits(db, bench.round_time()).map(|rate| 1e6 / rate);
    let rounds: Result<Vec<[f64; 2]>> =
        (0..bench.plan.rounds).map(|_| Ok([micros(&small)?, micros(&large)?])).collect();
    let name = "one-row commit, 8 MB (bare column) and 1 GB";
    Ok(vec![Row::beside(name, "us", &rounds?, Target::AtMost(1.25))])
}

/// A large database: memory, a new replica, a clean stop and a start.
fn restart(bench: &Bench) -> Result<Vec<Row>> {
    let mut node = bench.primary()?;
    let bytes = bench.plan.scaled(RESTART_BYTES);
    let pages = {
        let db = work::open(&node.mount().join("db"), Journal::WalNormal)?;
        work::fill(&db, bytes)?;
        work::page_count(&db)?
    };
    let gigabytes = (pages * 4096) as f64 / f64::from(1 << 30);
    let mut memory = vec![per_page(&node, pages)?];
    let mut starts = Vec::new();
    for _ in 0..bench.plan.rounds {
        node.stop()?;
        bench.settle()?;
        let start = Instant::now();
        node.spawn()?;
        node.wait_for_pos("db", None)?;
        starts.push(start.elapsed().as_secs_f64());
        memory.push(per_page(&node, pages)?);
    }
    let mut fills = Vec::new();
    for round in 0..bench.plan.rounds.min(FILLS_MAX) {
        bench.settle()?;
        let mut replica =
            Node::replica(bench.root.join(format!("replica{round}")), bench.plan, &node)?;
        let start = Instant::now();
        replica.spawn()?;
        caught_up(&node, &replica, "db")?;
        fills.push((pages * 4096) as f64 / 1e6 / start.elapsed().as_secs_f64());
        memory.push(per_page(&replica, pages)?);
    }
    let name = |what: &str| format!("{what}, {gigabytes:.2} GB");
    Ok(vec![
        Row::alone(&name("start after a clean stop"), "s", starts, Target::AtMost(1.0)),
        Row::alone(&name("new replica"), "MB/s", fills, Target::None),
        Row::alone(&name("memory above 64 MB"), "bytes/page", memory, Target::AtMost(16.0)),
    ])
}

/// Resident bytes above [`MEMORY_BASE`] for each of `pages` pages.
fn per_page(node: &Node, pages: u64) -> Result<f64> {
    Ok(node.resident_bytes()?.saturating_sub(MEMORY_BASE) as f64 / pages as f64)
}
