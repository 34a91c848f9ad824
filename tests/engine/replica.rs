//! What a node does with what comes from its primary: applied in order, whatever readers, a full disk
//! or a change of the role do meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use litefs::engine::db::DbState;
use litefs::engine::files::FileKind;
use litefs::engine::locks::LockKind;
use litefs::engine::{
    self, Db, DbName, Engine, Error, LtxBytes, Next, Overlap, PageCache, PrimaryInfo, Role,
};
use litefs::os::fault::{self, Call, Verdict, Watch};
use litefs::sqlite::header::DatabaseHeader;
use litefs::sqlite::lock_byte::{Lock, LockSet};
use ltx::{Checksum, Compression, Encoder, Header, NodeId, PageSize, Pgno, Pos, Txid};
use test_case::test_matrix;

use super::faults::lost_database;
use super::{PAGE, asked, commit, contents, database, file, image, lock, primary, unlock_all};
use crate::support::no_cache::NoCache;
use crate::support::wait;

/// The LTX file of transaction `txid` on a database with the pages before `first`, whose checksum is
/// `pre`: `pages` from there on.
pub(super) fn ltx_file(
    txid: u64,
    pre: Checksum,
    first: u32,
    pages: &[Vec<u8>],
) -> (Vec<u8>, Checksum) {
    ltx_range([txid, txid], pre, first, pages)
}

/// As [`ltx_file`], of the transactions from one to another.
pub(super) fn ltx_range(
    [min, max]: [u64; 2],
    pre: Checksum,
    first: u32,
    pages: &[Vec<u8>],
) -> (Vec<u8>, Checksum) {
    let header = Header {
        compression: Compression::None,
        page_size: PageSize::new(4096).unwrap(),
        commit: first + pages.len() as u32 - 1,
        min_txid: Txid(min),
        max_txid: Txid(max),
        timestamp_ms: 1,
        pre_apply: pre,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: NodeId(9),
    };
    let mut encoder = Encoder::new(Vec::new(), header).unwrap();
    let mut post = if min == 1 { Checksum::EMPTY } else { pre };
    for (index, page) in pages.iter().enumerate() {
        post = post.toggle(encoder.page(Pgno(first + index as u32), page).unwrap());
    }
    (encoder.finish(post).unwrap().0, post)
}

/// An engine on `dir` that follows somebody, with clients whose pages of the WAL it shares.
pub(super) fn replica(dir: &Path, cache: Arc<dyn PageCache>) -> Arc<Engine> {
    let engine = primary(dir);
    engine.mounted(cache, true);
    let primary_info = PrimaryInfo { hostname: String::new(), advertise_url: String::new() };
    engine.set_role(Role::Replica(primary_info));
    engine
}

/// Hands an LTX file over as it comes off the wire.
pub(super) fn receive(engine: &Engine, name: &str, bytes: &[u8]) -> Result<Pos, Error> {
    let mut receiver = engine.receive(&DbName::new(name).unwrap()).unwrap();
    receiver.write_all(bytes).unwrap();
    receiver.finish()
}

/// The snapshot of a database of `rows` rows in WAL mode, its pages and its checksum.
pub(super) fn snapshot(rows: u32) -> (Vec<u8>, Vec<Vec<u8>>, Checksum) {
    let mut content = image(rows);
    content[18..20].fill(2); // WAL mode.
    let pages: Vec<Vec<u8>> = content.chunks(PAGE).map(<[u8]>::to_vec).collect();
    let (bytes, post) = ltx_file(1, Checksum::NONE, 1, &pages);
    (bytes, pages, post)
}

#[test]
fn a_large_transaction_leaves_no_temporary_file_on_a_replica() {
    let dir = tempfile::tempdir().unwrap();
    let engine = replica(dir.path(), Arc::new(NoCache));
    let (snapshot, pages, post) = snapshot(3);
    let large = vec![vec![3; PAGE]; 400];
    let (second, _) = ltx_file(2, post, pages.len() as u32 + 1, &large);
    for bytes in [snapshot, second] {
        receive(&engine, "db", &bytes).unwrap();
    }
    let db = database(&engine, "db");
    wait::until_true("the second transaction", || db.pos().txid == Txid(2));
    engine.close().unwrap();
    let left = contents(&dir.path().join("dbs/db/ltx")).into_keys();
    assert_eq!(left.filter(|path| path.ends_with(".tmp")).count(), 0);
    assert!(file(&db, FileKind::Database).file.metadata().unwrap().len() > 1 << 20);
}

