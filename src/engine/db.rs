//! One database: its files, locks, position and state.
//!
//! Four locks, taken in this order and held as said: `turn` (of who applies, imports, or holds a
//! replica's WAL; in `inbox`), `change` (the right to move the position; held across the I/O of a commit,
//! an apply, an import), `locks` (the lock table, short), `view` (what readers of the position see,
//! short). Answers to the kernel are sent with none of the last two held.
//!
//! A failed database refuses writers and keeps everything it has; each attempt to write, at most one
//! a second, first tries to mend it.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use ltx::{PageSize, Pos, Txid};

use super::apply::Inbox;
use super::backup::Backed;
use super::capture::Change;
use super::chain::{Chain, Durability, Durable, Waiting};
use super::error::{Error, Result, chain_text};
use super::feed::Event;
use super::files::{Backing, FileKind, Files, next_ino};
use super::halt::borrowed::Borrowing;
use super::halt::lent::Lending;
use super::layout::DbDir;
use super::locks::Handle;
use super::name::DbName;
use super::recover::Recovered;
use super::shared::Shared;
use super::times::Times;
use super::unsynced;
use crate::os;
use crate::sqlite::header::JournalMode;

pub use lock::{Answer, Guard, Patience, Waiter};
pub(super) use role::WRITERS;

mod lock;
mod mark;
mod role;
mod verify;

/// How often the log repeats what an application does wrong.
const NOTE_INTERVAL: Duration = Duration::from_secs(60);

/// How often a failed database is tried again.
const MEND_INTERVAL: Duration = Duration::from_secs(1);

/// Why a call of the application is refused. The FUSE edge makes an errno of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// This node may not write this database.
    ReadOnly,
    /// A lock is held by somebody else.
    WouldBlock,
    /// The wait for a lock was interrupted.
    Interrupted,
    /// The database is in use.
    Busy,
    /// The file exists.
    Exists,
    /// The file does not exist.
    NotFound,
    /// The call makes no sense on this file.
    Invalid,
    /// The call is not part of a transaction that can be captured.
    NoTransaction,
    /// The system call behind it failed with this errno.
    Os(i32),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        match error.os_error() {
            Some(libc::EEXIST) => Refusal::Exists,
            Some(code) => Refusal::Os(code),
            None => Refusal::Os(libc::EIO),
        }
    }
}

/// Whether a database can be written and followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DbState {
    /// All is well.
    Ready,
    /// Something went wrong; the reason, in one line.
    Failed(String),
}

/// What readers of the position see.
#[derive(Debug, Clone, Copy)]
pub struct View {
    /// The position.
    pub pos: Pos,
    /// Bytes of a page, if the database was ever written.
    pub page_size: Option<PageSize>,
    /// Size of the database in pages.
    pub pages: u32,
    /// How it is journalled.
    pub mode: JournalMode,
    /// When the last transaction was made, in milliseconds since the Unix epoch.
    pub timestamp_ms: i64,
}

/// What happened to a database since the start, for the metrics.
#[derive(Debug, Default)]
pub struct Counters {
    /// Writes to the database file.
    pub database_writes: AtomicU64,
    /// Writes to the journal.
    pub journal_writes: AtomicU64,
    /// Writes to the WAL that came through us.
    pub wal_writes: AtomicU64,
    /// Writes to the wal-index that came through us.
    pub shm_writes: AtomicU64,
    /// Transactions committed here.
    pub commits: AtomicU64,
    /// Writes refused because this node is not the primary.
    pub refused_writes: AtomicU64,
    /// Milliseconds from a transaction's commit to its application here, of the last one.
    pub lag_ms: AtomicU64,
    /// From the end of a transaction to the answer: the frames or pages read, and, of a rollback
    /// journal, the LTX file written.
    pub capture: Times,
    /// From the queue of received LTX files to the database.
    pub apply: Times,
}

