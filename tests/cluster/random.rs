//! Three nodes with a lease in Consul, a writer on each, and faults by chance: killed, suspended, cut
//! off from Consul or from each other, stopped, promoted. After each round everything is mended, and
//! what was acknowledged is looked for.
//!
//! `LITEFS_TEST_SEED` repeats the faults of a run, `LITEFS_TEST_MINUTES` makes it longer than one minute
//! (`make chaos`). If it fails, copies of the nodes' directories go to `LITEFS_TEST_KEEP`, if that is given.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;

use super::Chance;
use super::lease::{is_primary, primary_of};
use crate::support::consul::{Consul, Link};
use crate::support::image::Image;
use crate::support::local::copy;
use crate::support::node::{Lease, Member, Node, Settings};
use crate::support::{sqlite, wait};

const DB: &str = "app.db";
const TTL: &str = "4s";
const NODES: usize = 3;
/// The same nodes are used for so long: a process of a test may not run for ever.
const SET: Duration = Duration::from_secs(45);
/// Between two faults at the least.
const APART: Duration = Duration::from_millis(200);
/// What a node says when it has got the lease, and before it commits anything.
const ACQUIRED: &str = "primary lease acquired";
/// The log tells milliseconds, and they are read by another clock than those of the writers.
const CLOCKS: Duration = Duration::from_millis(3);
/// Where to copy what a failed run leaves.
const KEEP: &str = "LITEFS_TEST_KEEP";
const DAY: i64 = 24 * 60 * 60 * 1000;

/// A row that SQLite reported as committed.
#[derive(Debug, Clone, Copy)]
struct Ack {
    node: usize,
    row: u64,
    begun: Instant,
    ended: Instant,
}

/// What the writers share.
#[derive(Default)]
struct Log {
    next: AtomicU64,
    paused: AtomicBool,
    ended: AtomicBool,
    acks: Mutex<Vec<Ack>>,
    /// What SQLite complained of, and how often.
    complaints: Mutex<BTreeMap<String, u32>>,
    /// Held by a writer in the middle of a row.
    busy: [Mutex<()>; NODES],
}

/// The text in a row, by which it is found in any file.
fn text(row: u64) -> String {
    format!("row {row:08};")
}

/// One program after the other, each with one row.
fn write(log: &Log, node: usize, file: &Path) {
    while !log.ended.load(Ordering::SeqCst) {
        let busy = log.busy[node].lock().unwrap();
        if log.paused.load(Ordering::SeqCst) {
            drop(busy);
            std::thread::park_timeout(Duration::from_millis(5));
            continue;
        }
        let row = log.next.fetch_add(1, Ordering::SeqCst);
        let sql = format!(".timeout 0\ninsert into t values ({row}, '{}')", text(row));
        let begun = Instant::now();
        match sqlite::try_run(file, &sql) {
            Ok(_) => {
                let ack = Ack { node, row, begun, ended: Instant::now() };
                log.acks.lock().unwrap().push(ack);
            }
            Err(complaint) => {
                *log.complaints.lock().unwrap().entry(complaint).or_default() += 1;
                std::thread::park_timeout(Duration::from_millis(20));
            }
        }
    }
}

/// The wall clock of the log as the one of the writers.
struct Clock {
    now: Instant,
    /// Milliseconds of the day.
    ms: i64,
}

impl Clock {
    fn read() -> Clock {
        let now = Instant::now();
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap();
        Clock { now, ms: since.as_millis() as i64 % DAY }
    }

    /// When a line of a log was written that begins with `time=2026-11-23T07:11:00.890Z`.
    fn of_line(&self, line: &str) -> Option<Instant> {
        let time = line.strip_prefix("time=")?.split_once('T')?.1;
        let parts = time.get(..12)?.split([':', '.']).map(|part| part.parse().ok());
        let &[hours, minutes, seconds, ms]: &[i64; 4] =
            parts.collect::<Option<Vec<i64>>>()?.as_slice().try_into().ok()?;
        let ms = ((hours * 60 + minutes) * 60 + seconds) * 1000 + ms;
        let after = (ms - self.ms + 3 * DAY / 2) % DAY - DAY / 2;
        let distance = Duration::from_millis(after.unsigned_abs());
        if after < 0 { self.now.checked_sub(distance) } else { Some(self.now + distance) }
    }
}

