//! What comes from the primary: received and verified in full, queued for its database, applied.
//!
//! Receiving never waits for readers: each database has a queue and, while there is something in it,
//! a thread of its own. [`wal`] appends to the WAL without disturbing readers; [`exclusive`] is for
//! everything else. Before anything is written, the checksum that the database would have is compared
//! with the one that the LTX file promises; a mismatch applies nothing and asks for a snapshot.
//!
//! Invariant: `received` is the position that the queue leads to.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ltx::{Checksum, Decoder, Header, Pgno, Pos, Trailer, Txid};

use super::capture::Change;
use super::capture::wal::Captured;
use super::checksum::PageSums;
use super::db::{Db, DbState};
use super::error::{Error, Result, chain_text};
use super::halt::HaltId;
use super::locks::{LockKind, Owner};
use crate::sqlite::header::{DatabaseHeader, JournalMode};
use crate::sqlite::lock_byte::{Lock, LockSet};
use crate::{limits, os, threads};

mod exclusive;
mod follow;
mod index;
mod remembered;
mod rollback;
pub mod wal;

pub(super) use exclusive::Stale;
use follow::Follower;

/// How long the thread of a database waits for more before it ends.
const LINGER: Duration = Duration::from_secs(5);

/// How long a full queue may stand still before the stream goes on without the database.
const FULL_WAIT: Duration = Duration::from_secs(1);

/// How long after a failed apply it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How long the end waits for an applier before it looks whether that waits for a lock again.
const STOP_LOOK: Duration = Duration::from_millis(100);

/// The queue of received LTX files of one database.
pub struct Inbox {
    state: Mutex<State>,
    /// Something was queued, taken, or the end is near.
    changed: Condvar,
    /// The applier waits for readers of the database to finish.
    waits_for_readers: AtomicBool,
    /// The wal-index is being replaced behind the kernel's page cache.
    rewriting_index: AtomicBool,
    /// Held by who applies or takes hold: all do it as one lock owner, so locks do not part them.
    turn: Mutex<Turn>,
    /// Whether there is a hold on a WAL database.
    followed: AtomicBool,
    /// A client was refused a lock because the applier had it.
    kept_out: AtomicBool,
    /// Something failed half-way, and the applier keeps everybody locked out.
    left: AtomicBool,
    /// How many files are queued.
    queued: AtomicUsize,
    /// How many readers of frozen states there are.
    pins: AtomicUsize,
}

/// What belongs to whoever has the turn. No FUSE worker takes it.
#[derive(Default)]
pub(in crate::engine) struct Turn {
    /// The replica's hold on a WAL database.
    follower: Option<Follower>,
}

struct State {
    /// Where the queue leads to, if there is something in it.
    received: Pos,
    /// Nothing but a snapshot can be applied.
    needs_snapshot: bool,
    /// Where the database stood, with the queue, when the primary said that this is not of its history;
    /// until a snapshot has taken the place of that.
    contradicted: Option<Pos>,
    queue: VecDeque<Arc<Received>>,
    queue_bytes: usize,
    /// A thread works on the queue.
    running: bool,
    /// What failed, or could not be had, is to be tried again, even with nothing queued.
    again: bool,
    stop: bool,
}

/// A verified LTX file off the wire.
pub struct Received {
    /// Its header.
    pub header: Header,
    /// Its trailer.
    pub trailer: Trailer,
    /// The checksum of each of its pages, ascending.
    pub sums: PageList,
    /// What page 1 says of the journal mode, if it is among them.
    mode: Option<JournalMode>,
    body: Body,
}

/// The checksums of the pages of an LTX file, ascending.
type PageList = Vec<(Pgno, Checksum)>;

/// The bytes of an LTX file.
enum Body {
    Memory(Arc<[u8]>),
    /// A temporary file in the directory of the chain; adopted by the chain, it has another name.
    Spool(PathBuf, File, u64),
}