/// One database.
pub struct Db {
    /// Itself, for what comes later.
    pub(super) me: Weak<Db>,
    pub(super) name: DbName,
    pub(super) dir: DbDir,
    pub(super) shared: Arc<Shared>,
    pub(super) files: Files,
    pub(super) chain: Arc<Chain>,
    /// The right to move the position, with everything that a commit changes.
    pub(super) change: Mutex<Change>,
    /// Who holds which lock byte, and who waits.
    pub(super) locks: Mutex<lock::Table>,
    /// What readers of the position see.
    view: Mutex<View>,
    /// The WAL has transactions that came too late; no writer is let in before they are out of it.
    pub(super) has_strays: AtomicBool,
    /// The WAL has frames of a refused commit that could not be made invalid; nobody gets WRITE before they are.
    pub(super) has_uncut: AtomicBool,
    /// Why it failed, and when it was last tried to mend it.
    failure: Mutex<Option<Failure>>,
    /// When the log last spoke of a refused write, and of a write outside transactions.
    notes: Mutex<[Option<Instant>; 4]>,
    /// Inode numbers of `NAME-pos` and `NAME-lock`.
    virtual_inos: [u64; 2],
    /// What is known of its backup.
    pub(super) backed: Backed,
    /// What happened since the start.
    pub counters: Counters,
    /// How many transactions were committed here when a client last got WRITE.
    write_began: AtomicU64,
    /// The replica side: what came from the primary.
    pub(super) inbox: Inbox,
    /// The replica side: the right to write, borrowed from the primary.
    pub(super) borrowing: Borrowing,
    /// The primary side: the right to write, lent to another node.
    pub(super) lending: Lending,
}

struct Failure {
    reason: String,
    tried: Instant,
    /// Only a snapshot or a restart helps.
    for_good: bool,
}

impl Db {
    /// A database whose directory was made right by recovery.
    pub(super) fn new(
        name: DbName,
        dir: DbDir,
        shared: Arc<Shared>,
        recovered: Recovered,
    ) -> Result<Arc<Db>> {
        let txid = recovered.pos.txid;
        let (compression, budget) = (shared.compression, &shared.recent);
        let chain = Chain::open(name.clone(), dir.clone(), compression, txid, budget)?;
        let files = Files::open(dir.clone())?;
        Ok(Db::of_parts(name, dir, shared, Change::new(recovered), chain, files))
    }

    /// A database whose directory cannot even be opened: nothing is known of it, and nothing of it can
    /// be seen. The caller puts it into the failed state.
    pub(super) fn unopened(name: DbName, dir: DbDir, shared: Arc<Shared>) -> Arc<Db> {
        let chain = Chain::unknown(name.clone(), dir.clone(), shared.compression);
        let files = Files::none(dir.clone());
        Db::of_parts(name, dir, shared, Change::new(Recovered::nothing()), chain, files)
    }

    fn of_parts(
        name: DbName,
        dir: DbDir,
        shared: Arc<Shared>,
        change: Change,
        chain: Chain,
        files: Files,
    ) -> Arc<Db> {
        Arc::new_cyclic(|me| Db {
            me: me.clone(),
            files,
            name,
            borrowing: Borrowing::new(dir.halt().exists()),
            backed: Backed::load(&dir),
            lending: Lending::default(),
            dir,
            shared,
            chain: Arc::new(chain),
            view: Mutex::new(change.view()),
            inbox: Inbox::new(),
            change: Mutex::new(change),
            locks: Mutex::default(),
            failure: Mutex::default(),
            has_strays: AtomicBool::new(false),
            has_uncut: AtomicBool::new(false),
            notes: Mutex::default(),
            virtual_inos: [next_ino(), next_ino()],
            counters: Counters::default(),
            write_began: AtomicU64::new(0),
        })
    }

    /// Its name.
    pub fn name(&self) -> &DbName {
        &self.name
    }

    /// Where it stands.
    pub fn pos(&self) -> Pos {
        self.view().pos
    }

    /// What readers of the position see.
    pub fn view(&self) -> View {
        *self.view.lock().unwrap()
    }

    /// Bytes of a page, if it was ever written.
    pub fn page_size(&self) -> Option<PageSize> {
        self.view().page_size
    }

    /// Its size in pages.
    pub fn page_count(&self) -> u32 {
        self.view().pages
    }

    /// How it is journalled.
    pub fn mode(&self) -> JournalMode {
        self.view().mode
    }

    /// The files of the mount that stand for it.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// Its LTX files.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Inode numbers of `NAME-pos` and `NAME-lock`.
    pub fn virtual_inos(&self) -> [u64; 2] {
        self.virtual_inos
    }

    /// Whether it works.
    pub fn state(&self) -> DbState {
        let failure = self.failure.lock().unwrap();
        match &*failure {
            Some(failure) => DbState::Failed(failure.reason.clone()),
            None => self.chain.refusal().map_or(DbState::Ready, DbState::Failed),
        }
    }