/// What can happen to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Killed,
    Suspended,
    CutOffFromConsul,
    CutOffFromNodes,
    Stopped,
    KilledAndStarted,
    Promoted,
}

const FAULTS: [Fault; 7] = [
    Fault::Killed,
    Fault::Suspended,
    Fault::CutOffFromConsul,
    Fault::CutOffFromNodes,
    Fault::Stopped,
    Fault::KilledAndStarted,
    Fault::Promoted,
];

/// A node, and the ways to it and from it.
struct Place {
    node: Node,
    consul: Link,
    peers: Link,
    is_suspended: bool,
    /// Nothing has happened to it in this round.
    is_well: bool,
    /// Rows that were seen here in this round.
    seen: BTreeSet<u64>,
}

impl Place {
    fn new(number: usize, consul: &Consul, settings: &Settings) -> Place {
        let consul = Link::to(consul.address());
        let (url, hostname) = (format!("http://{}", consul.address()), format!("node{number}"));
        let lease = |advertise| Lease {
            url: &url,
            hostname: &hostname,
            advertise,
            candidate: true,
            ttl: TTL,
        };
        let node = Node::new(settings, Member::Consul(lease("")));
        let peers = Link::to(node.address());
        let advertise = format!("http://{}", peers.address());
        node.configure(settings, Member::Consul(lease(&advertise)));
        Place { node, consul, peers, is_suspended: false, is_well: true, seen: BTreeSet::new() }
    }

    /// When this node became primary.
    fn acquired(&self, clock: &Clock) -> Vec<Instant> {
        let log = self.node.whole_log();
        let lines = log.lines().filter(|line| line.contains(ACQUIRED));
        lines.map(|line| clock.of_line(line).expect("a line with a time")).collect()
    }

    fn is_up(&self) -> bool {
        self.node.is_running() && !self.is_suspended
    }

    fn is_primary(&self) -> bool {
        self.is_up() && is_primary(&self.node)
    }

    /// Lets it happen; whether it could.
    fn suffer(&mut self, fault: Fault) -> bool {
        if fault == Fault::CutOffFromConsul || fault == Fault::CutOffFromNodes {
            let link = if fault == Fault::CutOffFromNodes { &self.peers } else { &self.consul };
            link.cut();
        } else if !self.is_up() {
            return false;
        }
        match fault {
            Fault::CutOffFromConsul | Fault::CutOffFromNodes => {}
            Fault::Killed => self.node.kill(),
            Fault::KilledAndStarted => {
                self.node.kill();
                self.node.spawn();
            }
            Fault::Suspended => {
                self.node.signal(Signal::SIGSTOP);
                self.is_suspended = true;
            }
            // Its exit code is 1 if a writer has the mount open in that moment.
            Fault::Stopped => _ = self.node.stop(),
            // It may be refused; nothing may come of it then.
            Fault::Promoted => _ = self.node.litefs("promote", &[]),
        }
        self.is_well &= fault == Fault::Promoted;
        true
    }

    fn mend(&mut self) {
        self.consul.mend();
        self.peers.mend();
        match self.node.is_running() {
            true => self.node.signal(Signal::SIGCONT),
            false => self.node.spawn(),
        }
        self.is_suspended = false;
    }

    /// The rows here.
    fn rows(&self) -> BTreeSet<u64> {
        let rows = sqlite::try_run(&self.node.file(DB), "select x from t").unwrap_or_default();
        rows.lines().map(|row| row.parse().unwrap()).collect()
    }

