//! Three nodes for long: many databases, mixed load on every node, nodes killed and stopped in turn,
//! leases handed over, disks that fill up, slow links. Memory, file descriptors and disk of each node are
//! noted all the time and must stay bounded; in the end all nodes agree on every database.
//!
//! `LITEFS_TEST_MINUTES` makes it long (`make soak`); it leaves `samples.csv` and `soak.svg` in the
//! directory that `LITEFS_TEST_DIR` names.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Chance;
use super::lease::{is_primary, primary_of};
use crate::support::consul::{Consul, Link};
use crate::support::image::Image;
use crate::support::node::{Lease, Member, Node, Settings};
use crate::support::{sqlite, wait};

const NODES: usize = 3;
const TTL: &str = "4s";
/// The disk of each node.
const DISK: &str = "256m";
/// So much stays free of a disk that is full.
const SPARE_KB: u64 = 512;
/// Bytes a second over a slow link.
const SLOW: u64 = 200_000;
/// Rows of a database, at the most.
const ROWS: u64 = 300;
/// From this length of a run on, its end is compared with its beginning.
const LONG: Duration = Duration::from_secs(300);
/// What no node may ever exceed: memory in KiB, descriptors.
const MEMORY_KB_MAX: u64 = 1 << 20;
const DESCRIPTORS_MAX: u64 = 4000;

fn run(command: &[&str], path: &Path) -> bool {
    Command::new(command[0]).args(&command[1..]).arg(path).status().is_ok_and(|s| s.success())
}

/// A node with a disk of its own and a link that can be slow.
struct Place {
    node: Node,
    peers: Link,
    is_full: bool,
}

impl Place {
    fn new(number: usize, consul: &Consul) -> Place {
        let settings = Settings {
            data: ", retention: 15s, retention-monitor-interval: 5s",
            ..Settings::default()
        };
        let (url, hostname) = (consul.url(), format!("node{number}"));
        let lease = |advertise| Lease {
            url: &url,
            hostname: &hostname,
            advertise,
            candidate: true,
            ttl: TTL,
        };
        let node = Node::new(&settings, Member::Consul(lease("")));
        let peers = Link::to(node.address());
        let advertise = format!("http://{}", peers.address());
        node.configure(&settings, Member::Consul(lease(&advertise)));
        fs::create_dir_all(node.data()).unwrap();
        let option = format!("size={DISK}");
        assert!(run(&["mount", "-t", "tmpfs", "-o", &option, "tmpfs"], &node.data()));
        Place { node, peers, is_full: false }
    }

    fn filler(&self) -> PathBuf {
        self.node.data().join("filler")
    }

    /// Used and free space of its disk in KiB; what fills it up on purpose does not count.
    fn disk(&self) -> (u64, u64) {
        let stat = nix::sys::statvfs::statvfs(&self.node.data()).unwrap();
        let kb = |blocks: u64| blocks * stat.fragment_size() / 1024;
        let filler = fs::metadata(self.filler()).map_or(0, |meta| meta.len() / 1024);
        (kb(stat.blocks() - stat.blocks_free()) - filler, kb(stat.blocks_free()))
    }

    fn fill(&mut self) {
        let room = self.disk().1.saturating_sub(SPARE_KB) * 1024;
        let file = File::create(self.filler()).unwrap();
        // What others write meanwhile may take the room first.
        self.is_full = nix::fcntl::posix_fallocate(&file, 0, room as i64).is_ok();
    }

    fn mend(&mut self) {
        let _ = fs::remove_file(self.filler());
        self.peers.limit(0);
        self.is_full = false;
        if !self.node.is_running() {
            self.node.spawn();
        }
    }

    /// Memory in KiB, descriptors, disk in KiB; none if it does not run.
    fn sample(&self) -> Option<[u64; 3]> {
        let pid = self.node.is_running().then(|| self.node.pid())?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let memory = memory.trim().trim_end_matches(" kB").parse().ok()?;
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64;
        Some([memory, descriptors, self.disk().0])
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.node.kill();
        run(&["umount", "-l"], &self.node.data());
    }
}

/// What the applications share.
#[derive(Default)]
struct Load {
    ended: AtomicBool,
    written: AtomicU64,
    read: AtomicU64,
    refused: AtomicU64,
}

fn name(database: u64) -> String {
    format!("db{database:03}.db")
}

