//! What a chain gives to streams while its transactions are on their way to files.

use super::*;
use crate::engine::layout::DataDir;
use crate::engine::transaction::{Draft, PageRef, WalSpan, ZERO_PAGE};
use ltx::{Checksum, PageSize, Pgno};

/// Pages of a transaction that is larger than all transactions in memory may be.
const MANY: u32 = 3000;

/// A transaction of so many pages of zeros.
pub(super) fn transaction(txid: u64, pages: u32) -> Arc<Transaction> {
    let page_size = PageSize::new(4096).unwrap();
    let sum = |pgno| ltx::page_checksum(pgno, &[0; 4096]);
    let page = |pgno| PageRef { pgno, sum: sum(pgno), offset: ZERO_PAGE };
    let draft = Draft {
        page_size,
        commit: MANY,
        pages: (1..=pages).map(Pgno).map(page).collect(),
        source: Arc::new(tempfile::tempfile().unwrap()),
        timestamp_ms: 1,
        node_id: NodeId(1),
        wal: WalSpan::default(),
    };
    let ends = [txid, txid + 1].map(Checksum::flagged);
    Arc::new(Transaction::new(Txid(txid), ends, draft))
}

fn after(txid: u64) -> Pos {
    Pos { txid: Txid(txid), checksum: Checksum::flagged(txid + 1) }
}

/// A chain of files up to transaction 1.
pub(super) fn open(dir: &Path) -> Chain {
    open_with(dir, &Budget::default())
}

fn open_with(dir: &Path, budget: &Budget) -> Chain {
    let dir = DataDir::new(dir).database("db");
    os::create_dirs("test:dir", &dir.ltx()).unwrap();
    Chain::open(DbName::new("db").unwrap(), dir, Compression::None, Txid(1), budget).unwrap()
}

/// Of [`open`], then two large transactions and a small one.
fn chain(dir: &Path) -> Chain {
    let chain = open(dir);
    for (txid, pages) in [(2, MANY), (3, MANY), (4, 1)] {
        chain.push(transaction(txid, pages));
    }
    chain
}

/// Many databases with a little each are not to take up all memory.
#[test]
fn what_is_recent_has_one_bound_for_all_databases() {
    const PAGES: u32 = 500;
    let budget = Budget::default();
    let recent = |chain: &Chain, txid| chain.inner.lock().unwrap().recent.at(Txid(txid)).is_some();
    let of_one = limits::RECENT_BYTES / transaction(2, PAGES).size_hint();
    let last = of_one as u64 + 2;
    // More than all of them together may keep.
    let count = limits::RECENT_BYTES_OF_ALL / limits::RECENT_BYTES + 2;
    let temps: Vec<_> = (0..count).map(|_| tempfile::tempdir().unwrap()).collect();
    let open = |temp: &tempfile::TempDir| open_with(temp.path(), &budget);
    let mut chains: Vec<Chain> = temps.iter().map(open).collect();
    for chain in &chains {
        (2..=last).for_each(|txid| chain.push(transaction(txid, PAGES)));
    }
    assert!(recent(&chains[0], last - 1) && !recent(&chains[0], 2));
    let late = chains.pop().unwrap();
    assert!(recent(&late, last) && !recent(&late, last - 1), "it came when there was no room");
    // What a database gives back another one can have.
    chains.truncate(1);
    late.push(transaction(last + 1, PAGES));
    assert!(recent(&late, last));
    chains.clear();
    drop(late);
    assert_eq!(budget.bytes(), 0);
}

#[test]
fn what_waits_to_be_written_is_not_gone() {
    let temp = tempfile::tempdir().unwrap();
    let chain = chain(temp.path());
    for txid in [1, 2] {
        assert!(matches!(chain.successor(after(txid)), Ok(Successor::Queued)));
    }
    assert!(matches!(chain.successor(after(3)), Ok(Successor::Recent(_))));
    assert!(matches!(chain.successor(after(4)), Ok(Successor::Gone)));
}

#[test]
fn what_was_written_is_read_from_its_file() {
    let temp = tempfile::tempdir().unwrap();
    let chain = chain(temp.path());
    chain.flush().unwrap();
    for txid in [1, 2] {
        let found = chain.successor(after(txid));
        let Ok(Successor::File(_, file)) = found else { panic!("no file after {txid}") };
        assert!(file.min.0 <= txid + 1 && txid < file.max.0);
    }
    assert!(matches!(chain.successor(after(4)), Ok(Successor::Gone)));
}