/// A kernel that has to finish requests of clients before it drops a page.
#[derive(Default)]
struct BusyKernel {
    db: OnceLock<Arc<Db>>,
    /// How often pages were dropped.
    dropped: AtomicUsize,
    /// How often that had to wait for the engine.
    stuck: AtomicUsize,
}

impl PageCache for BusyKernel {
    fn pages_changed(&self, _ino: u64, _offset: u64, _len: u64) {
        let db = self.db.get().unwrap().clone();
        let (done, finished) = mpsc::channel();
        thread::spawn(move || {
            // What workers do that may want a lock of the engine.
            let _ = db.remove_wal();
            let _ = db.truncate_wal(&file(&db, FileKind::Wal), 0);
            let _ = asked(|answer| db.remove_journal(answer));
            let log = LockSet::READERS.without(LockSet::one(Lock::Read0));
            let _ = lock(&db, log, LockKind::Exclusive);
            unlock_all(&db);
            done.send(()).unwrap();
        });
        let stuck = finished.recv_timeout(Duration::from_secs(10)).is_err();
        self.dropped.fetch_add(1, Ordering::SeqCst);
        self.stuck.fetch_add(usize::from(stuck), Ordering::SeqCst);
    }
    fn file_grown(&self, _ino: u64, _offset: u64, _bytes: &[u8]) {}
    fn file_changed(&self, _ino: u64) {}
    fn attr_changed(&self, _ino: u64) {}
    fn name_changed(&self, _name: &str) {}
    fn name_gone(&self, _name: &str) {}
    fn file_mistaken(&self, _ino: u64, _name: &str) {}
}

#[test]
fn a_checkpoint_of_a_replica_holds_nothing_that_a_worker_wants() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = Arc::new(BusyKernel::default());
    let engine = replica(dir.path(), kernel.clone());
    let (snapshot, pages, post) = snapshot(3);
    let _ = kernel.db.set(database(&engine, "db"));
    receive(&engine, "db", &snapshot).unwrap();
    // So much that the log is due.
    let (second, _) = ltx_file(2, post, pages.len() as u32 + 1, &vec![vec![3; PAGE]; 1100]);
    receive(&engine, "db", &second).unwrap();
    wait::until_true("a checkpoint", || kernel.dropped.load(Ordering::SeqCst) > 0);
    engine.close().unwrap();
    assert_eq!(kernel.stuck.load(Ordering::SeqCst), 0);
}

/// The primary's stream is one for all databases.
#[test]
fn a_database_that_cannot_be_applied_does_not_hold_up_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let engine = replica(dir.path(), Arc::new(NoCache));
    let (bytes, pages, mut post) = snapshot(3);
    receive(&engine, "db", &bytes).unwrap();
    let db = database(&engine, "db");
    wait::until_true("the snapshot", || db.pos().txid == Txid(1));
    // From now on nothing that takes place in the chain can be written; the WAL can.
    let (ltx, away) = (dir.path().join("dbs/db/ltx"), dir.path().join("away"));
    fs::rename(&ltx, &away).unwrap();
    fs::write(&ltx, "").unwrap();
    let mut first = pages.len() as u32 + 1;
    let refused = (2..200).find_map(|txid| {
        let (bytes, next) = ltx_file(txid, post, first, &vec![vec![txid as u8; PAGE]; 250]);
        (first, post) = (first + 250, next);
        receive(&engine, "db", &bytes).err()
    });
    assert!(matches!(refused, Some(Error::Busy { .. })), "{refused:?}");
    wait::until_true("the failure", || matches!(db.state(), DbState::Failed(_)));
    // When the cause has gone everything that was taken is applied.
    fs::remove_file(&ltx).unwrap();
    fs::rename(&away, &ltx).unwrap();
    let target = db.received_pos();
    wait::until_or(|| format!("{target}, at {}", db.pos()), || (db.pos() == target).then_some(()));
    wait::until_true("the database to work", || db.state() == DbState::Ready);
    engine.close().unwrap();
}

