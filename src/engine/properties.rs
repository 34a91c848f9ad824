//! The files of a data directory that a start reads beside the databases, whatever stands in them.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ltx::{Checksum, Compression, Encoder, Header, NodeId, PageSize, Pgno, Pos, Txid};
use tempfile::TempDir;

use super::chain::{LtxFile, positions};
use super::layout::{DataDir, DbDir};
use super::{ClusterId, DbName, DbState, Engine, Error, Options, Retain, checksum};
use crate::os;
use crate::properties::ram_dir;

/// The id of the node that starts.
const NODE: NodeId = NodeId(5);

thread_local! {
    static DIR: RefCell<Option<Dir>> = const { RefCell::new(None) };
}

/// A data directory with one database.
struct Dir {
    dir: TempDir,
    layout: DataDir,
    db: DbDir,
    pos: Pos,
}

impl Dir {
    fn new() -> Dir {
        let dir = ram_dir();
        let layout = DataDir::new(dir.path());
        let engine = open(dir.path()).expect("an empty directory");
        let name = DbName::new("db").expect("a name");
        engine.set_role(super::Role::Replica(super::PrimaryInfo {
            hostname: String::new(),
            advertise_url: String::new(),
        }));
        let mut receiver = engine.receive(&name).expect("memory takes it");
        receiver.write_all(&snapshot()).expect("memory takes it");
        let pos = receiver.finish().expect("a whole snapshot");
        let db = engine.database("db").expect("it was received");
        while db.pos() != pos {
            std::thread::yield_now();
        }
        engine.close().expect("memory takes it");
        Dir { dir, db: layout.database("db"), layout, pos }
    }

    /// Starts a node, and what it is then.
    fn start(&self) -> Result<Arc<Engine>, Error> {
        let started = open(self.dir.path());
        if let Ok(engine) = &started {
            let db = engine.database("db").expect("its files are whole");
            assert_eq!((db.pos(), db.state()), (self.pos, DbState::Ready));
        }
        started
    }
}

/// An engine on `dir`.
pub(super) fn open(dir: &Path) -> Result<Arc<Engine>, Error> {
    Engine::open(Options {
        dir: dir.to_owned(),
        compression: Compression::Lz4,
        retention: Duration::ZERO,
        retention_interval: Duration::ZERO,
        retain: Retain::Free,
        strict_verify: true,
        node_id: NODE,
        clock: Box::new(|| 1),
    })
}

/// A database of two pages.
fn snapshot() -> Vec<u8> {
    let header = Header {
        compression: Compression::None,
        page_size: PageSize::MIN,
        commit: 2,
        min_txid: Txid(1),
        max_txid: Txid(3),
        timestamp_ms: 1,
        pre_apply: Checksum::NONE,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: NodeId(1),
    };
    let mut encoder = Encoder::new(Vec::new(), header).expect("a header");
    let mut first = vec![0; PageSize::MIN.bytes()];
    first[..16].copy_from_slice(crate::sqlite::header::MAGIC);
    first[16..20].copy_from_slice(&[2, 0, 1, 1]);
    let pages = [first, vec![7; PageSize::MIN.bytes()]];
    let sums = (1..).map(Pgno).zip(&pages).map(|(pgno, page)| encoder.page(pgno, page));
    let post = sums.fold(Checksum::EMPTY, |sum, page| sum.toggle(page.expect("the next page")));
    encoder.finish(post).expect("all pages").0
}

/// The first byte says which file holds the others, and whether it is made to look whole.
pub fn data_dir(bytes: &[u8]) {
    let Some((&kind, content)) = bytes.split_first() else { return };
    DIR.with_borrow_mut(|dir| {
        let dir = dir.get_or_insert_with(Dir::new);
        match kind % 7 {
            0 => cluster_id(dir, content),
            1 => node_ids(dir, content),
            2 => backup(dir, content),
            3 => checksums(dir, content),
            4 => sums(dir, content.to_vec(), kind & 128 != 0),
            5 => inside(dir, content.to_vec(), kind & 128 != 0),
            _ => leftovers(dir, content),
        }
    });
}

fn put(path: &Path, content: &[u8]) {
    os::write_atomic("fuzz", path, content).expect("memory takes it");
}

fn gone(path: &Path) {
    os::remove_if_present("fuzz", path).expect("memory takes it");
}

/// The id of the cluster is what stands there, or the node does not start.
fn cluster_id(dir: &Dir, content: &[u8]) {
    put(&dir.layout.cluster_id(), content);
    let text = std::str::from_utf8(content).map(str::trim).unwrap_or_default();
    match (dir.start(), ClusterId::new(text)) {
        (Ok(engine), Some(id)) => {
            assert_eq!(engine.cluster_id(), Some(id));
            engine.close().expect("memory takes it");
        }
        (Err(error), None) => assert!(super::chain_text(&error).contains("cluster id")),
        (started, id) => panic!("{:?} of {id:?}", started.map(drop)),
    }
    gone(&dir.layout.cluster_id());
}