impl Body {
    /// Reads the file from the start.
    fn open(&self) -> Result<Decoder<Box<dyn Read + '_>>, ltx::Error> {
        let source: Box<dyn Read + '_> = match self {
            Body::Memory(bytes) => Box::new(&bytes[..]),
            Body::Spool(_, file, len) => {
                let cursor = os::FileCursor::new("read:received", file).take(*len);
                Box::new(BufReader::with_capacity(limits::IO_BUFFER, cursor))
            }
        };
        Decoder::new(source)
    }
}

impl Received {
    /// A verified LTX file of `len` bytes in a temporary file.
    pub(super) fn spooled(
        header: Header,
        trailer: Trailer,
        sums: PageList,
        path: PathBuf,
        file: File,
        len: u64,
    ) -> Received {
        Received { header, trailer, sums, mode: None, body: Body::Spool(path, file, len) }
    }

    /// A small LTX file that was made here.
    pub(super) fn made(
        header: Header,
        trailer: Trailer,
        sums: PageList,
        bytes: Vec<u8>,
    ) -> Received {
        Received { header, trailer, sums, mode: None, body: Body::Memory(bytes.into()) }
    }

    /// Reads it from the start.
    fn open(&self) -> Result<Decoder<Box<dyn Read + '_>>, ltx::Error> {
        self.body.open()
    }

    fn size(&self) -> usize {
        let body = match &self.body {
            Body::Memory(bytes) => bytes.len(),
            Body::Spool(..) => 0,
        };
        body + self.sums.len() * size_of::<(Pgno, Checksum)>()
    }

    /// The position it leads to.
    pub fn pos(&self) -> Pos {
        Pos { txid: self.header.max_txid, checksum: self.trailer.post_apply }
    }

    /// The checksum that the database has after it, computed from `change`; what it promises must be
    /// the same.
    fn foretell(&self, change: &Change) -> Checksum {
        let nothing = PageSums::default();
        let before = if self.header.is_snapshot() { &nothing } else { &change.sums };
        before.rolling_after(self.header.commit, self.sums.iter().copied())
    }
}

/// Takes one LTX file off the wire; bytes are written to it.
pub struct Receiver {
    db: Arc<Db>,
    body: Body,
    buffer: Vec<u8>,
    /// Taken over by the queue; otherwise the temporary file is removed.
    kept: bool,
}

impl Receiver {
    pub(super) fn new(db: Arc<Db>) -> Receiver {
        Receiver { db, body: Body::Memory(Arc::default()), buffer: Vec::new(), kept: false }
    }

    /// The file is complete: verifies it, checks that it follows on what was received before, and
    /// queues it. Waits while the queue is full.
    ///
    /// Errors: the file does not verify, or does not follow ([`Error::PositionMismatch`]).
    pub fn finish(self) -> Result<Pos> {
        let db = self.db.clone();
        db.queue_received(self.complete()?)
    }

    /// The file is complete, and comes from the node to which the database is lent with `id`: verifies
    /// it against the database and applies it. Blocking.
    ///
    /// Errors: the file does not verify, does not fit the database, or cannot be applied; the lock is
    /// not held.
    pub fn finish_forwarded(self, id: HaltId) -> Result<Pos> {
        let db = self.db.clone();
        db.apply_forwarded(id, &Arc::new(self.complete()?))
    }

    /// [`Receiver::finish_restore`].
    pub(super) fn put_in_place(self, expected: Pos) -> Result<Pos> {
        let db = self.db.clone();
        db.restore(self.complete()?, expected)
    }

    /// The file with what it says, if it verifies.
    fn complete(mut self) -> Result<Received> {
        self.spill_if_spooled()
            .map_err(Error::io("write received ltx file", &self.db.dir.ltx()))?;
        if let Body::Memory(bytes) = &mut self.body {
            *bytes = std::mem::take(&mut self.buffer).into();
        }
        let mut received = self.verify()?;
        received.body = std::mem::replace(&mut self.body, Body::Memory(Arc::default()));
        self.kept = true;
        Ok(received)
    }

