//! The primary's side of one replication stream.
//!
//! A stream holds what its replica has, a position for each database, and a subscription: a set of
//! names whose position moved. Each round brings the replica up to date for those names, then waits.
//! A slow replica never costs more than its set of names, a short queue and one snapshot's spool.
//!
//! Invariants: the files of a database are sent in the order of its chain, each following on the
//! position that the replica then has; *ready* comes once, after the first round; the stream ends
//! with *end*, or is broken off inside a file, so that no half file looks whole; no lock of the
//! engine is held while something is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{BufMut as _, Bytes, BytesMut};
use ltx::{NodeId, Pos, Txid};
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use super::body::{SendError, Sender};
use super::frame::{self, CHUNK_BYTES_MAX, CHUNK_HEADER_SIZE, Frame};
use super::server::Api;
use super::{Stop, stopped, transfer};
use crate::cluster::peers::Membership;
use crate::engine::{Db, LtxBytes, Next, Overlap, Subscription, chain_text};
use crate::{limits, os};

/// What a replica asked for.
pub(super) struct Request {
    /// Whether it takes a file that begins before its position.
    pub(super) overlap: Overlap,
    /// Where its databases stand, by the names it uses.
    pub(super) positions: Vec<(String, Pos)>,
    /// The only names it wants, if any.
    pub(super) filter: BTreeSet<String>,
    /// Its place among the connected replicas.
    pub(super) membership: Membership,
}

/// Why a stream ended early.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("send to replica")]
    Send(#[from] SendError),
    #[error("read ltx of {db}")]
    Read {
        db: String,
        #[source]
        source: std::io::Error,
    },
    #[error("make snapshot of {db}")]
    Snapshot {
        db: String,
        #[source]
        source: transfer::Error,
    },
}

/// Streams until the replica goes, the node stops, or `primary_lost` ends. A node that stops still
/// sends what was committed before, as far as [`limits::STREAM_END_WAIT`] allows.
pub(super) async fn serve(
    api: Arc<Api>,
    request: Request,
    sender: Sender,
    stop: Stop,
    primary_lost: impl Future<Output = ()>,
) {
    let mut stream = Stream::new(api, request, sender);
    let (mut stopping, mut stop) = (stop.clone(), stop);
    let cut_off = async {
        tokio::select! {
            biased; // A node that stops gives up its role too, and must still send its last changes.
            () = stopped(&mut stop) => sleep(limits::STREAM_END_WAIT).await,
            () = primary_lost => {}
        }
    };
    let result = tokio::select! {
        result = stream.run(&mut stopping) => result,
        () = cut_off => Ok(()),
    };
    match result {
        Ok(()) => stream.end().await,
        Err(Error::Send(SendError::Gone)) => tracing::debug!("replica disconnected"),
        Err(error) => tracing::warn!(error = chain_text(&error), "stream ended"),
    }
}

/// Why a wait ended.
#[derive(Debug, PartialEq, Eq)]
enum Wake {
    /// Something changed, or a heartbeat is due.
    Work,
    /// The node stops: the next round is the last.
    Stop,
    /// The replica gets this lease after the next round, which is the last.
    Lease(String),
}

struct Stream {
    api: Arc<Api>,
    subscription: Subscription,
    /// The subscription's set has become non-empty.
    woken: Arc<Notify>,
    /// What the replica has, by the names that it or the primary uses.
    positions: BTreeMap<String, Pos>,
    /// The backup's high-water mark that the replica was told last, where it is not zero.
    told: BTreeMap<String, Txid>,
    /// The sum of the TXIDs of `positions`.
    sent: u64,
    membership: Membership,
    filter: BTreeSet<String>,
    overlap: Overlap,
    /// Whose transactions the replica must not be sent as files, see [`Filler::left_out`].
    left_out: Option<NodeId>,
    /// Names of this round that are not done.
    pending: BTreeSet<String>,
    /// Databases that could not be read, and when to try them again.
    retry: Option<(BTreeSet<String>, Instant)>,
    outbox: Outbox,
}

impl Stream {
    fn new(api: Arc<Api>, request: Request, sender: Sender) -> Stream {
        let woken = Arc::new(Notify::new());
        let wake = woken.clone();
        let subscription = api.engine.subscribe(Box::new(move || wake.notify_one()));
        let positions: BTreeMap<String, Pos> = request.positions.into_iter().collect();
        Stream {
            api,
            subscription,
            woken,
            sent: positions.values().map(|pos| pos.txid.0).fold(0, u64::saturating_add),
            positions,
            told: BTreeMap::new(),
            left_out: (request.overlap == Overlap::Refused).then(|| request.membership.node_id()),
            membership: request.membership,
            filter: request.filter,
            overlap: request.overlap,
            pending: BTreeSet::new(),
            retry: None,
            outbox: Outbox::new(sender),
        }
    }