    /// The bytes of everything that was set aside here; LTX files as pages.
    fn aside(&self) -> Vec<Vec<u8>> {
        let files = fs::read_dir(self.node.db_dir(DB).lost_found()).into_iter().flatten();
        let content = |entry: std::io::Result<fs::DirEntry>| {
            let bytes = fs::read(entry.unwrap().path()).unwrap();
            let mut pages = Cursor::new(Vec::new());
            match ltx::apply(bytes.as_slice(), &mut pages) {
                Ok(_) => pages.into_inner(),
                Err(_) => bytes,
            }
        };
        files.map(content).collect()
    }
}

struct Cluster {
    consul: Consul,
    places: Vec<Place>,
    log: Arc<Log>,
    writers: Vec<JoinHandle<()>>,
    /// Rows that were acknowledged, are on no node any more, and were found set aside.
    lost: BTreeSet<u64>,
    since: Instant,
    clock: Clock,
}

impl Cluster {
    fn start(mode: &str, settings: &Settings) -> Cluster {
        let consul = Consul::start();
        let place = |number| Place::new(number, &consul, settings);
        let mut places: Vec<Place> = (0..NODES).map(place).collect();
        places.iter_mut().for_each(|place| place.node.start());
        let setup = "create table t(x integer primary key, y text)";
        let setup = format!("pragma journal_mode = {mode}; {setup}");
        sqlite::run(&places[0].node.file(DB), &setup);
        let log = Arc::new(Log::default());
        let writer = |number: usize| {
            let (log, file) = (log.clone(), places[number].node.file(DB));
            std::thread::spawn(move || write(&log, number, &file))
        };
        let writers = (0..NODES).map(writer).collect();
        let since = Instant::now();
        Cluster { consul, places, log, writers, lost: BTreeSet::new(), since, clock: Clock::read() }
    }

    /// Lets some rows be acknowledged, or some time pass: at times more than a lease needs to end.
    fn go_on(&self, chance: &mut Chance) {
        let enough = self.log.acks.lock().unwrap().len() + 5 + chance.below(20) as usize;
        let longest = if chance.below(3) == 0 { 9000 } else { 1500 };
        let least = Instant::now() + 2 * APART;
        let end = least + Duration::from_millis(chance.below(longest));
        wait::until_true("some time", || {
            let acknowledged = self.log.acks.lock().unwrap().len();
            let now = Instant::now();
            now >= end || (now >= least && acknowledged >= enough)
        });
    }

    /// Up to three faults at a time; what happened, in words.
    fn round(&mut self, chance: &mut Chance) -> String {
        let mut story = String::new();
        for place in &mut self.places {
            (place.is_well, place.seen) = (true, BTreeSet::new());
        }
        self.log.paused.store(false, Ordering::SeqCst);
        self.go_on(chance);
        for _ in 0..=chance.below(3) {
            let (any, primary) = (chance.below(NODES as u64) as usize, chance.below(2) == 0);
            let fault = FAULTS[chance.below(FAULTS.len() as u64) as usize];
            let consul = chance.below(12) == 0;
            let leading = self.places.iter().position(Place::is_primary);
            let at = leading.filter(|_| primary).unwrap_or(any);
            let role = if leading == Some(at) { " (primary)" } else { "" };
            if consul {
                self.consul.signal(Signal::SIGSTOP);
                story += "consul suspended; ";
            } else if self.places[at].suffer(fault) {
                let _ = write!(story, "node{at}{role} {fault:?}; ");
            }
            self.see();
            self.go_on(chance);
        }
        self.see();
        story
    }

    /// Notes what those have to which nothing has happened.
    fn see(&mut self) {
        for place in self.places.iter_mut().filter(|place| place.is_well) {
            let rows = place.rows();
            place.seen.extend(rows);
        }
    }