    /// What the file says, but not its body.
    fn verify(&self) -> Result<Received> {
        let ltx = |source| self.db.ltx_error("verify received ltx file", source);
        let mut decoder = self.body.open().map_err(ltx)?;
        let header = *decoder.header();
        let mut page = vec![0; header.page_size.bytes()];
        let (mut sums, mut mode) = (Vec::new(), None);
        while let Some(pgno) = decoder.next_page(&mut page).map_err(ltx)? {
            sums.push((pgno, decoder.page_checksum()));
            if pgno == Pgno(1) {
                mode = Some(self.check_first_page(&header, &page));
            }
        }
        // First, since what was damaged on its way is asked for again.
        let trailer = decoder.finish().map_err(ltx)?;
        let mode = mode.transpose()?;
        Ok(Received { header, trailer, sums, mode, body: Body::Memory(Arc::default()) })
    }

    /// The journal mode that page 1 says, which must be that of a database of pages of the file's size.
    /// Otherwise nobody could read the database any more, and this node not go on from it.
    fn check_first_page(&self, header: &Header, page: &[u8]) -> Result<JournalMode> {
        let none = |detail: String| Error::NoDatabase { db: self.db.name.clone(), detail };
        let found = DatabaseHeader::parse(page).map_err(|error| none(error.to_string()))?;
        match found.page_size == header.page_size {
            true => Ok(found.journal_mode),
            false => Err(none("page 1 says another page size".to_owned())),
        }
    }

    /// Moves what is buffered to the temporary file, once the file is too large for memory.
    fn spill(&mut self) -> io::Result<()> {
        if let Body::Memory(_) = self.body {
            let path = self.db.dir.ltx().join(format!("{:016x}.ltx.tmp", super::files::next_ino()));
            os::remove_if_present("receive:spool", &path)?;
            let file = os::create_new("receive:spool", &path)?;
            self.body = Body::Spool(path, file, 0);
        }
        self.spill_if_spooled()
    }

    fn spill_if_spooled(&mut self) -> io::Result<()> {
        if let Body::Spool(_, file, len) = &mut self.body {
            os::write_at("receive:spool", file, &self.buffer, *len)?;
            *len += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }
}

impl Write for Receiver {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(data);
        if self.buffer.len() > limits::RECEIVE_IN_MEMORY {
            self.spill()?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let (false, Body::Spool(path, ..)) = (self.kept, &self.body) {
            let _ = os::remove_if_present("receive:spool", path);
        }
    }
}

/// A salt of a new WAL. It only has to differ from the one before.
pub(in crate::engine) fn random_u32() -> u32 {
    std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0) as u32
}

impl Inbox {
    /// An empty queue.
    pub(super) fn new() -> Inbox {
        let state = State {
            received: Pos::ZERO,
            needs_snapshot: false,
            contradicted: None,
            queue: VecDeque::new(),
            queue_bytes: 0,
            running: false,
            again: false,
            stop: false,
        };
        Inbox {
            state: Mutex::new(state),
            changed: Condvar::new(),
            waits_for_readers: AtomicBool::new(false),
            rewriting_index: AtomicBool::new(false),
            turn: Mutex::default(),
            followed: AtomicBool::new(false),
            kept_out: AtomicBool::new(false),
            left: AtomicBool::new(false),
            queued: AtomicUsize::new(0),
            pins: AtomicUsize::new(0),
        }
    }

    /// Frames stay where they are until [`Inbox::unpin`].
    pub(super) fn pin(&self) {
        self.pins.fetch_add(1, Ordering::SeqCst);
    }