#[test]
fn without_a_primary_the_lag_grows() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    assert_eq!(engine.lag_timestamp_ms(), Some(0));
    engine.set_role(Role::Unknown);
    assert_eq!(engine.lag_timestamp_ms(), None, "a former primary has had no news");
    let info = PrimaryInfo { hostname: "a".to_owned(), advertise_url: "http://a".to_owned() };
    engine.set_role(Role::Replica(info));
    engine.heartbeat(42);
    engine.set_role(Role::Unknown);
    assert_eq!(engine.lag_timestamp_ms(), Some(42));
    engine.set_role(Role::Primary);
    assert_eq!(engine.lag_timestamp_ms(), Some(0));
    engine.close().unwrap();
}

/// `docs/differences.md`, cluster 24: "The lag is by the primary's clock, which heartbeats tell".
#[test]
fn a_clock_that_goes_wrong_is_no_lag() {
    const HOUR: i64 = 3_600_000;
    for primary_ahead in [HOUR, -HOUR, 0] {
        let dir = tempfile::tempdir().unwrap();
        let now = Arc::new(AtomicI64::new(10 * HOUR));
        let clock = now.clone();
        let engine = Engine::open(engine::Options {
            dir: dir.path().to_owned(),
            compression: Compression::Lz4,
            retention: Duration::ZERO,
            retention_interval: Duration::ZERO,
            retain: engine::Retain::Free,
            strict_verify: true,
            node_id: NodeId(1),
            clock: Box::new(move || clock.load(Ordering::SeqCst)),
        });
        let engine = engine.unwrap();
        let primary_now = || now.load(Ordering::SeqCst) + primary_ahead;
        engine.stream_began();
        // On its way for 20 ms, the next ones for 3 s, and for 5 ms.
        engine.heartbeat(primary_now() - 20);
        assert_eq!(engine.lag_ms(), Some(0));
        now.fetch_add(5000, Ordering::SeqCst);
        assert_eq!(engine.lag_ms(), Some(5000));
        engine.heartbeat(primary_now() - 3020);
        assert_eq!(engine.lag_ms(), Some(3000));
        engine.news(primary_now() - 120);
        assert_eq!(engine.lag_ms(), Some(100));
        engine.heartbeat(primary_now() - 5);
        assert_eq!(engine.lag_ms(), Some(0));
        // Another primary, whose clock is right.
        engine.stream_began();
        engine.heartbeat(now.load(Ordering::SeqCst) - 5);
        now.fetch_add(1000, Ordering::SeqCst);
        assert_eq!(engine.lag_ms(), Some(1000));
        engine.close().unwrap();
    }
}

/// What stands in `lost+found/` of the database, by name.
pub(super) fn lost_and_found(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let lost = dir.join("dbs/db/lost+found");
    if !lost.exists() {
        return BTreeMap::new();
    }
    let name = |path: String| path.rsplit('/').next().unwrap().to_owned();
    contents(&lost).into_iter().map(|(path, bytes)| (name(path), bytes)).collect()
}

/// No LTX file says what the files of a database are that could not be recovered.
#[test]
fn a_snapshot_over_a_lost_database_keeps_its_files() {
    let dir = tempfile::tempdir().unwrap();
    lost_database(dir.path());
    let database_file = fs::read(dir.path().join("dbs/db/database")).unwrap();
    let log = fs::read(dir.path().join("dbs/db/wal")).unwrap();
    let engine = replica(dir.path(), Arc::new(NoCache));
    let db = database(&engine, "db");
    assert!(matches!(db.state(), DbState::Failed(_)));
    let (bytes, ..) = snapshot(3);
    let pos = receive(&engine, "db", &bytes).unwrap();
    wait::until_true("the snapshot", || db.pos() == pos && db.state() == DbState::Ready);
    engine.close().unwrap();
    let kept = lost_and_found(dir.path());
    assert!(kept.get("database") == Some(&database_file), "{:?}", kept.keys());
    assert!(kept.get("wal") == Some(&log), "{:?}", kept.keys());
}