    /// Streams until the node stops and everything up to then is sent.
    async fn run(&mut self, stop: &mut Stop) -> Result<(), Error> {
        let local = self.api.engine.databases();
        let local = local.iter().map(|db| db.name().to_string());
        let all = self.positions.keys().cloned().chain(local).collect();
        self.pending = all;
        self.round().await?;
        // What it commits from here on it has when it comes to it over this stream.
        self.left_out = None;
        self.outbox.frame(&Frame::Ready);
        self.heartbeat();
        self.outbox.flush().await?;
        let mut pace = Pace::default();
        loop {
            let wake = self.wait(stop).await;
            match self.pending.is_empty() {
                true => self.heartbeat(),
                false => self.round().await?,
            }
            if let Wake::Lease(lease_id) = &wake {
                self.outbox.frame(&Frame::Handoff { lease_id: lease_id.clone() });
            }
            self.outbox.flush().await?;
            if wake != Wake::Work {
                return Ok(());
            }
            pace.pause().await;
        }
    }

    /// Waits for changes, for a second at the most, and makes them the next round.
    async fn wait(&mut self, stop: &mut Stop) -> Wake {
        let wake = tokio::select! {
            biased;
            () = stopped(stop) => Wake::Stop,
            lease = self.membership.lease() => Wake::Lease(lease),
            () = self.woken.notified() => Wake::Work,
            () = sleep(limits::HEARTBEAT_PERIOD) => Wake::Work,
        };
        let dirty = self.subscription.take();
        self.pending.extend(dirty.iter().map(|name| name.to_string()));
        if self.retry.as_ref().is_some_and(|(_, at)| *at <= Instant::now())
            && let Some((names, _)) = self.retry.take()
        {
            self.pending.extend(names);
        }
        self.drop_unwanted();
        wake
    }

    fn drop_unwanted(&mut self) {
        if !self.filter.is_empty() {
            self.pending.retain(|name| self.filter.contains(name));
        }
    }

    /// Brings the replica up to date for all that is pending. Snapshots come last: they take long, and one for which
    /// there is no room breaks the stream off.
    async fn round(&mut self) -> Result<(), Error> {
        self.drop_unwanted();
        let mut without_files = Vec::new();
        while let Some(name) = self.pending.first().cloned() {
            if self.bring(&name, Snapshots::Later).await? == Brought::NeedsSnapshot {
                without_files.push(name.clone());
            }
            self.pending.remove(&name);
        }
        for name in without_files {
            self.begin_with_snapshot(&name).await?;
        }
        self.membership.set_sent(self.sent);
        Ok(())
    }

    /// Brings one database up to date of which files do not lead from where the replica is.
    async fn begin_with_snapshot(&mut self, name: &str) -> Result<(), Error> {
        if let Some(db) = self.api.engine.database(name) {
            match self.send_snapshot(name, &db).await {
                Err(error) if !self.outbox.inside_ltx => return self.skip(name, error).map(drop),
                sent => sent?,
            }
        }
        self.bring(name, Snapshots::Now).await.map(drop)
    }

    /// Brings one database up to date.
    async fn bring(&mut self, name: &str, snapshots: Snapshots) -> Result<Brought, Error> {
        let Some(db) = self.api.engine.database(name) else {
            self.forget(name.to_owned());
            return Ok(Brought::UpToDate);
        };
        let brought = self.catch_up(name, &db, snapshots).await?;
        if brought == Brought::UpToDate {
            self.tell_hwm(name, &db);
        }
        Ok(brought)
    }

    /// Tells the replica how far the backup is, if that has changed.
    fn tell_hwm(&mut self, name: &str, db: &Db) {
        let txid = db.hwm();
        if self.told.get(name).copied().unwrap_or_default() != txid {
            self.told.insert(name.to_owned(), txid);
            self.outbox.frame(&Frame::Hwm { name: name.to_owned(), txid });
        }
    }

    fn forget(&mut self, name: String) {
        self.set_position(&name, None);
        self.outbox.frame(&Frame::DropDb { name });
    }

    /// Notes where the replica stands after what was sent.
    fn set_position(&mut self, name: &str, pos: Option<Pos>) {
        let old = match pos {
            Some(pos) => self.positions.insert(name.to_owned(), pos),
            None => self.positions.remove(name),
        };
        let txid = |pos: Option<Pos>| pos.map_or(0, |pos| pos.txid.0);
        self.sent = self.sent.saturating_sub(txid(old)).saturating_add(txid(pos));
    }

