//! Damage: on the way from the primary to its replica, and in the primary's own files. A replica
//! keeps what it has, says in a line what is wrong, connects again, and ends with the right pages.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use test_case::test_case;

use super::Cluster;
use crate::support::image;
use crate::support::node::{Member, Node, Settings};
use crate::support::{sqlite, wait};

const DB: &str = "app.db";

/// What happens to the bytes of the primary, once.
#[derive(Clone, Copy)]
enum Fault {
    /// This byte, counted from now, has a bit flipped.
    Flip(u64),
    /// Here, counted from now, the connection ends.
    Cut(u64),
}

/// No fault is due.
const NEVER: u64 = u64::MAX;

/// A network between a replica and its primary.
struct Network {
    url: String,
    faults: Arc<Faults>,
}

#[derive(Default)]
struct Faults {
    /// How many bytes of the primary have passed.
    passed: AtomicU64,
    flip_at: AtomicU64,
    cut_at: AtomicU64,
}

impl Network {
    /// Before the node at this URL.
    fn before(url: &str) -> Network {
        let target = url.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let faults = Arc::new(Faults::default());
        faults.flip_at.store(NEVER, Ordering::SeqCst);
        faults.cut_at.store(NEVER, Ordering::SeqCst);
        let shared = faults.clone();
        thread::spawn(move || {
            for replica in listener.incoming().map_while(Result::ok) {
                // A primary that is down is one that does not answer.
                let Ok(primary) = TcpStream::connect(&target) else { continue };
                connect(replica, primary, shared.clone());
            }
        });
        Network { url, faults }
    }

    fn arm(&self, fault: Fault) {
        let now = self.faults.passed.load(Ordering::SeqCst);
        match fault {
            Fault::Flip(at) => self.faults.flip_at.store(now + at, Ordering::SeqCst),
            Fault::Cut(at) => self.faults.cut_at.store(now + at, Ordering::SeqCst),
        }
    }

    /// Whether the last fault has not happened yet.
    fn is_armed(&self) -> bool {
        let faults = [&self.faults.flip_at, &self.faults.cut_at];
        faults.iter().any(|fault| fault.load(Ordering::SeqCst) != NEVER)
    }
}

fn connect(replica: TcpStream, primary: TcpStream, faults: Arc<Faults>) {
    let (mut from, mut to) = (replica.try_clone().unwrap(), primary.try_clone().unwrap());
    thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let (mut from, mut to) = (primary, replica);
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            if !faults.pass(&mut buffer[..len]) || to.write_all(&buffer[..len]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    });
}

impl Faults {
    /// Whether the bytes may pass, changed as is due.
    fn pass(&self, bytes: &mut [u8]) -> bool {
        let start = self.passed.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        let due = |fault: &AtomicU64| {
            let at = fault.load(Ordering::SeqCst);
            let index = usize::try_from(at.checked_sub(start)?).ok()?;
            (index < bytes.len()).then(|| {
                fault.store(NEVER, Ordering::SeqCst);
                index
            })
        };
        let (flip, cut) = (due(&self.flip_at), due(&self.cut_at));
        if let Some(index) = flip {
            bytes[index] ^= 0x10;
        }
        cut.is_none()
    }
}

/// A primary and a replica with a network between them.
fn cluster(mode: &str) -> (Cluster, Network) {
    let settings = Settings::default();
    let mut cluster = Cluster::with(1, &settings);
    let network = Network::before(&cluster.primary().url());
    let mut replica = Node::new(&settings, Member::Replica(&network.url));
    replica.start();
    cluster.nodes.push(replica);
    let setup = format!("pragma journal_mode = {mode}; create table t(x)");
    sqlite::run(&cluster.file(DB), &setup);
    cluster.sync(DB);
    (cluster, network)
}

fn write(node: &Node, rows: u32) {
    let row = "insert into t values (hex(randomblob(400)));";
    sqlite::run(&node.file(DB), &row.repeat(rows as usize));
}