    /// Takes one [`Inbox::pin`] back.
    pub(super) fn unpin(&self) {
        self.pins.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether frames must stay where they are.
    fn is_pinned(&self) -> bool {
        self.pins.load(Ordering::SeqCst) > 0
    }

    /// Whether something was received that is not applied yet.
    pub(super) fn has_queue(&self) -> bool {
        self.queued.load(Ordering::SeqCst) > 0
    }

    /// Whether the applier keeps everybody locked out until something is mended.
    pub(super) fn is_left(&self) -> bool {
        self.left.load(Ordering::SeqCst)
    }

    /// Says so, or that the applier works again.
    pub(super) fn set_left(&self, left: bool) {
        self.left.store(left, Ordering::SeqCst);
    }

    /// A client was refused a lock because the applier had it.
    pub(super) fn note_kept_out(&self) {
        self.kept_out.store(true, Ordering::SeqCst);
    }

    /// If the applier kept somebody out the last time: waits as long as a client takes to try again.
    fn give_way(&self) {
        if !self.kept_out.swap(false, Ordering::SeqCst) {
            return;
        }
        let state = self.state.lock().unwrap();
        let goes_on = |state: &mut State| !state.stop;
        drop(self.changed.wait_timeout_while(state, limits::READERS_TURN, goes_on).unwrap());
    }

    /// The turn, if nobody has it.
    pub(super) fn try_turn(&self) -> Option<MutexGuard<'_, Turn>> {
        self.turn.try_lock().ok()
    }

    /// Whether the wal-index is being replaced behind the kernel's page cache.
    pub(super) fn is_rewriting_index(&self) -> bool {
        self.rewriting_index.load(Ordering::SeqCst)
    }
}

impl Db {
    /// The position that a replica asks its primary to go on from.
    pub fn received_pos(&self) -> Pos {
        self.queue_end(&self.inbox.state.lock().unwrap())
    }

    /// Where the queue leads to; zero when only a snapshot helps.
    fn queue_end(&self, state: &State) -> Pos {
        match state {
            State { needs_snapshot: true, .. } => Pos::ZERO,
            State { queue, .. } if queue.is_empty() => self.pos(),
            State { received, .. } => *received,
        }
    }

    /// The primary says that `pos`, to which the queue leads, is not of its history: the snapshot that it
    /// sends takes nothing away for good. A later word of a primary that knows nothing of this state, or is
    /// told none, does not undo that.
    pub fn set_contradicted(&self, pos: Pos) {
        self.inbox.state.lock().unwrap().contradicted = Some(pos);
    }

    /// The primary does not have this database: if it has one of that name later, that is another.
    pub fn set_unknown(&self) {
        let received = self.received_pos();
        let pos = if received.is_zero() { self.pos() } else { received };
        if !pos.is_zero() {
            self.set_contradicted(pos);
        }
    }

    /// Whether the primary said that of a state that is here, or on its way.
    fn is_contradicted(&self) -> bool {
        self.inbox.state.lock().unwrap().contradicted.is_some()
    }

    /// This node goes on from what is here itself.
    pub(super) fn forget_contradicted(&self) {
        self.inbox.state.lock().unwrap().contradicted = None;
    }

    /// A snapshot has taken the place of the state at `pos`.
    fn replaced(&self, pos: Pos) {
        let mut state = self.inbox.state.lock().unwrap();
        state.contradicted = state.contradicted.filter(|contradicted| *contradicted != pos);
    }

    /// Whether nothing but a snapshot can be applied.
    fn needs_snapshot(&self) -> bool {
        self.inbox.state.lock().unwrap().needs_snapshot
    }

    /// Says whether nothing but a snapshot can be applied.
    pub(super) fn set_needs_snapshot(&self, needs: bool) {
        self.inbox.state.lock().unwrap().needs_snapshot = needs;
    }