/// One program after the other on one node.
fn work(load: &Load, mount: &Path, databases: u64, mut chance: Chance) {
    while !load.ended.load(Ordering::SeqCst) {
        let file = mount.join(name(chance.below(databases)));
        let (row, n) = (chance.below(ROWS), chance.below(100));
        let sql = match n {
            0..40 => "select count(*), sum(length(y)) from t".to_owned(),
            40..80 => format!(
                "insert or replace into t values ({row}, hex(randomblob({})))",
                chance.below(1500)
            ),
            80..90 => format!("update t set y = y || 'x' where x % 20 = {}", row % 20),
            90..96 => format!("delete from t where x % 10 = {}", row % 10),
            96..98 => "pragma wal_checkpoint(truncate)".to_owned(),
            _ => "vacuum".to_owned(),
        };
        match sqlite::try_run(&file, &format!(".timeout 50\n{sql}")) {
            Ok(_) if n < 40 => load.read.fetch_add(1, Ordering::Relaxed),
            Ok(_) => load.written.fetch_add(1, Ordering::Relaxed),
            Err(_) => {
                std::thread::park_timeout(Duration::from_millis(20));
                load.refused.fetch_add(1, Ordering::Relaxed)
            }
        };
    }
}

/// Seconds since the start, node, what it uses.
type Sample = (u64, usize, [u64; 3]);

struct Soak {
    places: Vec<Place>,
    databases: u64,
    samples: Vec<Sample>,
    begun: Instant,
    _consul: Consul,
}

impl Soak {
    fn start(databases: u64) -> Soak {
        let consul = Consul::start();
        let mut places: Vec<Place> = (0..NODES).map(|number| Place::new(number, &consul)).collect();
        places.iter_mut().for_each(|place| place.node.start());
        for database in 0..databases {
            let mode = ["wal", "wal", "delete", "truncate"][database as usize % 4];
            let sql =
                format!("pragma journal_mode={mode}; create table t(x integer primary key, y)");
            sqlite::run(&places[0].node.file(&name(database)), &format!("{sql};"));
        }
        Soak { places, databases, samples: Vec::new(), begun: Instant::now(), _consul: consul }
    }

    fn note(&mut self) {
        let second = self.begun.elapsed().as_secs();
        for (number, place) in self.places.iter().enumerate() {
            if let Some(sample) = place.sample() {
                assert!(sample[0] < MEMORY_KB_MAX, "node{number} uses {} KiB", sample[0]);
                assert!(sample[1] < DESCRIPTORS_MAX, "node{number}: {} descriptors", sample[1]);
                self.samples.push((second, number, sample));
            }
        }
    }

    /// Something happens to a node; in words.
    fn suffer(&mut self, chance: &mut Chance) -> String {
        let number = chance.below(NODES as u64) as usize;
        let place = &mut self.places[number];
        let what = match chance.below(6) {
            0 | 1 => {
                place.node.kill();
                "killed"
            }
            2 => {
                // Its exit code is 1 if a program has the mount open in that moment.
                place.node.stop();
                "stopped"
            }
            3 => {
                place.fill();
                "on a full disk"
            }
            4 => {
                place.peers.limit(SLOW);
                "behind a slow link"
            }
            _ => {
                // It may be refused.
                place.node.litefs("promote", &[]);
                "promoted"
            }
        };
        format!("node{number} {what}")
    }

