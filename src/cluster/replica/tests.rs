//! What a primaryship counts as when something of it could not be stored or applied here.

use std::path::Path;
use std::time::Duration;

use ltx::{Checksum, Compression, Encoder, NodeId, PageSize, Pgno, Txid};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::*;
use crate::cluster::election::Standing;
use crate::cluster::memory::Memory;
use crate::engine::db::Patience;
use crate::engine::layout::DataDir;
use crate::engine::locks::{Handle, LockKind, Owner, Request};
use crate::engine::{DbState, Options, Retain, Role};
use crate::os::fault::{self, Call, Fault, Verdict, Watch};
use crate::sqlite::lock_byte::{Lock, LockSet};

/// The primary that is followed. Its node does not say which history the replica's is.
const SOURCE: Source = Source::Term(5);

/// The node of which the replica has had transactions that nobody else has.
const FORMER: NodeId = NodeId(9);

/// Bytes of a page: 20 of them are too many for memory.
const PAGE_SIZE: u32 = 65_536;

/// A replica that was left with two transactions of a primary that is gone.
struct Former {
    dir: tempfile::TempDir,
    engine: Arc<Engine>,
    lineage: Arc<Lineage>,
}

impl Former {
    async fn new() -> Former {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path());
        let info = PrimaryInfo { hostname: String::new(), advertise_url: String::new() };
        engine.set_role(Role::Replica(info));
        let memory = Arc::new(Memory::load(&DataDir::new(dir.path())));
        let former = Former { dir, engine, lineage: Arc::new(Lineage::new(memory)) };
        let (first, post) = file([1, 1], Checksum::NONE, 2, 1);
        former.send(&mut former.connect(Source::Unknown), &first).unwrap();
        let (second, _) = file([2, 2], post, 2, 2);
        former.send(&mut former.connect(Source::Unknown), &second).unwrap();
        wait_applied(&former.engine, former.engine.positions()).await;
        assert_eq!(former.db().pos().txid, Txid(2));
        former
    }

    fn db(&self) -> Arc<engine::Db> {
        self.engine.database("db").unwrap()
    }

    /// A new connection to `source`, from the side of the worker.
    fn connect(&self, source: Source) -> Worker {
        let connection = self.lineage.connect(source);
        self.engine.shared().set_same_line(self.lineage.is(source));
        Worker {
            engine: self.engine.clone(),
            events: mpsc::channel(1).1,
            abandoned: Arc::default(),
            ready: watch::Sender::new(false),
            lineage: self.lineage.clone(),
            connection,
            databases: Vec::new(),
            progress: Progress::default(),
            current: Current::Nothing,
            is_ready: false,
            failed: BTreeSet::new(),
            failing: watch::Sender::new(BTreeSet::new()),
        }
    }

    /// Has the worker take one LTX file.
    fn send(&self, worker: &mut Worker, file: &[u8]) -> Result<(), Error> {
        worker.take(Event::Frame(Frame::Ltx { name: "db".to_owned() }))?;
        worker.take(Event::LtxData(file.to_vec().into()))?;
        worker.take(Event::LtxEnd).map(drop)
    }

    /// What stands in `lost+found/` of the database.
    fn kept(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path().join("dbs/db/lost+found"));
        let name = |entry: io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
        entries.into_iter().flatten().map(|e| name(e).into_string().unwrap()).collect()
    }

    /// The two transactions of the former primary are kept, and the primary's have their place.
    fn check_kept(&self) {
        assert_eq!((self.db().pos().txid, self.db().state()), (Txid(9), DbState::Ready));
        let kept = self.kept();
        for txid in [1, 2] {
            let name = format!("{0}-{0}.ltx", Txid(txid));
            assert!(kept.contains(&name), "{name} in {kept:?}");
        }
    }
}

fn open(dir: &Path) -> Arc<Engine> {
    let options = Options {
        dir: dir.to_owned(),
        compression: Compression::None,
        retention: Duration::ZERO,
        retention_interval: Duration::ZERO,
        retain: Retain::Free,
        strict_verify: true,
        node_id: NodeId(1),
        clock: Box::new(|| 1),
    };
    Engine::open(options).unwrap()
}

/// An LTX file of so many pages, filled with `fill`, and the checksum that it leads to from a database
/// whose pages it all replaces.
fn file([min, max]: [u64; 2], pre: Checksum, pages: u32, fill: u8) -> (Vec<u8>, Checksum) {
    let page_size = PageSize::new(PAGE_SIZE).unwrap();
    let header = Header {
        compression: Compression::None,
        page_size,
        commit: pages,
        min_txid: Txid(min),
        max_txid: Txid(max),
        timestamp_ms: 1,
        pre_apply: pre,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: FORMER,
    };
    let mut encoder = Encoder::new(Vec::new(), header).unwrap();
    let mut post = Checksum::EMPTY;
    for pgno in (1..=pages).map(Pgno) {
        let mut page = vec![fill; page_size.bytes()];
        if pgno == Pgno(1) {
            page[..100].fill(0);
            page[..16].copy_from_slice(crate::sqlite::header::MAGIC);
            page[16..20].copy_from_slice(&[0, 1, 1, 1]);
        }
        post = post.toggle(encoder.page(pgno, &page).unwrap());
    }
    (encoder.finish(post).unwrap().0, post)
}

/// What the primary has: nine transactions, of another history.
fn theirs(pages: u32) -> Vec<u8> {
    file([1, 9], Checksum::NONE, pages, 7).0
}

/// Everything was sent; waits until the node says that it is ready. What may come later is returned.
async fn ready(worker: &Worker) -> JoinHandle<()> {
    let announced = worker.announce_ready();
    let mut is_ready = worker.ready.subscribe();
    let is_ready = is_ready.wait_for(|ready| *ready);
    timeout(limits::LOCK_WAIT, is_ready).await.expect("ready in time").unwrap();
    announced
}