    /// Whether a transaction may begin here now.
    pub fn may_begin(&self) -> bool {
        if self.shared.is_writable() {
            self.shared.may_begin() && !self.is_lent()
        } else {
            self.is_borrowed()
        }
    }

    /// Whether this node may finish or undo what was begun.
    pub fn may_write(&self) -> bool {
        if self.shared.is_writable() { !self.is_lent() } else { self.is_borrowed() }
    }

    /// Whether this node may commit a transaction at this moment.
    pub fn may_commit(&self) -> bool {
        if self.shared.is_writable() {
            self.shared.may_commit() && !self.is_lent()
        } else {
            self.is_borrowed()
        }
    }

    /// How many things were set aside in `lost+found/`.
    pub fn lost_found_count(&self) -> usize {
        std::fs::read_dir(self.dir.lost_found()).map_or(0, Iterator::count)
    }

    /// Makes one of its files.
    pub fn create_file(&self, kind: FileKind) -> Result<Arc<Backing>, Refusal> {
        self.refuse_lost()?;
        match kind {
            FileKind::Journal if !self.may_write() => {
                self.note_refused_write();
                return Err(Refusal::ReadOnly);
            }
            FileKind::Wal => self.refuse_heap_index()?,
            _ => {}
        }
        let backing = self.files.create(kind)?;
        if kind == FileKind::Journal {
            self.change.lock().unwrap().journal.active = true;
        }
        Ok(backing)
    }

    /// A WAL without a wal-index (locking_mode=EXCLUSIVE before the first access) gives no sign of a
    /// commit: opening the WAL under an exclusive database lock is refused.
    pub fn refuse_heap_index(&self) -> Result<(), Refusal> {
        if self.is_locked_exclusively() {
            self.note_no_transaction("locking_mode=EXCLUSIVE keeps the wal-index out of sight");
            return Err(Refusal::ReadOnly);
        }
        Ok(())
    }

    /// Makes a file durable.
    pub fn sync_file(&self, backing: &Backing, via: Handle) -> Result<(), Refusal> {
        if backing.kind == FileKind::Journal {
            self.journal_synced();
        }
        let path = self.files.path(backing.kind);
        let mut synced = match backing.kind {
            // Pages that a replica applied may be among what was to be written.
            FileKind::Database => unsynced::sync("files:sync", &backing.file),
            _ => os::sync("files:sync", &backing.file),
        }
        .map_err(Error::io("sync", &path));
        // SQLite syncs the directory after the first sync of these, but does not ask whether that
        // worked; afterwards it finds nothing left to do.
        let is_log = matches!(backing.kind, FileKind::Journal | FileKind::Wal);
        if is_log && backing.is_current() {
            synced = synced.and_then(|()| self.files.sync_names());
        }
        if backing.kind != FileKind::Wal || !backing.is_current() {
            return Ok(synced?);
        }
        let kept = synced.map_err(Refusal::from).and_then(|()| self.refuse_fenced_writer());
        match kept {
            Err(_) => self.note_refused_sync(via),
            // In locking_mode=EXCLUSIVE no lock is released after a commit; this is a good moment.
            Ok(()) if self.is_locked_exclusively() => _ = self.capture_wal(),
            Ok(()) => {}
        }
        kept
    }

    /// With synchronous=FULL the sync of the WAL is the last moment at which SQLite lets a commit
    /// fail.
    fn refuse_fenced_writer(&self) -> Result<(), Refusal> {
        // What the primary has taken may be finished, whatever became of the HALT lock meanwhile.
        if !self.may_commit() && self.is_written() && !self.has_pending() {
            tracing::warn!(db = %self.name, "commit refused: the lease is not confirmed");
            return Err(Refusal::Os(libc::EIO));
        }
        Ok(())
    }