    fn queue_received(&self, received: Received) -> Result<Pos> {
        if self.shared.is_writable() {
            return Err(self.busy("this node is the primary now"));
        }
        let pos = received.pos();
        if self.is_here(&received) {
            return Ok(pos);
        }
        if received.header.node_id != self.shared.node_id && self.end_borrow(None) {
            tracing::warn!(db = %self.name, %pos, "halt lock lost: the primary has a transaction that is not from here");
        }
        let mut state = self.inbox.state.lock().unwrap();
        while state.queue_bytes > limits::INBOX_BYTES && !state.stop {
            let (guard, waited) = self.inbox.changed.wait_timeout(state, FULL_WAIT).unwrap();
            state = guard;
            // A queue that moves only needs time; one that stands must not stop other databases.
            if waited.timed_out()
                && let Some(what) = self.why_it_stands()
            {
                return Err(self.busy(what));
            }
        }
        self.check_follows(self.queue_end(&state), &received)?;
        state.needs_snapshot = false;
        self.enqueue(state, Arc::new(received));
        Ok(pos)
    }

    /// Queues a transaction that is in the chain and could not be applied.
    pub(super) fn queue_stored(&self, received: Arc<Received>) {
        self.enqueue(self.inbox.state.lock().unwrap(), received);
    }

    fn enqueue(&self, mut state: MutexGuard<'_, State>, received: Arc<Received>) {
        state.received = received.pos();
        state.queue_bytes += received.size();
        state.queue.push_back(received);
        self.inbox.queued.store(state.queue.len(), Ordering::SeqCst);
        self.wake_applier(state);
    }

    /// Whether it is a transaction that was committed here and taken by the primary.
    fn is_here(&self, received: &Received) -> bool {
        received.header.max_txid <= self.pos().txid
            && self.has_taken(received.pos())
            && !self.is_lost()
            && !self.needs_snapshot()
    }

    /// Whether something was received that a client would have to go on from.
    pub(super) fn is_behind(&self) -> bool {
        self.inbox.has_queue() && {
            let state = self.inbox.state.lock().unwrap();
            let last = state.queue.back().cloned();
            drop(state);
            last.is_some_and(|last| !self.is_here(&last))
        }
    }

    /// Waits until something was queued or applied, `limit` long at most.
    pub(super) fn wait_for_applier(&self, limit: Duration) {
        let state = self.inbox.state.lock().unwrap();
        if !state.queue.is_empty() && !state.stop {
            drop(self.inbox.changed.wait_timeout(state, limit).unwrap());
        }
    }

    /// Has the applier look again at what there is to do.
    pub(super) fn try_again(&self) {
        let mut state = self.inbox.state.lock().unwrap();
        state.again = true;
        self.wake_applier(state);
    }

    fn wake_applier(&self, mut state: MutexGuard<'_, State>) {
        self.inbox.changed.notify_all();
        if state.running || state.stop {
            return;
        }
        state.running = true;
        drop(state);
        if let Some(db) = self.me.upgrade() {
            db.spawn_applier();
        }
    }