#[test]
fn files_that_nobody_synced_expire_too() {
    let temp = tempfile::tempdir().unwrap();
    let chain = chain(temp.path());
    chain.flush().unwrap();
    let expired = |retention| chain.expired(retention, None).len();
    assert_eq!(expired(Duration::ZERO), 0, "none is durable");
    chain.sync_overdue(Duration::from_secs(3600)).unwrap();
    assert_eq!(expired(Duration::ZERO), 0, "none is overdue");
    chain.sync_overdue(Duration::ZERO).unwrap();
    let old = chain.expired(Duration::ZERO, None);
    assert_eq!(old.last().map(|file| file.max), Some(Txid(3)), "all but the newest");
    chain.remove(&old).unwrap();
    assert!(matches!(chain.successor(after(3)), Ok(Successor::Recent(_))));
}

#[test]
fn files_of_a_clock_that_was_ahead_expire_too() {
    let temp = tempfile::tempdir().unwrap();
    let chain = chain(temp.path());
    chain.sync().unwrap();
    let first = chain.files_after(Txid(1), 1, 0)[0];
    let file = File::open(chain.dir.ltx_file(first.min, first.max)).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(3600)).unwrap();
    chain.list_again().unwrap();
    assert_eq!(chain.expired(Duration::from_secs(60), None), [], "one retention is not over");
    let old = chain.expired(Duration::ZERO, None);
    assert_eq!(old.last().map(|file| file.max), Some(Txid(3)), "all but the newest");
    assert_eq!(chain.remove(&old).unwrap(), 2);
}

/// A chain with one file, of transactions 2 to 4.
fn chain_of_a_range(dir: &Path) -> Chain {
    let chain = open(dir);
    let source = Arc::new(tempfile::tempfile().unwrap());
    for txid in 2..=4 {
        let mut transaction = Arc::into_inner(transaction(txid, 1)).unwrap();
        transaction.source = source.clone();
        chain.push(Arc::new(transaction));
    }
    chain.flush().unwrap();
    chain
}

/// Whether the chain says that `pos` lies in its one file.
#[track_caller]
fn is_inside(chain: &Chain, pos: Pos) -> bool {
    let found = chain.file_after(after(1));
    let Ok(Successor::File(_, file)) = found else { panic!("no file") };
    assert_eq!((file.min, file.max), (Txid(2), Txid(4)));
    chain.is_inside(pos, &file, [after(1).checksum, after(4).checksum])
}

#[test]
fn only_positions_of_its_own_history_are_inside_a_file() {
    let temp = tempfile::tempdir().unwrap();
    let chain = chain_of_a_range(temp.path());
    let inside = (1..=4).map(|txid| is_inside(&chain, after(txid)));
    assert_eq!(inside.collect::<Vec<_>>(), [false, true, true, false]);
    assert!(!is_inside(&chain, Pos { txid: Txid(3), ..after(2) }));
    // After a restart too.
    let again = Chain::open(
        chain.db.clone(),
        chain.dir.clone(),
        Compression::None,
        Txid(4),
        &Budget::default(),
    );
    let again = again.unwrap();
    assert!(is_inside(&again, after(3)) && !is_inside(&again, Pos { txid: Txid(3), ..after(2) }));
}

#[test]
fn positions_go_with_their_file() {
    let temp = tempfile::tempdir().unwrap();
    let chain = chain_of_a_range(temp.path());
    chain.sync().unwrap();
    chain.push(transaction(5, 1));
    chain.sync().unwrap();
    let count = || fs::read_dir(chain.dir.ltx()).unwrap().count();
    assert_eq!(count(), 3);
    let old = chain.files_after(Txid(1), 1, 0);
    assert_eq!(chain.remove(&old).unwrap(), 1);
    assert_eq!(count(), 1);
    let orphan = chain.dir.ltx_file(Txid(2), Txid(4)).with_extension("positions");
    os::create_new("test:orphan", &orphan).unwrap();
    Chain::open(
        chain.db.clone(),
        chain.dir.clone(),
        Compression::None,
        Txid(5),
        &Budget::default(),
    )
    .unwrap();
    assert_eq!(count(), 1);
}