    /// Goes on for a while.
    fn go_on(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            std::thread::park_timeout(Duration::from_secs(1).min(time));
            self.note();
        }
    }

    /// Nobody writes any more: all nodes have the same of every database.
    fn check(&mut self) {
        self.places.iter_mut().for_each(Place::mend);
        let follow = |primary: usize, places: &[Place]| {
            let name = format!("node{primary}");
            let follows = |n: usize| n == primary || primary_of(&places[n].node) == name;
            (0..NODES).all(follows).then_some(primary)
        };
        let primary = wait::until("one primary that all follow", || {
            let primary = self.places.iter().position(|place| is_primary(&place.node))?;
            follow(primary, &self.places)
        });
        for database in 0..self.databases {
            let name = name(database);
            let node = &self.places[primary].node;
            // A program that was refused leaves what it had to the next writer.
            let sql = format!("insert or replace into t values ({}, 'the end')", ROWS + 1);
            wait::until("a write", || sqlite::try_run(&node.file(&name), &sql).ok());
            let pos = node.pos(&name);
            for place in &self.places {
                place.node.wait_for_pos(&name, pos);
                let sum = || Some(Image::of_files(&place.node.db_dir(&name))?.checksum());
                wait::until_true("its pages", || sum() == Some(pos.checksum));
            }
            let found = sqlite::run(&node.file(&name), "pragma integrity_check");
            assert_eq!(found, "ok", "{name}");
        }
    }

    /// The last third uses no more than the first one, warmed up, but for some.
    fn compare(&self, time: Duration) {
        let third = time.as_secs() / 3;
        let mut most: BTreeMap<(usize, usize), [u64; 2]> = BTreeMap::new();
        for (second, number, sample) in &self.samples {
            let part = match second {
                second if *second < third => 0,
                second if *second >= 2 * third => 1,
                _ => continue,
            };
            for (what, value) in sample.iter().enumerate() {
                let most = &mut most.entry((*number, what)).or_default()[part];
                *most = (*most).max(*value);
            }
        }
        for ((number, what), [first, last]) in most {
            let (name, slack) =
                [("memory", 32 << 10), ("descriptors", 100), ("disk", 48 << 10)][what];
            println!("node{number}: {name} at most {first} in the first third, {last} in the last");
            assert!(last <= first + first / 2 + slack, "{name} of node{number} grows");
        }
    }

    fn write(&self, dir: &Path) {
        let mut csv = String::from("second,node,memory_kb,descriptors,disk_kb\n");
        for (second, number, [memory, descriptors, disk]) in &self.samples {
            let _ = writeln!(csv, "{second},{number},{memory},{descriptors},{disk}");
        }
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("samples.csv"), csv).unwrap();
        fs::write(dir.join("soak.svg"), self.graph()).unwrap();
    }

    /// Three charts, one below the other, with a line for each node.
    fn graph(&self) -> String {
        const WIDTH: u64 = 820;
        const HEIGHT: u64 = 150;
        const LEFT: u64 = 70;
        const COLOURS: [&str; NODES] = ["#1f77b4", "#d62728", "#2ca02c"];
        let titles = ["memory in MiB", "file descriptors", "disk in MiB"];
        let seconds = self.samples.iter().map(|sample| sample.0).max().unwrap_or(1).max(1);
        let mut svg = format!(
            "<svg xmlns='http://www.w3.org/2000/svg' width='{}' height='{}' \
             font-family='sans-serif' font-size='12'><rect width='100%' height='100%' fill='white'/>\n",
            WIDTH + LEFT + 20,
            3 * (HEIGHT + 50) + 10
        );
        for (what, title) in titles.into_iter().enumerate() {
            let unit = if what == 1 { 1 } else { 1024 };
            let top = what as u64 * (HEIGHT + 50) + 25;
            let most = self.samples.iter().map(|sample| sample.2[what]).max().unwrap_or(1).max(1);
            let bottom = top + HEIGHT;
            let _ = writeln!(
                svg,
                "<text x='{LEFT}' y='{}'>{title}, {} minutes</text><text x='5' y='{}'>{}</text>\
                 <text x='5' y='{bottom}'>0</text>\
                 <path d='M{LEFT} {top}V{bottom}H{}' fill='none' stroke='black'/>",
                top - 8,
                seconds / 60,
                top + 10,
                most / unit,
                LEFT + WIDTH
            );
            for (number, colour) in COLOURS.into_iter().enumerate() {
                let points: String = self
                    .samples
                    .iter()
                    .filter(|sample| sample.1 == number)
                    .map(|(second, _, values)| {
                        let x = LEFT + second * WIDTH / seconds;
                        format!("{x},{} ", bottom - values[what] * HEIGHT / most)
                    })
                    .collect();
                let _ = writeln!(
                    svg,
                    "<polyline points='{points}' fill='none' stroke='{colour}'/>\
                     <text x='{}' y='{}' fill='{colour}'>node{number}</text>",
                    LEFT + WIDTH - 60,
                    top + 12 + 14 * number as u64
                );
            }
        }
        svg + "</svg>\n"
    }
}

fn of_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn what_nodes_use_stays_bounded() {
    let minutes = of_environment("LITEFS_TEST_MINUTES");
    let time = minutes.map_or(Duration::from_secs(10), |n| Duration::from_secs(60 * n));
    let (databases, pause) = if minutes.is_some() { (200, 20) } else { (12, 3) };
    let seed = of_environment("LITEFS_TEST_SEED").unwrap_or(u64::from(std::process::id()) + 1);
    println!("LITEFS_TEST_SEED={seed}");
    let mut chance = Chance(seed);
    let mut soak = Soak::start(databases);
    let load = Arc::new(Load::default());
    let worker = |number: usize| {
        let (load, mount) = (load.clone(), soak.places[number].node.mount());
        let chance = Chance(seed + 7 * number as u64 + 1);
        std::thread::spawn(move || work(&load, &mount, databases, chance))
    };
    let workers: Vec<_> = (0..NODES).map(worker).collect();
    let mut events = 0;
    while soak.begun.elapsed() < time {
        soak.go_on(Duration::from_secs(pause));
        let event = soak.suffer(&mut chance);
        println!("{:5} s: {event}", soak.begun.elapsed().as_secs());
        events += 1;
        soak.go_on(Duration::from_secs(pause / 3));
        soak.places.iter_mut().for_each(Place::mend);
    }
    load.ended.store(true, Ordering::SeqCst);
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    if let Ok(dir) = std::env::var("LITEFS_TEST_DIR") {
        soak.write(Path::new(&dir));
    }
    soak.check();
    if time >= LONG {
        soak.compare(time);
    }
    let count = |number: &AtomicU64| number.load(Ordering::Relaxed);
    let (written, read, refused) = (count(&load.written), count(&load.read), count(&load.refused));
    println!("{events} events, {written} writes, {read} reads, {refused} refused");
    assert!(written > 0 && read > 0, "nothing was done");
}