    /// Why the queue does not move, unless it only needs time.
    fn why_it_stands(&self) -> Option<&'static str> {
        if self.inbox.waits_for_readers.load(Ordering::SeqCst) {
            return Some("readers do not finish");
        }
        self.has_failed().then_some("what was received cannot be applied")
    }

    /// A snapshot always follows; a range that starts inside what is there already does too, for its
    /// images are those after its last transaction; anything else must continue exactly.
    fn check_follows(&self, have: Pos, received: &Received) -> Result<()> {
        let need = received.header.pre_pos();
        let inside = need.txid < have.txid && have.txid < received.header.max_txid;
        if received.header.is_snapshot() || need == have || (inside && !have.is_zero()) {
            return Ok(());
        }
        Err(Error::PositionMismatch { db: self.name.clone(), have, need })
    }

    /// Whether it works and all is applied that led to `target` when that was received. Of a snapshot that still
    /// waits the number says nothing, for that may be below the present one.
    pub fn has_applied(&self, target: Pos) -> bool {
        let is_there = self.pos().txid >= target.txid && self.state() == DbState::Ready;
        is_there && !self.awaits_snapshot()
    }

    /// Whether a snapshot is to come, or is queued and not applied yet.
    pub fn awaits_snapshot(&self) -> bool {
        self.needs_snapshot() || self.has_queued_snapshot()
    }

    /// Whether a snapshot was received and is not applied yet.
    pub fn has_queued_snapshot(&self) -> bool {
        let state = self.inbox.state.lock().unwrap();
        state.queue.iter().any(|received| received.header.is_snapshot())
    }

    /// How many received LTX files wait to be applied.
    pub fn apply_backlog(&self) -> usize {
        self.inbox.state.lock().unwrap().queue.len()
    }

    fn spawn_applier(self: &Arc<Db>) {
        let db = self.clone();
        if let Err(error) = threads::spawn("litefs-apply", move || db.run_applier()) {
            tracing::error!(db = %self.name, %error, "start apply thread");
            self.inbox.state.lock().unwrap().running = false;
        }
    }

    /// Applies what is queued until nothing came for a while.
    fn run_applier(self: Arc<Db>) {
        while let Some(batch) = self.next_received() {
            let start = Instant::now();
            match self.apply_batch(&batch) {
                Err(error) => self.apply_failed(&error),
                Ok(()) => {
                    if !batch.is_empty() {
                        self.counters.apply.note_since(start);
                    }
                    if !self.captures_again() {
                        self.pause(self.inbox.state.lock().unwrap());
                    }
                }
            }
        }
    }

    /// The database works again, if what was committed to its WAL here can be captured; whether it does. If not,
    /// [`Db::capture_wal`] asks for another try where that may help, and who writes just now captures it all at the end.
    fn captures_again(&self) -> bool {
        let _turn = self.turn();
        if self.is_lost() {
            // What takes its place mends it.
            return true;
        }
        // A lent database was captured before.
        if self.is_followed() || self.is_lent() {
            self.mend();
            return true;
        }
        // Nothing is mended: a capture may fail just now, and asks for another try then.
        if !(self.has_failed() || self.has_uncut.load(Ordering::SeqCst)) {
            return true;
        }
        let write = LockSet::one(Lock::Write);
        if !self.try_take(Owner::APPLY, write, LockKind::Exclusive) {
            return false;
        }
        let _guard = self.guard(Owner::APPLY, write);
        self.capture_wal() == Captured::All
    }

    /// All that is queued, once there is something, or something is to be tried again; none when
    /// nothing came for a while.
    fn next_received(&self) -> Option<Vec<Arc<Received>>> {
        let end = Instant::now() + LINGER;
        let mut state = self.inbox.state.lock().unwrap();
        loop {
            if state.stop {
                state.running = false;
                self.inbox.changed.notify_all();
                return None;
            }
            if std::mem::take(&mut state.again) || !state.queue.is_empty() {
                return Some(state.queue.iter().cloned().collect());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.running = false;
                return None;
            }
            state = self.inbox.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Applies in order; what was applied leaves the queue, also when a later one fails.
    fn apply_batch(&self, batch: &[Arc<Received>]) -> Result<()> {
        let mut rest = batch;
        loop {
            let done = if rest.is_empty() { 0 } else { self.apply_some(rest)? };
            self.drop_applied(done);
            rest = &rest[done..];
            let mut turn = self.turn();
            self.settle_hold(&mut turn, limits::LOCK_WAIT)?;
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    fn drop_applied(&self, count: usize) {
        let mut state = self.inbox.state.lock().unwrap();
        for _ in 0..count {
            if let Some(gone) = state.queue.pop_front() {
                state.queue_bytes -= gone.size();
            }
        }
        self.inbox.queued.store(state.queue.len(), Ordering::SeqCst);
        self.inbox.changed.notify_all();
    }

    /// Applies at least one of `batch`; how many.
    fn apply_some(&self, batch: &[Arc<Received>]) -> Result<usize> {
        // It may be the very transaction that is being committed here.
        self.wait_settled();
        let mut turn = self.turn();
        let first = &batch[0];
        if self.is_here(first) {
            return Ok(1);
        }
        if self.is_borrowed() {
            // It came from here, but the answer was lost.
            self.follow(&mut turn, limits::LOCK_WAIT)?;
        }
        let pos = self.pos();
        // A snapshot is applied all the same: it was asked for because the files are not the position.
        if !first.header.is_snapshot() {
            if first.pos() == pos {
                // One that a restart had applied already.
                return Ok(1);
            }
            if self.is_lost() {
                let what = "it is lost, and only a snapshot mends it";
                return Err(Error::Diverged { db: self.name.clone(), pos, what });
            }
        }
        self.apply_as_fits(&mut turn, batch, limits::LOCK_WAIT)
    }

    /// Applies one transaction of the node to which the database is lent.
    pub(super) fn apply_next(&self, turn: &mut Turn, received: &Arc<Received>) -> Result<()> {
        let batch = std::slice::from_ref(received);
        self.apply_as_fits(turn, batch, limits::FORWARD_LOCK_WAIT).map(drop)
    }

    /// Applies at least one of `batch`, to the WAL or with everybody locked out; how many.
    fn apply_as_fits(
        &self,
        turn: &mut Turn,
        batch: &[Arc<Received>],
        limit: Duration,
    ) -> Result<usize> {
        if !batch[0].header.is_snapshot() {
            // A WAL that takes what the chain cannot would only grow.
            self.chain.make_room()?;
        }
        let mut change = self.change.lock().unwrap();
        let run = batch.iter().take_while(|one| self.fits_wal(&change, one)).count();
        if run > 0 {
            return self.apply_to_wal(turn, &mut change, &batch[..run]);
        }
        drop(change);
        self.apply_exclusively(turn, batch, limit)
    }

    /// A failed apply: a checksum that does not come out needs a snapshot, anything else is tried
    /// again.
    fn apply_failed(&self, error: &Error) {
        if matches!(error, Error::Diverged { .. } | Error::Ltx { .. }) {
            tracing::error!(db = %self.name, error = chain_text(error), "apply transaction: asking the primary for a snapshot");
            let mut state = self.inbox.state.lock().unwrap();
            state.queue.clear();
            state.queue_bytes = 0;
            state.again = true;
            self.inbox.queued.store(0, Ordering::SeqCst);
            state.needs_snapshot = true;
            self.inbox.changed.notify_all();
            drop(state);
            // The primary is told the position zero.
            self.shared.request_reconnect();
            return;
        }
        if self.inbox.state.lock().unwrap().stop {
            return;
        }
        self.fail(error);
        let mut state = self.inbox.state.lock().unwrap();
        // Space may come back: the same again in a while.
        state.again = true;
        self.pause(state);
    }

    /// Waits before what failed is tried again, unless there is something new.
    fn pause(&self, state: MutexGuard<'_, State>) {
        if !state.stop {
            drop(self.inbox.changed.wait_timeout(state, RETRY).unwrap());
        }
    }

    /// Ends the thread of the inbox; what is queued stays with the primary.
    pub(super) fn stop_applier(&self) {
        let mut state = self.inbox.state.lock().unwrap();
        state.stop = true;
        self.inbox.changed.notify_all();
        while state.running {
            drop(state);
            // It waits for nobody any more; one who holds a lock may keep it for good.
            self.interrupt_applier();
            state = self.inbox.state.lock().unwrap();
            if state.running {
                state = self.inbox.changed.wait_timeout(state, STOP_LOOK).unwrap().0;
            }
        }
    }
}

impl Drop for Received {
    /// Removes its temporary file, unless the chain has adopted it under another name.
    fn drop(&mut self) {
        if let Body::Spool(path, ..) = &self.body {
            let _ = os::remove_if_present("receive:spool", path);
        }
    }
}

impl Received {
    /// The last transaction it replaces all others up to, if it is a snapshot.
    fn snapshot_of(&self) -> Option<Txid> {
        self.header.is_snapshot().then_some(self.header.max_txid)
    }
}