/// After the retention the LTX files of a former primary say only what changed lately.
#[test]
fn a_snapshot_over_a_former_primary_keeps_its_whole_state() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    engine.mounted(Arc::new(NoCache), true);
    let db = database(&engine, "db");
    for rows in 3..6 {
        commit(&db, &image(rows));
    }
    let pos = db.pos();
    db.retain(Duration::ZERO, None).unwrap();
    assert!(!db.chain().contains(Txid(1)));
    let primary_info = PrimaryInfo { hostname: String::new(), advertise_url: String::new() };
    engine.set_role(Role::Replica(primary_info));
    let (bytes, ..) = snapshot(9);
    let target = receive(&engine, "db", &bytes).unwrap();
    wait::until_true("the snapshot", || db.pos() == target);
    engine.close().unwrap();
    let kept = lost_and_found(dir.path());
    let name = format!("{}-{}.ltx", Txid(1), pos.txid);
    let file = kept.get(&name).unwrap_or_else(|| panic!("{name} in {:?}", kept.keys()));
    let (_, trailer) = ltx::verify(&file[..]).unwrap();
    assert_eq!(trailer.post_apply, pos.checksum);
}

/// A replica with two transactions of its primary, and where that is then.
pub(super) fn two_transactions(dir: &Path) -> (Arc<Engine>, Arc<Db>, Pos) {
    let engine = replica(dir, Arc::new(NoCache));
    // All of it is the primary's: a snapshot of that takes nothing away.
    engine.shared().set_same_line(true);
    let db = database(&engine, "db");
    let (first, pages, post) = snapshot(3);
    let (second, _) = ltx_file(2, post, pages.len() as u32 + 1, &[vec![3; PAGE]]);
    receive(&engine, "db", &first).unwrap();
    let pos = receive(&engine, "db", &second).unwrap();
    wait::until_true("both transactions", || db.pos() == pos);
    (engine, db, pos)
}

/// Of another history, up to transaction 9, with `pages` pages.
pub(super) fn other_history(pages: usize) -> Vec<u8> {
    let (_, first, _) = snapshot(5);
    let mut all = vec![vec![9; PAGE]; pages];
    all[0].clone_from(&first[0]);
    all[0][28..32].copy_from_slice(&(pages as u32).to_be_bytes());
    ltx_range([1, 9], Checksum::NONE, 1, &all).0
}

/// A transaction after `pos` that does not lead to its checksum.
fn leading_elsewhere(pos: Pos) -> Vec<u8> {
    let (right, _) = ltx_file(pos.txid.0 + 1, pos.checksum, 2, &[vec![5; PAGE]]);
    let header = *ltx::Decoder::new(&right[..]).unwrap().header();
    let mut encoder = Encoder::new(Vec::new(), header).unwrap();
    encoder.page(Pgno(2), &[5; PAGE]).unwrap();
    encoder.finish(Checksum::flagged(1)).unwrap().0
}

/// Each page costs memory, which a peer must not reserve with a number.
#[test]
fn a_transaction_that_claims_pages_which_it_does_not_have_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, db, pos) = two_transactions(dir.path());
    let next = db.page_count() + 1;
    let (right, post) = ltx_file(3, pos.checksum, next, &[vec![5; PAGE]]);
    let header = *ltx::Decoder::new(&right[..]).unwrap().header();
    let commit = u32::MAX;
    let mut encoder = Encoder::new(Vec::new(), Header { commit, ..header }).unwrap();
    encoder.page(Pgno(next), &[5; PAGE]).unwrap();
    receive(&engine, "db", &encoder.finish(post).unwrap().0).unwrap();
    wait::until_true("nothing but a snapshot to help", || db.received_pos().is_zero());
    assert_eq!(db.page_count(), next - 1);
    engine.close().unwrap();
}