    /// Sends what the replica lacks of `db`, as of now: what is committed meanwhile makes it dirty
    /// again, so that one busy database does not hold up the others.
    async fn catch_up(
        &mut self,
        name: &str,
        db: &Arc<Db>,
        snapshots: Snapshots,
    ) -> Result<Brought, Error> {
        let target = db.pos();
        loop {
            let pos = self.positions.get(name).copied().unwrap_or_default();
            let step = match self.next_step(name, db, pos, target).await {
                Ok(step) => step,
                Err(error) => return self.skip(name, error),
            };
            self.set_position(name, Some(step.pos));
            self.outbox.flush_if_full().await?;
            match step.then {
                Then::Done => return Ok(Brought::UpToDate),
                Then::More => {}
                Then::Large(bytes) => {
                    self.send_large(name, bytes).await?;
                    self.finish_ltx(name);
                }
                Then::Snapshot if snapshots == Snapshots::Later => {
                    return Ok(Brought::NeedsSnapshot);
                }
                Then::Snapshot => match self.send_snapshot(name, db).await {
                    Err(error) if !self.outbox.inside_ltx => return self.skip(name, error),
                    sent => sent?,
                },
            }
        }
    }

    /// Leaves out a database that cannot be read, until [`limits::STREAM_RETRY`] from now; nothing
    /// of it was begun, so the others go on.
    fn skip(&mut self, name: &str, error: Error) -> Result<Brought, Error> {
        if let Error::Send(error) = error {
            return Err(error.into());
        }
        tracing::warn!(db = name, error = chain_text(&error), "left out of the stream for now");
        let (names, _) = self.retry.take().unwrap_or_else(|| (BTreeSet::new(), Instant::now()));
        let names = names.into_iter().chain([name.to_owned()]).collect();
        self.retry = Some((names, Instant::now() + limits::STREAM_RETRY));
        Ok(Brought::UpToDate)
    }

    /// Encodes the next files into the outbox. A small transaction that was just committed is
    /// encoded here and now; reading files or a large one goes to a thread of its own.
    async fn next_step(
        &mut self,
        name: &str,
        db: &Arc<Db>,
        pos: Pos,
        target: Pos,
    ) -> Result<Step, Error> {
        let hwm = self.api.engine.hwm(name);
        let (overlap, left_out) = (self.overlap, self.left_out);
        let (name_of_filler, db) = (name.to_owned(), db.clone());
        let filler = Filler { name: name_of_filler, db, target, hwm, overlap, left_out };
        let mut buffer = self.outbox.take_buffer();
        let (buffer, step) = if filler.is_small(pos) {
            let step = filler.fill(pos, Thread::Task, &mut buffer);
            (buffer, step)
        } else {
            let filled = spawn_blocking(move || {
                let step = filler.fill(pos, Thread::Own, &mut buffer);
                (buffer, step)
            });
            filled.await.map_err(|error| read_error(name, std::io::Error::other(error)))?
        };
        self.outbox.put_buffer(buffer);
        if let Ok(step) = &step {
            self.api.options.metrics.frames_sent(name).inc_by(step.files);
        }
        step
    }

    /// Sends the bytes of a file that is larger than one piece, after its frame.
    async fn send_large(&mut self, name: &str, bytes: LtxBytes) -> Result<(), Error> {
        self.outbox.begin_ltx(name);
        match bytes {
            LtxBytes::Memory(bytes) => {
                for data in bytes.chunks(CHUNK_BYTES_MAX) {
                    self.outbox.chunks(data);
                    self.outbox.flush_if_full().await?;
                }
            }
            LtxBytes::File(file, len) => self.send_file(name, Arc::new(file), len).await?,
        }
        Ok(())
    }

    async fn send_file(&mut self, name: &str, file: Arc<File>, len: u64) -> Result<(), Error> {
        let mut offset = 0;
        while offset < len {
            let mut buffer = self.outbox.take_buffer();
            let file = file.clone();
            let read = spawn_blocking(move || {
                let read = read_chunks(&file, offset..len, &mut buffer);
                (buffer, read)
            });
            let (buffer, read) =
                read.await.map_err(|error| read_error(name, std::io::Error::other(error)))?;
            self.outbox.put_buffer(buffer);
            offset += read.map_err(|source| read_error(name, source))?;
            self.outbox.flush_if_full().await?;
        }
        Ok(())
    }

