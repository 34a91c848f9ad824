//! A primary that applies what the node sends to which a database is lent.

use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use litefs::engine::db::Refusal;
use litefs::engine::halt::HaltId;
use litefs::engine::layout::DbDir;
use litefs::engine::locks::LockKind;
use litefs::engine::{self, Db, DbState, Engine};
use litefs::os::fault::{self, Fault};
use ltx::{Checksum, Compression, Encoder, Header, NodeId, PageSize, Pgno, Pos};

use super::{PAGE, commit, database, image, lock, primary, unlock_all, write_locks};
use crate::support::image::Image;
use crate::support::wait;

const ID: HaltId = HaltId(7);

/// The next transaction of a database: other bytes in page 2.
fn transaction(dir: &Path, db: &Db) -> (Vec<u8>, Checksum) {
    change(dir, db, Pgno(2), &[7; PAGE])
}

/// The next transaction of a database: `pgno` is `page`.
fn change(dir: &Path, db: &Db, pgno: Pgno, page: &[u8]) -> (Vec<u8>, Checksum) {
    let Pos { txid, checksum } = db.pos();
    let header = Header {
        compression: Compression::None,
        page_size: PageSize::new(PAGE as u32).unwrap(),
        commit: db.page_count(),
        min_txid: txid.next(),
        max_txid: txid.next(),
        timestamp_ms: 1,
        pre_apply: checksum,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: NodeId(9),
    };
    let file = std::fs::read(dir.join("dbs/db/database")).unwrap();
    let start = PageSize::new(PAGE as u32).unwrap().offset(pgno) as usize;
    let old = ltx::page_checksum(pgno, &file[start..start + PAGE]);
    let mut encoder = Encoder::new(Vec::new(), header).unwrap();
    let new = encoder.page(pgno, page).unwrap();
    let post = checksum.toggle(old).toggle(new);
    (encoder.finish(post).unwrap().0, post)
}

fn send(engine: &Engine, db: &Db, ltx: &[u8]) -> engine::Result<Pos> {
    let mut receiver = engine.receive(db.name()).unwrap();
    receiver.write_all(ltx).unwrap();
    receiver.finish_forwarded(ID)
}

/// The disk fails once, at any step. The sender gets an error; asked again, which a node does whose answer
/// was lost, the transaction is there once, whole.
#[test]
fn a_disk_error_under_a_loan_leaves_all_or_nothing() {
    let mut failures = 0;
    for label in ["chain:", "apply:"] {
        for after in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let engine = primary(dir.path());
            let db = database(&engine, "db");
            commit(&db, &image(3));
            db.lend(ID, Duration::from_secs(20), &AtomicBool::new(false)).unwrap();
            let (before, (ltx, post)) = (db.pos(), transaction(dir.path(), &db));
            fault::arm_here(Fault { label: label.to_owned(), after, errno: libc::EIO });
            let failed = send(&engine, &db, &ltx).is_err();
            let armed = fault::disarm_here();
            if armed {
                assert!(!failed, "{label} {after}: failed without a fault");
                break;
            }
            failures += u32::from(failed);
            let pos = wait::until_or(
                || format!("the transaction after {label} {after}: {:?}", db.state()),
                || send(&engine, &db, &ltx).ok(),
            );
            assert_eq!(pos, Pos { txid: before.txid.next(), checksum: post }, "{label} {after}");
            assert!(db.take_back(Some(ID), "released"));
            let pages = || Image::of_files(&DbDir::new(&dir.path().join("dbs/db"))).unwrap();
            assert_eq!(pages().checksum(), post, "{label} {after}");
            engine.close().unwrap();
            drop((db, engine));
            let engine = primary(dir.path());
            assert_eq!(database(&engine, "db").pos(), pos, "{label} {after}");
            assert_eq!(pages().checksum(), post, "{label} {after}");
        }
    }
    assert!(failures > 2, "the disk never failed: {failures}");
}

/// What would leave something that SQLite does not open is refused before anything of it is kept.
#[test]
fn a_transaction_must_leave_a_database() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    let content = image(3);
    commit(&db, &content);
    db.lend(ID, Duration::from_secs(20), &AtomicBool::new(false)).unwrap();
    let before = db.pos();
    let mut other_size = content[..PAGE].to_vec();
    other_size[16] = 2;
    for page in [&[7; PAGE], &other_size[..]] {
        let (ltx, _) = change(dir.path(), &db, Pgno(1), page);
        let error = send(&engine, &db, &ltx).unwrap_err();
        assert!(matches!(error, engine::Error::NoDatabase { .. }), "{error}");
        assert_eq!((db.pos(), db.state()), (before, DbState::Ready));
    }
    let (ltx, post) = transaction(dir.path(), &db);
    assert_eq!(send(&engine, &db, &ltx).unwrap().checksum, post);
    engine.close().unwrap();
}

/// `docs/differences.md`, cluster 12: a lock "does not end while a transaction is applied under it", and
/// nobody of this node writes then.
#[test]
fn a_loan_does_not_end_while_a_transaction_is_applied_under_it() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(3));
    db.lend(ID, Duration::from_secs(20), &AtomicBool::new(false)).unwrap();
    let (ltx, post) = transaction(dir.path(), &db);
    let (sender, threads) = mpsc::channel();
    let of_hook = db.clone();
    fault::meanwhile("apply:database", move || {
        let db = of_hook.clone();
        let end = thread::spawn(move || db.take_back(Some(ID), "released"));
        thread::park_timeout(Duration::from_millis(200));
        assert!(!end.is_finished(), "it ended in the middle");
        let refused = lock(&of_hook, write_locks(), LockKind::Exclusive);
        assert_eq!(refused, Err(Refusal::WouldBlock));
        sender.send(end).unwrap();
    });
    assert_eq!(send(&engine, &db, &ltx).unwrap().checksum, post);
    assert!(threads.try_recv().expect("nothing was applied").join().unwrap());
    lock(&db, write_locks(), LockKind::Exclusive).unwrap();
    unlock_all(&db);
    engine.close().unwrap();
}