/// What was set aside leads to `pos`, and the chain is the snapshot.
#[track_caller]
fn check_kept(dir: &Path, pos: Pos) {
    let kept = lost_and_found(dir);
    let leads = |file: &Vec<u8>| {
        let (header, trailer) = ltx::verify(&file[..]).unwrap();
        Pos { txid: header.max_txid, checksum: trailer.post_apply }
    };
    assert_eq!(kept.values().map(leads).next_back(), Some(pos));
    assert!(kept.keys().next().is_some_and(|name| name.starts_with(&Txid(1).to_string())));
    assert!(kept.keys().all(|name| name.ends_with(".ltx")), "more than once: {:?}", kept.keys());
    let chain = chain_names(dir);
    assert!(chain.contains(&format!("{}-{}.ltx", Txid(1), Txid(9))), "{chain:?}");
    // A process that ended there leaves what nobody looks at any more.
    assert!(chain.len() == 1 || chain.len() == 1 + kept.len(), "{chain:?}");
}

/// The LTX files of the database.
fn chain_names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = contents(&dir.join("dbs/db/ltx")).into_keys().collect();
    names.iter_mut().for_each(|path| *path = path.rsplit('/').next().unwrap().to_owned());
    names
}

/// Has all calls fail whose label begins like this, for as long as it is there.
pub(super) struct Refusing(pub(super) &'static str);

impl Watch for Refusing {
    fn before(&self, label: &str, _call: &Call<'_>) -> Verdict {
        if label.starts_with(self.0) { Verdict::Fail(libc::EIO) } else { Verdict::Go }
    }
    fn after(&self, _label: &str, _call: &Call<'_>) {}
}

/// The primary has said once that what the replica has is not of its history. A call fails while the
/// snapshot is applied; that is tried again, or the process ends there.
#[test_matrix(["lost:", "chain:adopt", "chain:clear", "apply:database"], [3, 400], [false, true])]
fn a_history_that_was_contradicted_is_kept_after_a_failure(
    label: &'static str,
    pages: usize,
    ends: bool,
) {
    let dir = tempfile::tempdir().unwrap();
    let (mut engine, mut db, pos) = two_transactions(dir.path());
    db.set_contradicted(pos);
    let watching = fault::watch(dir.path(), Arc::new(Refusing(label)));
    let target = receive(&engine, "db", &other_history(pages)).unwrap();
    wait::until_true("a failure", || matches!(db.state(), DbState::Failed(_)));
    if ends {
        let _ = engine.close();
        drop((engine, db));
        drop(watching);
        engine = replica(dir.path(), Arc::new(NoCache));
        engine.shared().set_same_line(true);
        db = database(&engine, "db");
        if db.pos() != target {
            assert_eq!(db.pos(), pos);
            db.set_contradicted(pos);
            receive(&engine, "db", &other_history(pages)).unwrap();
        }
    } else {
        drop(watching);
    }
    wait::until_or(
        || format!("the snapshot; at {}, {:?}", db.pos(), db.state()),
        || (db.pos() == target && db.state() == DbState::Ready).then_some(()),
    );
    engine.close().unwrap();
    check_kept(dir.path(), pos);
}

/// As before, but before the snapshot is there something else asks for another one; who sends that is told
/// nothing that it could contradict.
#[test]
fn a_history_that_was_contradicted_is_kept_when_another_snapshot_comes() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, db, pos) = two_transactions(dir.path());
    db.set_contradicted(pos);
    receive(&engine, "db", &leading_elsewhere(pos)).unwrap();
    wait::until_true("nothing but a snapshot to help", || db.received_pos().is_zero());
    let target = receive(&engine, "db", &other_history(3)).unwrap();
    wait::until_true("the snapshot", || db.pos() == target);
    engine.close().unwrap();
    check_kept(dir.path(), pos);
}