/// The ids that a node had are kept, its present one is added, and there is an end to them.
fn node_ids(dir: &Dir, content: &[u8]) {
    put(&dir.layout.node_ids(), content);
    match (dir.start(), std::str::from_utf8(content)) {
        (Ok(engine), Ok(before)) => {
            engine.close().expect("memory takes it");
            let after = fs::read_to_string(dir.layout.node_ids()).expect("it was written");
            let before = before.lines().filter_map(|id| id.parse().ok());
            let mut ids: Vec<NodeId> = before.chain([NODE]).collect();
            ids.drain(..ids.len().saturating_sub(super::OWN_IDS_MAX));
            let text: String = ids.iter().map(|id| format!("{id}\n")).collect();
            assert_eq!(after, text);
        }
        (Err(error), Err(_)) => assert!(super::chain_text(&error).contains("node ids")),
        (started, text) => panic!("{:?} of {text:?}", started.map(drop)),
    }
    gone(&dir.layout.node_ids());
}

/// What is known of the backup changes nothing about a database.
fn backup(dir: &Dir, content: &[u8]) {
    put(&dir.db.backup(), content);
    let engine = dir.start().expect("it is no part of the database");
    let hwm = engine.hwm("db");
    let text = String::from_utf8_lossy(content);
    let said = text.split_whitespace().nth(1).and_then(|hwm| hwm.parse().ok()).map(Txid);
    assert!(hwm.is_zero() || said == Some(hwm), "{text:?}");
    engine.close().expect("memory takes it");
    gone(&dir.db.backup());
}

/// Saved checksums that are not those of the database are not used.
fn checksums(dir: &Dir, content: &[u8]) {
    put(&dir.db.checksums(), content);
    dir.start().expect("the database is whole").close().expect("memory takes it");
}

/// Saved checksums are used if they are whole and about this file, and are then as they were saved.
fn sums(dir: &Dir, mut content: Vec<u8>, look_whole: bool) {
    let path = dir.dir.path().join("sums");
    let database = File::open(dir.db.database()).expect("it is there");
    if look_whole {
        checksum::make_whole(&mut content, &database);
    }
    put(&path, &content);
    let Some(saved) = checksum::load(&path, &database).expect("it can be read") else { return };
    assert_eq!(saved.sums.rolling(), saved.pos.checksum);
    checksum::save(&path, &database, &saved).expect("memory takes it");
    assert!(fs::read(&path).expect("it was written") == content);
}

/// A position lies inside an LTX file only if one of that number and checksum stands in a file that leads
/// from one end to the other.
fn inside(dir: &Dir, mut content: Vec<u8>, look_whole: bool) {
    let file = |max| LtxFile { min: Txid(3), max, size: 1, mtime: SystemTime::UNIX_EPOCH };
    let sum_size = positions::SUM_SIZE;
    let count = (content.len() / sum_size).saturating_sub(2) as u64;
    let file = file(Txid((2 + count).max(3)));
    if let Some(end) = content.len().checked_sub(sum_size).filter(|_| look_whole) {
        let sum = ltx::page_checksum(Pgno(1), &content[..end]);
        content[end..].copy_from_slice(&sum.get().to_be_bytes());
    }
    let path = dir.db.ltx_file(file.min, file.max).with_extension("positions");
    put(&path, &content);
    let words: Vec<u64> =
        content.as_chunks().0.iter().map(|sum| u64::from_be_bytes(*sum)).collect();
    let ends = |at: usize| words.get(at).copied().and_then(Checksum::from_raw).unwrap_or_default();
    let ends = [ends(0), ends(words.len().saturating_sub(2))];
    for txid in [2, 3, 4, file.max.0.saturating_sub(1), file.max.0] {
        let at = words.get(txid as usize - 2).copied().and_then(Checksum::from_raw);
        let pos = Pos { txid: Txid(txid), checksum: at.unwrap_or_default() };
        let is_inside = |pos: Pos| {
            let found = positions::find(&dir.db, &file, ends, pos.txid).expect("it can be read");
            found == Some(pos)
        };
        if is_inside(pos) {
            assert!(content.len() == (count as usize + 2) * sum_size && count > 1);
            assert!(file.min <= pos.txid && pos.txid < file.max);
            let sum = ltx::page_checksum(Pgno(1), &content[..content.len() - sum_size]);
            assert_eq!(words[words.len() - 1], sum.get());
            let other = Pos { checksum: pos.checksum.toggle(Checksum::flagged(1)), ..pos };
            assert!(!is_inside(other));
        }
    }
    gone(&path);
}

/// Files of a database that mean nothing any more: a journal, a wal-index, files half written.
fn leftovers(dir: &Dir, content: &[u8]) {
    let is_hot = crate::sqlite::journal::is_synced(content);
    if !is_hot {
        put(&dir.db.journal(), content);
    }
    put(&dir.db.shm(), content);
    put(&dir.db.ltx().join("apply.ltx.tmp"), content);
    dir.start().expect("the database is whole").close().expect("memory takes it");
    assert!(!dir.db.journal().exists() && !dir.db.shm().exists());
    assert!(!dir.db.ltx().join("apply.ltx.tmp").exists());
}