    /// Everything works again, nobody writes, and all nodes agree. The rows that they have.
    fn mend(&mut self, story: &str) -> BTreeSet<u64> {
        self.consul.signal(Signal::SIGCONT);
        self.places.iter_mut().for_each(Place::mend);
        self.log.paused.store(true, Ordering::SeqCst);
        for busy in &self.log.busy {
            drop(busy.lock().unwrap());
        }
        let primary =
            wait::until_or(|| format!("{story}: one primary that all follow"), || self.agreed());
        // A program whose commit was refused leaves its journal, or its frames behind the end of the WAL,
        // to the next writer.
        let row = self.log.next.fetch_add(1, Ordering::SeqCst);
        let sql = format!("insert into t values ({row}, '{}')", text(row));
        let file = self.places[primary].node.file(DB);
        wait::until_or(
            || format!("{story}: a write on node{primary}"),
            || sqlite::try_run(&file, &sql).ok(),
        );
        let pos = self.places[primary].node.pos(DB);
        let mut first = None;
        for (number, place) in self.places.iter().enumerate() {
            place.node.wait_for_pos(DB, pos);
            let found = Image::of_files(&place.node.db_dir(DB)).map(|image| image.checksum());
            if found != Some(pos.checksum) {
                let now = place.node.pos(DB);
                println!("node{number}: pages are {found:?}, not {pos}; it is at {now}");
                println!("{:?}", self.log.complaints.lock().unwrap());
            }
            let (image, _) = super::check_node(&place.node, DB, pos).expect("a database");
            let first = first.get_or_insert_with(|| image.bytes().to_vec());
            assert!(first == image.bytes(), "{story}: pages differ at {pos}");
        }
        self.places[primary].rows()
    }

    /// The primary that all other nodes follow.
    fn agreed(&self) -> Option<usize> {
        let primary = self.places.iter().position(Place::is_primary)?;
        let name = format!("node{primary}");
        let follows = |n: usize| n == primary || primary_of(&self.places[n].node) == name;
        (0..NODES).all(follows).then_some(primary)
    }

    /// What was acknowledged is there, but for what was on no node that was well; and that was set
    /// aside.
    fn look(&mut self, rows: &BTreeSet<u64>, story: &str) {
        for (number, place) in self.places.iter().enumerate().filter(|(_, place)| place.is_well) {
            let gone: Vec<_> = place.seen.difference(rows).collect();
            assert!(
                gone.is_empty(),
                "{story}: rows {gone:?} had reached node{number}, and are gone"
            );
        }
        let acks = self.log.acks.lock().unwrap().clone();
        let is_missing = |row: &u64| !rows.contains(row) && !self.lost.contains(row);
        let missing: Vec<u64> = acks.iter().map(|ack| ack.row).filter(is_missing).collect();
        if !missing.is_empty() {
            let aside: Vec<Vec<u8>> = self.places.iter().flat_map(Place::aside).collect();
            for row in &missing {
                let text = text(*row).into_bytes();
                let has = |bytes: &Vec<u8>| bytes.windows(text.len()).any(|part| part == text);
                let ack = acks.iter().find(|ack| ack.row == *row);
                assert!(aside.iter().any(has), "{story}: {ack:?} is gone without a trace");
            }
        }
        self.lost.extend(missing);
        check_one_at_a_time(&acks, &self.tenures(), story);
    }

    /// When which node became primary, in order.
    fn tenures(&self) -> Vec<(Instant, usize)> {
        let places = self.places.iter().enumerate();
        let of = |(number, place): (usize, &Place)| {
            place.acquired(&self.clock).into_iter().map(move |at| (at, number))
        };
        let mut tenures: Vec<_> = places.flat_map(of).collect();
        tenures.sort();
        tenures
    }

    /// Tells what led to a failure.
    fn testify(&self) {
        for ack in self.log.acks.lock().unwrap().iter().rev().take(200).rev() {
            println!("{ack:?}");
        }
        println!("primaries: {:?}", self.tenures());
        println!("{:?}", self.log.complaints.lock().unwrap());
        let Some(keep) = std::env::var_os(KEEP) else { return };
        for (number, place) in self.places.iter().enumerate() {
            let to = Path::new(&keep).join(format!("node{number}"));
            fs::create_dir_all(&to).unwrap();
            copy(&place.node.data(), &to.join("data"));
            fs::write(to.join("log"), place.node.whole_log()).unwrap();
        }
    }