/// It has been primary with it, and everybody has followed.
#[test]
fn a_history_that_was_contradicted_before_this_node_led_with_it_is_the_primarys() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, db, pos) = two_transactions(dir.path());
    db.set_contradicted(pos);
    engine.set_role(Role::Primary);
    wait::until_true("the end of what was followed", || {
        let may_write = lock(&db, LockSet::one(Lock::Write), LockKind::Exclusive).is_ok();
        unlock_all(&db);
        may_write
    });
    let info = PrimaryInfo { hostname: String::new(), advertise_url: String::new() };
    engine.set_role(Role::Replica(info));
    let target = receive(&engine, "db", &other_history(3)).unwrap();
    wait::until_true("the snapshot", || db.pos() == target);
    engine.close().unwrap();
    assert!(lost_and_found(dir.path()).is_empty());
}

/// Where the primary says nothing of that kind, a snapshot takes the place of its own transactions.
#[test]
fn a_history_that_nobody_contradicted_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, db, _) = two_transactions(dir.path());
    let target = receive(&engine, "db", &other_history(3)).unwrap();
    wait::until_true("the snapshot", || db.pos() == target);
    engine.close().unwrap();
    assert!(lost_and_found(dir.path()).is_empty());
}

/// Both have made one file of the same transactions, and so of the same name.
#[test]
fn a_snapshot_of_the_same_name_keeps_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    engine.mounted(Arc::new(NoCache), true);
    let db = database(&engine, "db");
    commit(&db, &image(4));
    db.chain().sync().unwrap();
    let name = format!("{0}-{0}.ltx", Txid(1));
    let ours = fs::read(dir.path().join("dbs/db/ltx").join(&name)).unwrap();
    let primary_info = PrimaryInfo { hostname: String::new(), advertise_url: String::new() };
    engine.set_role(Role::Replica(primary_info));
    let (theirs, ..) = snapshot(9);
    let target = receive(&engine, "db", &theirs).unwrap();
    wait::until_true("the snapshot", || db.pos() == target);
    engine.close().unwrap();
    let kept = lost_and_found(dir.path());
    assert!(kept.get(&name) == Some(&ours), "{:?}", kept.keys());
    assert_eq!(chain_names(dir.path()), [name]);
}

/// LiteFS leaves out pages by which a database grew and that nobody wrote, and counts them for nothing
/// in the checksum. Whatever becomes of such a file, it is one state or none, and no panic.
#[test]
fn a_file_that_lacks_grown_pages_is_applied_or_refused() {
    for wal in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let engine = replica(dir.path(), Arc::new(NoCache));
        let mut content = image(3);
        if wal {
            content[18..20].fill(2);
        }
        let pages: Vec<Vec<u8>> = content.chunks(PAGE).map(<[u8]>::to_vec).collect();
        let (bytes, post) = ltx_file(1, Checksum::NONE, 1, &pages);
        receive(&engine, "db", &bytes).unwrap();
        let db = database(&engine, "db");
        wait::until_true("the snapshot", || db.pos().txid == Txid(1));
        // Five pages larger, of which only the last is there.
        let (second, _) = ltx_file(2, post, pages.len() as u32 + 5, &[vec![3; PAGE]]);
        let target = receive(&engine, "db", &second).unwrap();
        wait::until_true("an outcome", || {
            db.pos() == target || db.received_pos().is_zero() || db.state() != DbState::Ready
        });
        if db.pos() == target {
            assert_eq!(db.page_count(), pages.len() as u32 + 5);
        }
        assert!(engine.close().is_ok(), "wal: {wal}");
    }
}