    /// A call of an application that writes to the wal-index. SQLite makes only that longer in this way, before what it
    /// has written to the WAL counts: if it fails, the commit does.
    pub fn write_shm(
        &self,
        backing: &Backing,
        via: Handle,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Refusal> {
        self.write_back_shm(backing, offset, data).inspect_err(|_| self.note_refused_index(via))
    }

    /// What an application has written to a mapped page of the wal-index. It is told nothing of it.
    pub fn write_back_shm(
        &self,
        backing: &Backing,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Refusal> {
        if self.inbox.is_rewriting_index() || self.is_followed() {
            // What the kernel writes back of pages that are being replaced, or are only read.
            return Ok(());
        }
        let path = self.files.path(FileKind::Shm);
        Ok(os::write_at("shm:write", &backing.file, data, offset)
            .map_err(Error::io("write wal-index", &path))?)
    }

    /// Cuts the WAL: what was committed to it must be in the chain.
    pub fn truncate_wal(&self, backing: &Backing, len: u64) -> Result<(), Refusal> {
        if backing.is_current() && !self.may_write() {
            return Err(Refusal::ReadOnly);
        }
        let mut change = self.change.lock().unwrap();
        if backing.is_current() {
            self.settle_wal(&mut change)?;
            if len == 0 {
                self.settle_doubt(&mut change)?;
            }
        }
        let path = self.files.path(FileKind::Wal);
        os::truncate("wal:truncate", &backing.file, len)
            .map_err(Error::io("truncate wal", &path))?;
        if backing.is_current() && len == 0 {
            change.wal.clear();
        }
        Ok(())
    }

    /// Cuts the wal-index. Never below the 3 bytes to which SQLite itself cuts it: a mapped page of
    /// an empty file kills who touches it.
    pub fn truncate_shm(&self, backing: &Backing, len: u64) -> Result<(), Refusal> {
        self.refuse_followed()?;
        let path = self.files.path(FileKind::Shm);
        Ok(os::truncate("shm:truncate", &backing.file, len.max(3))
            .map_err(Error::io("truncate wal-index", &path))?)
    }

    /// Removes the WAL: what it holds must be in the chain, and nobody may be using it.
    pub fn remove_wal(&self) -> Result<(), Refusal> {
        if self.is_followed() {
            return Err(Refusal::Busy);
        }
        let mut change = self.change.lock().unwrap();
        let wal = self.files.get(FileKind::Wal).ok_or(Refusal::NotFound)?;
        let empty = wal.file.metadata().is_ok_and(|meta| meta.len() == 0) || change.pages() == 0;
        if !empty && !self.is_locked_exclusively() {
            tracing::warn!(db = %self.name, "refused to remove a wal that is in use");
            return Err(Refusal::Busy);
        }
        self.settle_wal(&mut change)?;
        self.settle_doubt(&mut change)?;
        self.files.remove(FileKind::Wal)?;
        self.chain.forget_recent();
        change.wal.clear();
        self.note_mode(&mut change)
    }

    /// What is written on a replica is written by the applier alone. It may wait for the kernel with
    /// the right to change in hand, so no worker may wait for that.
    pub(super) fn refuse_followed(&self) -> Result<(), Refusal> {
        if self.is_followed() { Err(Refusal::ReadOnly) } else { Ok(()) }
    }

    /// Without a WAL the journal mode is what page 1 says.
    fn note_mode(&self, change: &mut Change) -> Result<(), Refusal> {
        let Some(database) = self.files.get(FileKind::Database) else { return Ok(()) };
        if let Some((header, _)) = self.read_header(&database.file)? {
            change.mode = header.journal_mode;
            *self.view.lock().unwrap() = change.view();
        }
        Ok(())
    }

    /// Removes the wal-index, if nobody uses it.
    pub fn remove_shm(&self) -> Result<(), Refusal> {
        if !self.is_locked_exclusively() && self.has_index_user() {
            return Err(Refusal::Busy);
        }
        self.files.remove(FileKind::Shm)?;
        Ok(())
    }

    /// Drops the database: a transaction that leaves nothing. Refused while somebody has it locked.
    /// On a replica it is refused, under a HALT lock too.
    pub fn drop_database(&self) -> Result<(), Refusal> {
        if self.is_lent() {
            return Err(Refusal::Busy);
        }
        let guard = self.shared.may_begin().then(|| self.lock_everything_now()).flatten();
        // Asked again under the locks, for which a change of the role waits.
        if !self.shared.may_begin() {
            self.note_refused_write();
            return Err(Refusal::ReadOnly);
        }
        if guard.is_none() || self.is_lent() || self.inbox.has_queue() {
            return Err(Refusal::Busy);
        }
        let mut change = self.change.lock().unwrap();
        let database = self.files.get(FileKind::Database).ok_or(Refusal::NotFound)?;
        self.capture_finished(&mut change)?;
        if change.pages() > 0 {
            let transaction = self.deletion(&change, &database.file);
            self.chain.flush()?;
            let size = self.chain.write_now(&transaction, Durability::Synced)?;
            // It is dropped: the next start would come to that, whatever happens to the files now.
            change.reset();
            change.advance(&transaction);
            let page_size = transaction.page_size;
            self.chain.confirm(Arc::new(transaction), size);
            self.discard_files();
            self.announce(&change, page_size);
        } else {
            change.reset();
            self.discard_files();
        }
        self.shared.names_changed(self.name.as_str());
        self.refuse_late_commit()
    }

    /// A commit during which the lease ran out is not acknowledged: it stays if the lease is
    /// confirmed again, and is set aside if it is lost.
    pub(super) fn refuse_late_commit(&self) -> Result<(), Refusal> {
        if self.shared.is_fenced() {
            let pos = self.pos();
            tracing::error!(db = %self.name, %pos, "commit not acknowledged: the lease ran out meanwhile");
            return Err(Refusal::Os(libc::EIO));
        }
        Ok(())
    }

    /// Takes SQLite's files away, which mean nothing any more. What cannot be removed now goes before a
    /// file is made again, or at the next start.
    fn discard_files(&self) {
        if let Err(error) = self.files.discard() {
            tracing::warn!(db = %self.name, error = chain_text(&error), "remove the files of a dropped database: tried again later");
        }
    }

    /// Removes SQLite's files.
    pub(super) fn remove_files(&self) -> Result<()> {
        for kind in [FileKind::Journal, FileKind::Wal, FileKind::Shm, FileKind::Database] {
            self.files.remove(kind)?;
        }
        Ok(())
    }

    /// Everything in the WAL is captured and durable in the chain, but for a commit that may not be over.
    pub(super) fn settle_wal(&self, change: &mut Change) -> Result<()> {
        self.capture_finished(change)?;
        if self.chain.is_durable(change.pos.txid) { Ok(()) } else { self.chain.sync() }
    }

    /// A checkpoint write without the checkpoint lock (an exclusive connection): what it moves must
    /// be in the chain. Also if the connection has a wal-index of its own.
    pub(super) fn before_checkpoint_write(&self, change: &mut Change) -> Result<()> {
        if !self.is_locked_exclusively() {
            return Ok(());
        }
        self.settle_wal(change)?;
        if self.shared.is_passthrough() && self.needs_index()? && self.capture_unindexed(change)? {
            self.chain.sync()?;
        }
        Ok(())
    }

    /// Makes the position of a transaction visible that was committed here, and tells who waits for it. Called with
    /// the right to change, behind [`Change::advance`].
    pub(super) fn announce(&self, change: &Change, page_size: PageSize) {
        *self.view.lock().unwrap() = change.view();
        self.counters.commits.fetch_add(1, Ordering::Relaxed);
        self.tell(change, page_size);
    }

    /// As [`Db::announce`], of what was committed elsewhere.
    pub(super) fn announce_applied(&self, change: &Change, page_size: PageSize) {
        *self.view.lock().unwrap() = change.view();
        self.tell(change, page_size);
    }

    fn tell(&self, change: &Change, page_size: PageSize) {
        self.shared.feed.mark(&self.name);
        if self.shared.feed.has_watchers() {
            self.shared.feed.emit(&Event::Tx {
                db: self.name.clone(),
                pos: change.pos,
                page_size,
                commit: change.pages(),
                timestamp_ms: change.timestamp_ms,
            });
        }
    }

    /// Calls `done` when everything up to `txid` is durable.
    pub fn when_durable(&self, txid: Txid, done: Durable) {
        if self.chain.when_durable(txid, done) == Waiting::Waits {
            self.shared.writer.urgent(&self.chain);
        }
    }

    /// Whether there is too little room on the disk for another transaction.
    pub fn is_disk_full(&self) -> bool {
        self.shared.is_full()
    }

    /// Puts the database into the failed state; one that is lost stays so, for the first reason.
    pub(super) fn fail(&self, error: &Error) {
        let reason = chain_text(error);
        let mut failure = self.failure.lock().unwrap();
        if failure.as_ref().is_some_and(|old| old.for_good) {
            return;
        }
        if failure.as_ref().is_none_or(|old| old.reason != reason) {
            tracing::error!(db = %self.name, reason, "database failed, writers are refused");
        }
        *failure = Some(Failure { reason, tried: Instant::now(), for_good: false });
    }

    /// Puts the database into the failed state until a snapshot, an import or a restart: its files
    /// are not known to be one state, so nothing is made of them, and none is removed.
    pub(super) fn fail_for_good(&self, error: &Error) {
        self.fail(error);
        if let Some(failure) = &mut *self.failure.lock().unwrap() {
            failure.for_good = true;
        }
        self.set_needs_snapshot(true);
    }

    /// Whether it is in the failed state for good.
    pub(super) fn is_lost(&self) -> bool {
        self.failure.lock().unwrap().as_ref().is_some_and(|failure| failure.for_good)
    }

    /// Whether it is in the failed state, for a while or for good.
    pub(super) fn has_failed(&self) -> bool {
        self.failure.lock().unwrap().is_some()
    }

    /// An error if the database is lost.
    pub(super) fn refuse_lost(&self) -> Result<()> {
        match &*self.failure.lock().unwrap() {
            Some(Failure { reason, for_good: true, .. }) => {
                Err(Error::Failed { db: self.name.clone(), reason: reason.clone() })
            }
            _ => Ok(()),
        }
    }

    /// The database works.
    pub(super) fn mend(&self) {
        if self.failure.lock().unwrap().take().is_some() {
            tracing::info!(db = %self.name, "database works again");
        }
    }

    /// Whether a writer must be refused; a failed database is tried again first, once in a while.
    pub(super) fn refuses_writers(&self) -> bool {
        match &mut *self.failure.lock().unwrap() {
            None => return self.chain_refuses(),
            Some(failure) if failure.for_good || failure.tried.elapsed() < MEND_INTERVAL => {
                return true;
            }
            Some(failure) => failure.tried = Instant::now(),
        }
        self.try_capture();
        self.failure.lock().unwrap().is_some()
    }

    /// Whether the chain takes no more transactions; then the writer tries again what failed.
    fn chain_refuses(&self) -> bool {
        let refuses = self.chain.refuses();
        if refuses {
            self.shared.writer.queued(&self.chain);
        }
        refuses
    }

    pub(super) fn busy(&self, what: &'static str) -> Error {
        Error::Busy { db: self.name.clone(), what }
    }

    pub(super) fn corrupt(&self, what: &'static str, detail: &str) -> Error {
        Error::Corrupt { what, db: self.name.clone(), detail: detail.to_owned() }
    }

    pub(super) fn ltx_error(&self, what: &'static str, source: ltx::Error) -> Error {
        Error::Ltx { what, db: self.name.clone(), source }
    }

    /// Counts and, once a minute, logs a write that this node may not make.
    pub(super) fn note_refused_write(&self) {
        self.counters.refused_writes.fetch_add(1, Ordering::Relaxed);
        if self.note_is_due(0) {
            let primary = self.shared.primary_hint();
            tracing::warn!(db = %self.name, primary, "refused a write: this node is not the primary");
        }
    }

    /// Logs, once a minute, a write that no transaction can be made of.
    pub(super) fn note_no_transaction(&self, why: &str) {
        if self.note_is_due(1) {
            tracing::error!(db = %self.name, why, "refused a write that is not part of a transaction; use journal_mode DELETE, TRUNCATE, PERSIST or WAL");
        }
    }

    /// Logs, once a minute, that what is written into a file without a transaction is no database.
    pub(super) fn note_no_database(&self) {
        if self.note_is_due(2) {
            tracing::warn!(file = %self.name, "refused a write: not a SQLite database; other files have no place in the mount");
        }
    }

    /// Logs, once a minute, a writer that had the WAL open before the first HALT lock.
    pub fn note_write_past(&self, process: Option<u32>) {
        if self.note_is_due(3) {
            tracing::warn!(db = %self.name, process, "refused a write under a halt lock: this process had the database open before, in a way that cannot be held back; it must open it again");
        }
    }

    fn note_is_due(&self, which: usize) -> bool {
        let mut notes = self.notes.lock().unwrap();
        let due = notes[which].is_none_or(|last| last.elapsed() >= NOTE_INTERVAL);
        if due {
            notes[which] = Some(Instant::now());
        }
        due
    }

    /// A file that nobody else sees and that goes when it is dropped.
    pub(super) fn spool_file(&self) -> Result<File> {
        os::unnamed_file("spool", self.dir.path())
            .map_err(Error::io("create spool file", self.dir.path()))
    }
}