    fn end(mut self) -> Totals {
        self.log.ended.store(true, Ordering::SeqCst);
        for writer in self.writers.drain(..) {
            writer.join().unwrap();
        }
        let mut ends: Vec<_> = self.log.acks.lock().unwrap().iter().map(|ack| ack.ended).collect();
        ends.sort();
        let gaps = ends.windows(2).map(|two| two[1].duration_since(two[0]));
        Totals {
            tried: self.log.next.load(Ordering::SeqCst),
            acknowledged: ends.len(),
            lost: self.lost.len(),
            gap: gaps.max().unwrap_or_default(),
            rounds: 0,
        }
    }
}

/// No node acknowledges anything while another one is primary: between the moments at which one and the
/// next one got the lease only the first may commit. What is acknowledged was committed at some time
/// between its beginning and its end, so that time must not lie outside all primaryships of its node.
fn check_one_at_a_time(acks: &[Ack], tenures: &[(Instant, usize)], story: &str) {
    for ack in acks {
        let ends = tenures.iter().skip(1).map(|(end, _)| Some(*end)).chain([None]);
        let mut own = tenures.iter().zip(ends).filter(|((_, node), _)| *node == ack.node);
        let could = own.any(|((begin, _), end)| {
            *begin <= ack.ended + CLOCKS && end.is_none_or(|end| ack.begun <= end + CLOCKS)
        });
        assert!(
            could,
            "{story}: {ack:?} was acknowledged while another node was primary: {tenures:?}"
        );
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.testify();
        }
        self.log.ended.store(true, Ordering::SeqCst);
    }
}

/// What came of a run.
#[derive(Default)]
struct Totals {
    tried: u64,
    acknowledged: usize,
    lost: usize,
    gap: Duration,
    rounds: u32,
}

impl Totals {
    fn add(&mut self, other: Totals) {
        self.tried += other.tried;
        self.acknowledged += other.acknowledged;
        self.lost += other.lost;
        self.gap = self.gap.max(other.gap);
    }
}

/// What is kept is to be read.
fn log_lines() -> &'static str {
    match std::env::var_os(KEEP) {
        Some(_) => "log: {timestamp: true, debug: true}",
        None => "log: {timestamp: true}",
    }
}

fn of_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn nodes_agree_after_faults_by_chance() {
    let drawn = u64::from(std::process::id()) * 0x9e37_79b9 + 1;
    let seed = of_environment("LITEFS_TEST_SEED").unwrap_or(drawn);
    println!("LITEFS_TEST_SEED={seed}");
    let minutes = of_environment("LITEFS_TEST_MINUTES").unwrap_or(1);
    let end = Instant::now() + Duration::from_secs(60 * minutes);
    let (mut chance, mut totals) = (Chance(seed), Totals::default());
    for set in 0.. {
        let (mode, passthrough) = [("wal", "auto"), ("delete", "auto"), ("wal", "off")][set % 3];
        let settings = Settings { passthrough, lines: log_lines(), ..Settings::default() };
        let mut cluster = Cluster::start(mode, &settings);
        while cluster.since.elapsed() < SET && Instant::now() < end {
            let story = cluster.round(&mut chance);
            println!("{:3} {mode} {passthrough}: {story}", totals.rounds);
            let story =
                format!("seed {seed}, {mode} {passthrough}, round {}: {story}", totals.rounds);
            let rows = cluster.mend(&story);
            cluster.look(&rows, &story);
            totals.rounds += 1;
        }
        totals.add(cluster.end());
        if Instant::now() >= end {
            break;
        }
    }
    let Totals { tried, acknowledged, lost, gap, rounds } = totals;
    println!(
        "{rounds} rounds, {tried} rows tried, {acknowledged} acknowledged, {lost} lost by asynchronous \
         replication and all of them in lost+found, {} ms without a write at the most",
        gap.as_millis()
    );
    assert!(acknowledged > 0, "nothing was written");
}