/// `docs/differences.md`, cluster 21: "one of our nodes goes on from the middle of a range file, a LiteFS
/// node gets a snapshot".
#[test]
fn a_file_of_several_transactions_helps_who_is_in_its_middle() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [former, other] = dirs.each_ref().map(|dir| replica(dir.path(), Arc::new(NoCache)));
    let (bytes, pages, first) = snapshot(3);
    let (at, grown) = (pages.len() as u32 + 1, [vec![3; PAGE], vec![4; PAGE]]);
    let (second, _) = ltx_file(2, first, at, &grown[..1]);
    let (both, _) = ltx_range([2, 3], first, at, &grown);
    let apply = |engine: &Engine, bytes: &[u8]| {
        let target = receive(engine, "db", bytes).unwrap();
        let db = database(engine, "db");
        wait::until_true("the file to be applied", || db.pos() == target);
        db
    };
    apply(&former, &bytes);
    let former_db = apply(&former, &both);
    apply(&other, &bytes);
    let middle = apply(&other, &second).pos();
    former.set_role(Role::Primary);
    assert!(matches!(former_db.next_after(middle, Overlap::Refused), Next::Snapshot));
    // A file that came from elsewhere does not tell what is in its middle; who wrote it does. So the snapshot may
    // replace another history.
    assert!(matches!(former_db.next_after(middle, Overlap::Accepted), Next::Snapshot));
    assert!(former_db.contradicts(middle));
    let sums = [first, middle.checksum, former_db.pos().checksum].map(Checksum::get);
    let mut known = sums.map(u64::to_be_bytes).concat();
    known.extend(ltx::page_checksum(Pgno(1), &known).get().to_be_bytes());
    let range =
        contents(dirs[0].path()).into_keys().find(|name| name.contains("2-0000000000000003."));
    let range = Path::new(&range.unwrap()).with_extension("positions");
    fs::write(&range, &known).unwrap();
    let of_another_history = Pos { checksum: first, ..middle };
    assert!(matches!(former_db.next_after(of_another_history, Overlap::Accepted), Next::Snapshot));
    known[12] ^= 1;
    fs::write(&range, &known).unwrap();
    assert!(matches!(former_db.next_after(middle, Overlap::Accepted), Next::Snapshot));
    assert!(former_db.contradicts(middle), "torn");
    known[12] ^= 1;
    fs::write(&range, &known).unwrap();
    let ahead = Pos { txid: former_db.pos().txid.next(), ..middle };
    let beside = Pos { checksum: first, ..former_db.pos() };
    for (pos, is) in [
        (middle, false),
        (former_db.pos(), false),
        (Pos::ZERO, false),
        (of_another_history, true),
        (beside, true),
        (ahead, true),
    ] {
        assert_eq!(former_db.contradicts(pos), is, "{pos}");
    }
    let Next::Ltx { bytes, pos, .. } = former_db.next_after(middle, Overlap::Accepted) else {
        panic!("no file that goes on from {middle}");
    };
    let mut range = Vec::new();
    match bytes {
        LtxBytes::Memory(bytes) => range.extend_from_slice(&bytes),
        LtxBytes::File(mut file, _) => _ = file.read_to_end(&mut range).unwrap(),
    }
    assert_eq!(apply(&other, &range).pos(), pos);
    assert_eq!(pos, former_db.pos());
}

/// The size in page 1 is SQLite's, even where the file has more pages; one that an old program has left
/// behind is not.
#[test]
fn a_restored_database_has_the_size_that_sqlite_finds_in_it() {
    let content = image(3);
    let used = content.len() / PAGE;
    let longer = [&content[..], &[0; 2 * PAGE]].concat();
    let mut stale = content.clone();
    stale[27] ^= 1;
    stale[28..32].copy_from_slice(&1u32.to_be_bytes());
    for backup in [longer, stale] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        let db = database(&engine, "db");
        commit(&db, &image(1));
        let mut receiver = engine.receive(db.name()).unwrap();
        let pages: Vec<Vec<u8>> = backup.chunks(PAGE).map(<[u8]>::to_vec).collect();
        receiver.write_all(&ltx_range([1, 9], Checksum::NONE, 1, &pages).0).unwrap();
        receiver.finish_restore(db.pos()).unwrap();
        assert_eq!(db.page_count() as usize, backup.len() / PAGE);
        engine.close().unwrap();
        let restored = fs::read(dir.path().join("dbs/db/database")).unwrap();
        let header = DatabaseHeader::parse(&restored).unwrap();
        assert_eq!(header.page_count(), Some(used as u32));
    }
}