    fn finish_ltx(&mut self, name: &str) {
        self.outbox.end_ltx();
        self.api.options.metrics.frames_sent(name).inc();
        let txid = self.api.engine.hwm(name);
        self.outbox.frame(&Frame::Hwm { name: name.to_owned(), txid });
    }

    /// Sends a snapshot of `db` while it is made; heartbeats until its first bytes are there.
    async fn send_snapshot(&mut self, name: &str, db: &Arc<Db>) -> Result<(), Error> {
        let error = |source| Error::Snapshot { db: name.to_owned(), source };
        let mut snapshot = transfer::start(&self.api, db.clone(), transfer::Kind::Snapshot);
        while timeout(limits::HEARTBEAT_PERIOD, snapshot.ready()).await.is_err() {
            self.heartbeat();
            self.outbox.flush().await?;
        }
        let mut data = snapshot.next().await.map_err(error)?;
        self.outbox.begin_ltx(name);
        while let Some(bytes) = data {
            self.outbox.chunks(&bytes);
            self.outbox.flush_if_full().await?;
            data = snapshot.next().await.map_err(error)?;
        }
        let pos = snapshot.finish().await.map_err(error)?;
        self.outbox.end_ltx();
        self.set_position(name, Some(pos));
        self.api.options.metrics.snapshots_sent(name).inc();
        tracing::info!(db = name, %pos, "snapshot sent");
        Ok(())
    }

    fn heartbeat(&mut self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.outbox.frame(&Frame::Heartbeat { timestamp_ms: now.as_millis() as i64 });
    }

    async fn end(mut self) {
        if self.outbox.is_broken() {
            return; // The body breaks off: nothing that follows would make sense.
        }
        self.outbox.frame(&Frame::End);
        // A replica that takes nothing now must not hold up the end of the node.
        let ended = timeout(limits::STREAM_END_WAIT, self.outbox.flush()).await;
        if ended.is_ok_and(|ended| ended.is_ok()) {
            self.outbox.sender.finish();
        }
    }
}

fn read_error(name: &str, source: std::io::Error) -> Error {
    Error::Read { db: name.to_owned(), source }
}

/// When snapshots may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Snapshots {
    Later,
    Now,
}

/// Where a database is at the replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Brought {
    /// Where it is here, or left out for now.
    UpToDate,
    /// Where no file here goes on.
    NeedsSnapshot,
}

/// Encodes the next files of one database.
struct Filler {
    name: String,
    db: Arc<Db>,
    target: Pos,
    hwm: Txid,
    overlap: Overlap,
    /// LiteFS leaves out files with its own id in them, for it has committed that. It has not, if it says so by its
    /// position: the answer to its commit was lost, and it has rolled back. A snapshot it takes from anybody; not while it
    /// has the HALT lock, on which it would wait for itself.
    left_out: Option<NodeId>,
}

/// Where files are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thread {
    /// On a thread of their own, which may read and compress.
    Own,
    /// In the task of the stream: small ones that are in memory.
    Task,
}

/// What was encoded, and what comes next.
struct Step {
    /// What the replica has after what was encoded, and after [`Then::Large`].
    pos: Pos,
    /// How many files were encoded.
    files: u64,
    then: Then,
}

enum Then {
    Done,
    More,
    /// The next file is too large for the buffer, or not in memory.
    Large(LtxBytes),
    Snapshot,
}

impl Filler {
    /// Whether what follows on `pos` is in memory and quickly encoded.
    fn is_small(&self, pos: Pos) -> bool {
        let next = self.db.chain().recent_after(pos);
        next.is_some_and(|transaction| transaction.size_hint() <= limits::BODY_PIECE_BYTES)
    }