#[test_case("delete")]
#[test_case("wal")]
fn a_stream_that_is_damaged_anywhere_is_opened_again(mode: &str) {
    let (cluster, network) = cluster(mode);
    // Within frame headers, names, LTX headers, pages and trailers.
    let places = [0, 3, 9, 20, 47, 100, 150, 400, 777, 1500, 2222, 4500];
    let faults = places.into_iter().flat_map(|at| [Fault::Flip(at), Fault::Cut(at)]);
    for fault in faults {
        network.arm(fault);
        wait::until_true("the fault to happen", || {
            write(cluster.primary(), 5);
            !network.is_armed()
        });
        cluster.sync(DB);
    }
    assert!(cluster.replica().log_count("disconnected from primary") >= places.len());
    assert_eq!(cluster.replica().log_count("panicked"), 0);
    assert_eq!(cluster.replica().log_count("level=ERROR"), 0, "a peer's fault is not ours");
    cluster.check();
}

#[test]
fn a_snapshot_that_breaks_off_is_begun_again() {
    let (mut cluster, network) = cluster("wal");
    sqlite::run(
        &cluster.file(DB),
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < 3000)
         insert into t select randomblob(1000) from n",
    );
    cluster.sync(DB);
    for fault in [Fault::Cut(1_000_000), Fault::Flip(2_000_000), Fault::Cut(300)] {
        cluster.nodes[1].stop();
        fs::remove_dir_all(cluster.replica().data()).unwrap();
        network.arm(fault);
        cluster.nodes[1].start();
        assert!(!network.is_armed(), "the snapshot is smaller than thought");
        cluster.sync(DB);
        let left = fs::read_dir(cluster.replica().db_dir(DB).ltx()).unwrap();
        let names: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| name.to_string_lossy().ends_with(".ltx")), "{names:?}");
    }
    cluster.check();
}

/// What happens to a file of the primary's chain that a replica needs.
#[derive(Clone, Copy)]
enum Harm {
    Flipped,
    Truncated,
    Emptied,
    Missing,
}

#[test_case("delete", Harm::Flipped; "delete, flipped")]
#[test_case("delete", Harm::Truncated; "delete, truncated")]
#[test_case("wal", Harm::Flipped; "wal, flipped")]
#[test_case("wal", Harm::Emptied; "wal, emptied")]
#[test_case("wal", Harm::Missing; "wal, missing")]
fn a_damaged_file_of_the_chain_is_made_up_for_by_a_snapshot(mode: &str, harm: Harm) {
    let mut cluster = Cluster::of(2);
    let setup = format!("pragma journal_mode = {mode}; create table t(x)");
    sqlite::run(&cluster.file(DB), &setup);
    let pos = cluster.sync(DB);
    cluster.nodes[1].stop();
    for _ in 0..6 {
        write(cluster.primary(), 1);
    }
    cluster.nodes[0].stop();
    let files = image::chain_files(&cluster.primary().db_dir(DB));
    let next = files.iter().find(|(min, max, _)| *min > pos.txid && *max < files.last().unwrap().1);
    let (_, _, path) = next.expect("a file between what the replica has and the newest");
    let mut bytes = fs::read(path).unwrap();
    match harm {
        Harm::Flipped => {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(path, bytes).unwrap();
        }
        Harm::Truncated => fs::write(path, &bytes[..bytes.len() - 10]).unwrap(),
        Harm::Emptied => fs::write(path, "").unwrap(),
        Harm::Missing => fs::remove_file(path).unwrap(),
    }
    cluster.nodes[0].start();
    cluster.nodes[1].start();
    cluster.sync(DB);
    assert_eq!(cluster.primary().log_count("snapshot sent"), 1);
    if !matches!(harm, Harm::Missing) {
        assert_eq!(cluster.primary().log_count("ltx file is damaged"), 1, "one clear line");
    }
    write(cluster.primary(), 2);
    cluster.sync(DB);
    // The primary's own chain has a hole now, which a check of it would find.
    cluster.nodes.swap(0, 1);
    let replica = cluster.nodes.remove(0);
    let image = image::replay_chain(&replica.db_dir(DB), replica.pos(DB)).unwrap();
    let ours = image::Image::of_files(&cluster.nodes[0].db_dir(DB)).unwrap();
    assert!(image == ours, "pages {:?} differ", image.differences(&ours));
}