/// Waits until nothing more is announced.
async fn settled(announced: JoinHandle<()>) {
    timeout(limits::LOCK_WAIT, announced).await.expect("an end in time").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_of_which_a_file_was_left_out_is_not_reached() {
    let former = Former::new().await;
    let snapshot = theirs(20);
    let mut worker = former.connect(SOURCE);
    let (label, after) = ("receive:spool".to_owned(), 0);
    fault::arm_here(Fault { label, after, errno: libc::ENOSPC });
    former.send(&mut worker, &snapshot).unwrap();
    assert!(!fault::disarm_here(), "the disk was full");
    settled(ready(&worker).await).await;
    assert!(!former.lineage.is(SOURCE), "not all of it is here");
    assert_eq!(former.db().pos().txid, Txid(2));
    // In an election the other databases count as of this primaryship, and this one nothing.
    assert_eq!(former.lineage.standing(&former.engine), Standing::of(5, &[]));

    let mut worker = former.connect(SOURCE);
    former.send(&mut worker, &snapshot).unwrap();
    settled(ready(&worker).await).await;
    assert!(former.lineage.is(SOURCE), "all of it is here");
    former.check_kept();
    former.engine.close().unwrap();
}

/// Has all calls with the label fail.
struct Refusing(&'static str);

impl Watch for Refusing {
    fn before(&self, label: &str, _call: &Call<'_>) -> Verdict {
        if label == self.0 { Verdict::Fail(libc::ENOSPC) } else { Verdict::Go }
    }
    fn after(&self, _label: &str, _call: &Call<'_>) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_of_which_something_cannot_be_applied_is_not_reached_before_it_is() {
    let former = Former::new().await;
    let watching = fault::watch(former.dir.path(), Arc::new(Refusing("apply:ltx")));
    let mut worker = former.connect(SOURCE);
    former.send(&mut worker, &theirs(3)).unwrap();
    let before = ready(&worker).await;
    assert!(matches!(former.db().state(), DbState::Failed(_)), "{:?}", former.db().state());
    assert!(!former.lineage.is(SOURCE), "not all of it is here");

    // The same primary again, before the cause is gone.
    let worker = former.connect(SOURCE);
    let announced = ready(&worker).await;
    settled(before).await;
    assert!(!former.lineage.is(SOURCE), "still not");
    drop(watching);
    settled(announced).await;
    assert!(former.lineage.is(SOURCE), "all of it is here");
    former.check_kept();
    former.engine.close().unwrap();
}

/// Neither a database that the primary does not have nor one that is not wanted says how far the node is.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_not_the_primarys_is_not_waited_for() {
    for is_wanted in [true, false] {
        let former = Former::new().await;
        let _watching = fault::watch(former.dir.path(), Arc::new(Refusing("apply:ltx")));
        let mut worker = former.connect(Source::Unknown);
        former.send(&mut worker, &theirs(3)).unwrap();
        ready(&worker).await;
        assert!(matches!(former.db().state(), DbState::Failed(_)));

        let mut worker = former.connect(SOURCE);
        match is_wanted {
            true => _ = worker.take(Event::Frame(Frame::DropDb { name: "db".to_owned() })).unwrap(),
            false => worker.databases.push("another".to_owned()),
        }
        settled(ready(&worker).await).await;
        assert!(former.lineage.is(SOURCE));
        former.engine.close().unwrap();
    }
}

/// All that the primary had is here, but of this database it had nothing; later it has one of that name.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_its_primary_did_not_have_is_kept() {
    let former = Former::new().await;
    let mut worker = former.connect(SOURCE);
    worker.take(Event::Frame(Frame::DropDb { name: "db".to_owned() })).unwrap();
    settled(ready(&worker).await).await;
    assert!(former.lineage.is(SOURCE));

    let mut worker = former.connect(SOURCE);
    former.send(&mut worker, &theirs(3)).unwrap();
    settled(ready(&worker).await).await;
    former.check_kept();
    former.engine.close().unwrap();
}

/// A reader keeps a snapshot from its turn, whose number is not beyond that of what is here.
#[tokio::test(flavor = "multi_thread")]
async fn a_history_that_a_snapshot_will_replace_counts_nothing() {
    let former = Former::new().await;
    let (db, reader) = (former.db(), Owner::client(1));
    let (set, kind) = (LockSet::one(Lock::Shared), LockKind::Shared);
    let request = Request { owner: reader, via: Handle(1), set, kind };
    // The applier may just be about to give it back.
    let (sender, granted) = std::sync::mpsc::channel();
    db.lock(request, Patience::Any(1), Box::new(move |result| sender.send(result).unwrap()));
    assert_eq!(granted.recv_timeout(limits::LOCK_WAIT), Ok(Ok(())));
    let (snapshot, _) = file([1, 1], Checksum::NONE, 3, 7);
    let mut worker = former.connect(SOURCE);
    former.send(&mut worker, &snapshot).unwrap();
    let announced = worker.announce_ready();
    let targets = former.engine.positions();
    assert_eq!((targets[0].1.txid, db.pos().txid), (Txid(1), Txid(2)));
    let waiting = timeout(Duration::ZERO, wait_applied(&former.engine, targets));
    assert!(waiting.await.is_err(), "it waits for the reader");
    assert_eq!(former.lineage.positions(&former.engine)[0].1, Pos::ZERO);
    db.unlock(reader, set, || ());
    settled(announced).await;
    assert!(former.lineage.is(SOURCE));
    assert_eq!(former.lineage.positions(&former.engine)[0].1.txid, Txid(1));
    former.engine.close().unwrap();
}