    /// Appends files that follow on `pos`, until the target or a full piece; in the task, until one
    /// that is not small.
    fn fill(&self, mut pos: Pos, thread: Thread, out: &mut BytesMut) -> Result<Step, Error> {
        let mut files = 0;
        loop {
            let (bytes, next_pos) = match self.db.next_after(pos, self.overlap) {
                Next::Current => return Ok(Step { pos, files, then: Then::Done }),
                Next::Snapshot => return Ok(Step { pos, files, then: Then::Snapshot }),
                Next::Ltx { author, .. } if Some(author) == self.left_out && !self.db.is_lent() => {
                    return Ok(Step { pos, files, then: Then::Snapshot });
                }
                Next::Ltx { bytes, pos, .. } => (bytes, pos),
            };
            match bytes {
                LtxBytes::Memory(bytes) if bytes.len() <= limits::BODY_PIECE_BYTES => {
                    self.append(&bytes, out);
                }
                LtxBytes::File(file, len) if len <= limits::BODY_PIECE_BYTES as u64 => {
                    let mut bytes = vec![0; len as usize]; // at most BODY_PIECE_BYTES
                    let read = os::read_exact_at("read:stream", &file, &mut bytes, 0);
                    match read {
                        Ok(()) => {}
                        Err(source) if files == 0 => return Err(read_error(&self.name, source)),
                        // What is encoded goes out first, and is not sent again.
                        Err(_) => return Ok(Step { pos, files, then: Then::More }),
                    }
                    self.append(&bytes, out);
                }
                large => return Ok(Step { pos: next_pos, files, then: Then::Large(large) }),
            }
            pos = next_pos;
            files += 1;
            if pos.txid >= self.target.txid {
                return Ok(Step { pos, files, then: Then::Done });
            }
            let is_full = out.len() >= limits::BODY_PIECE_BYTES;
            if is_full || (thread == Thread::Task && !self.is_small(pos)) {
                return Ok(Step { pos, files, then: Then::More });
            }
        }
    }

    fn append(&self, file: &[u8], out: &mut BytesMut) {
        Frame::Ltx { name: self.name.clone() }.encode(out);
        frame::encode_chunks(file, out);
        frame::encode_chunks_end(out);
        Frame::Hwm { name: self.name.clone(), txid: self.hwm }.encode(out);
    }
}

/// Appends chunks of the file from `range` (bytes) until the buffer has a full piece; how many bytes.
fn read_chunks(
    file: &File,
    range: std::ops::Range<u64>,
    out: &mut BytesMut,
) -> std::io::Result<u64> {
    let mut offset = range.start;
    while offset < range.end && out.len() < limits::BODY_PIECE_BYTES {
        let len = (range.end - offset).min(CHUNK_BYTES_MAX as u64) as usize;
        out.put_u16(len as u16); // at most CHUNK_BYTES_MAX
        let start = out.len();
        out.resize(start + len, 0);
        os::read_exact_at("read:stream", file, &mut out[start..], offset)?;
        offset += len as u64;
    }
    Ok(offset - range.start)
}

/// Encoded frames on their way to the replica, sent in large pieces.
struct Outbox {
    buffer: BytesMut,
    sender: Sender,
    /// The end of an LTX file is due.
    inside_ltx: bool,
    /// A piece is on its way: cancelled now, the replica does not get it.
    sending: bool,
}

impl Outbox {
    fn new(sender: Sender) -> Outbox {
        Outbox { buffer: BytesMut::new(), sender, inside_ltx: false, sending: false }
    }

    /// Whether the stream was cut where a replica would notice.
    fn is_broken(&self) -> bool {
        self.inside_ltx || self.sending
    }

    fn frame(&mut self, frame: &Frame) {
        frame.encode(&mut self.buffer);
    }

    fn begin_ltx(&mut self, name: &str) {
        self.frame(&Frame::Ltx { name: name.to_owned() });
        self.inside_ltx = true;
    }

    fn chunks(&mut self, data: &[u8]) {
        self.buffer.reserve(data.len() + data.len() / CHUNK_BYTES_MAX * CHUNK_HEADER_SIZE + 16);
        frame::encode_chunks(data, &mut self.buffer);
    }

    fn end_ltx(&mut self) {
        frame::encode_chunks_end(&mut self.buffer);
        self.inside_ltx = false;
    }

    /// Lends the buffer to a thread that fills it; what is in it stays.
    fn take_buffer(&mut self) -> BytesMut {
        self.sending = true;
        std::mem::take(&mut self.buffer)
    }

    fn put_buffer(&mut self, buffer: BytesMut) {
        self.buffer = buffer;
        self.sending = false;
    }

    async fn flush_if_full(&mut self) -> Result<(), SendError> {
        if self.buffer.len() >= limits::BODY_PIECE_BYTES { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), SendError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.sending = true;
        let piece: Bytes = self.buffer.split().freeze();
        self.sender.send(piece).await?;
        self.sending = false;
        Ok(())
    }
}

/// Lets a millisecond pass between two rounds while changes come quickly, and none before one that
/// comes alone.
#[derive(Default)]
struct Pace {
    last_round: Option<Instant>,
}

impl Pace {
    async fn pause(&mut self) {
        let gap = self.last_round.map_or(Duration::MAX, |last| last.elapsed());
        if gap < limits::STREAM_QUICK {
            // Nobody waits for the wake-up meanwhile, so a commit only leaves its mark.
            sleep(limits::STREAM_PAUSE).await;
        }
        self.last_round = Some(Instant::now());
    }
}
