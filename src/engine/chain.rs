//! The LTX files of one database: the queue of captured transactions, the files they become, when
//! they are durable, and who reads them.
//!
//! Transactions are written behind the commit, in order, by one thread of the node ([`Writer`]).
//! What queued up while it was busy goes into one file (a range `MIN-MAX.ltx`), so that ten thousand
//! commits a second do not make ten thousand files. Files are not synced when they are written but
//! when somebody needs them durable ([`Chain::when_durable`]), all at once: until a checkpoint moves
//! frames, the WAL can rebuild them.
//!
//! Invariants: `written` and `synced` only grow, and are ends of files; `synced <= written`; files in
//! `files` do not overlap; the transactions in `queue` and the newest file are contiguous.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use ltx::{Checksum, Compression, Header, NodeId, Pos, Txid};

use super::error::{Error, Result, chain_text};
use super::layout::DbDir;
use super::lost_found;
use super::name::DbName;
use super::sync::Mutex;
use super::transaction::Transaction;
use crate::{limits, os};

use recent::Recent;

pub use recent::Budget;
pub use writer::{Waker, Writer};

#[cfg(test)]
mod orders;
pub(in crate::engine) mod positions;
mod recent;
#[cfg(test)]
mod tests;
mod writer;

/// Called once: `Ok` when what was asked for is durable, or why it cannot be.
pub type Durable = Box<dyn FnOnce(Result<(), String>) + Send>;

/// The chain of one database.
pub struct Chain {
    db: DbName,
    dir: DbDir,
    compression: Compression,
    /// Guards the lists below; never held across I/O.
    inner: Mutex<Inner>,
    /// Held by whoever writes, syncs or removes files of the chain.
    files: Mutex<()>,
    /// The writer knows that something is queued, and has not looked since.
    is_told: AtomicBool,
}

#[derive(Default)]
struct Inner {
    /// Captured, not yet in a file; oldest first.
    queue: VecDeque<Arc<Transaction>>,
    queue_bytes: usize,
    /// The newest transactions, whether in a file or not, for the streams.
    recent: Recent,
    /// The files, by their first transaction.
    files: BTreeMap<Txid, LtxFile>,
    /// Those of them that are of a time to come, and when that was seen.
    ahead: BTreeMap<Txid, Instant>,
    /// The last transaction that is in a file.
    written: Txid,
    /// The last transaction that is in a durable file.
    synced: Txid,
    /// Written files that are not durable yet: names rather than open files, of which a node with many
    /// databases would run out.
    unsynced: Vec<Unsynced>,
    /// Files of transactions that were rolled back and could not be removed.
    withdrawn: Vec<PathBuf>,
    /// Files are being synced that are no longer in `unsynced`.
    syncing: bool,
    /// Who waits for which transaction to be durable.
    waiters: Vec<(Txid, Durable)>,
    /// Why the last attempt to write failed; cleared by the next success.
    error: Option<String>,
    reaped: u64,
}

/// A written file that is not durable yet.
#[derive(Clone)]
struct Unsynced {
    /// What it was made of, without the bytes.
    transaction: Arc<Transaction>,
    /// A sync has failed: what the kernel could not write it may have forgotten, and another sync
    /// would not tell. So the file is written again.
    suspect: bool,
}

/// A file of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LtxFile {
    /// Its first transaction.
    pub min: Txid,
    /// Its last transaction.
    pub max: Txid,
    /// Its size in bytes.
    pub size: u64,
    /// When it was written.
    pub mtime: SystemTime,
}

/// What follows on a position.
pub enum Successor {
    /// A transaction in memory.
    Recent(Arc<Transaction>),
    /// An opened file that contains the next transaction.
    File(File, LtxFile),
    /// It waits to be written, and is too large or too old for the transactions in memory:
    /// [`Chain::flush`] makes it a file.
    Queued,
    /// The chain does not reach back that far.
    Gone,
}

/// How much there is, for the metrics.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stats {
    /// Files.
    pub count: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Files removed by retention so far.
    pub reaped: u64,
    /// Transactions that wait to be written.
    pub backlog: usize,
}

impl Chain {
    /// The chain whose files stand in `dir`, all of them durable, ending at `last`. `budget` is for the
    /// transactions in memory.
    pub fn open(
        db: DbName,
        dir: DbDir,
        compression: Compression,
        last: Txid,
        budget: &Budget,
    ) -> Result<Chain> {
        let files = list(&dir)?;
        positions::remove_orphans(&dir).map_err(Error::io("clear ltx dir", &dir.ltx()))?;
        let recent = Recent::new(budget.clone());
        let inner = Inner { files, written: last, synced: last, recent, ..Inner::default() };
        let (inner, files) = (Mutex::new(inner), Mutex::new(()));
        let is_told = AtomicBool::new(false);
        Ok(Chain { db, dir, compression, inner, files, is_told })
    }

    /// The chain of a directory that cannot be listed.
    pub fn unknown(db: DbName, dir: DbDir, compression: Compression) -> Chain {
        let (inner, files) = (Mutex::default(), Mutex::new(()));
        Chain { db, dir, compression, inner, files, is_told: AtomicBool::new(false) }
    }

    /// Looks again which files there are: a snapshot takes the place of all of them.
    pub fn list_again(&self) -> Result<()> {
        let _files = self.files.lock().unwrap();
        self.inner.lock().unwrap().files = list(&self.dir)?;
        Ok(())
    }

    /// Adds a captured transaction behind all others. The caller wakes the [`Writer`].
    pub fn push(&self, transaction: Arc<Transaction>) {
        let mut inner = self.inner.lock().unwrap();
        inner.queue_bytes += transaction.size_hint();
        inner.queue.push_back(transaction.clone());
        inner.recent.push(transaction);
    }

    /// Writes one transaction to its file at once and, if `durability` says so, syncs it and the directory;
    /// nothing may be queued. The transaction does not count before [`Chain::confirm`], which wants to know the
    /// bytes of the file.
    pub fn write_now(&self, transaction: &Transaction, durability: Durability) -> Result<u64> {
        let _files = self.files.lock().unwrap();
        debug_assert!(self.inner.lock().unwrap().queue.is_empty(), "journal commit after wal ones");
        let (file, size) = self.write_file(transaction)?;
        if durability == Durability::Synced {
            let synced = os::sync("chain:sync", &file)
                .map_err(Error::io("sync ltx file", &self.dir.ltx()))
                .and_then(|()| self.sync_dir());
            synced.inspect_err(|_| self.remove_unconfirmed(transaction))?;
        } else {
            self.inner.lock().unwrap().unsynced.push(Unsynced::new(transaction));
        }
        Ok(size)
    }

    /// The transaction of the last [`Chain::write_now`] has become part of the chain.
    /// A snapshot, which must be durable, takes the place of all files before it.
    pub fn confirm(&self, transaction: Arc<Transaction>, size: u64) {
        if transaction.min == Txid(1) {
            self.forget_all_but(&self.dir.ltx_file(transaction.min, transaction.max));
        }
        let mut inner = self.inner.lock().unwrap();
        inner.add_file(LtxFile {
            min: transaction.min,
            max: transaction.max,
            size,
            mtime: SystemTime::now(),
        });
        if inner.unsynced.is_empty() && !inner.syncing {
            inner.synced = transaction.max;
        }
        if transaction.encoded_if_any().is_some() {
            inner.recent.push(transaction);
        } else {
            inner.recent.clear();
        }
    }

    /// Drops the transactions that are kept for the streams, which find them in their files: each has the
    /// WAL open that it refers to, and keeps its room on the disk when it has been removed.
    pub fn forget_recent(&self) {
        self.inner.lock().unwrap().recent.clear();
    }

    /// The transaction of the last [`Chain::write_now`] was rolled back. At the next start its file
    /// would be taken for the newest transaction.
    pub fn withdraw(&self, transaction: &Transaction) {
        let _files = self.files.lock().unwrap();
        let min = transaction.min;
        self.inner.lock().unwrap().unsynced.retain(|file| file.transaction.min != min);
        self.remove_unconfirmed(transaction);
    }

    fn remove_unconfirmed(&self, transaction: &Transaction) {
        let path = self.dir.ltx_file(transaction.min, transaction.max);
        self.inner.lock().unwrap().withdrawn.push(path);
        if let Err(error) = self.remove_withdrawn() {
            tracing::error!(db = %self.db, error = chain_text(&error), "take transaction back: no other is taken before");
        }
    }

    /// Removes the files of transactions that were rolled back, for good: at the next start they would
    /// count. Until that is done nothing else is written.
    fn remove_withdrawn(&self) -> Result<()> {
        let paths = self.inner.lock().unwrap().withdrawn.clone();
        if paths.is_empty() {
            return Ok(());
        }
        let remove = |path: &PathBuf| {
            os::remove_if_present("chain:withdraw", path)
                .map_err(Error::io("remove ltx file", path))
        };
        let removed = paths.iter().try_for_each(remove).and_then(|()| self.sync_dir());
        let mut inner = self.inner.lock().unwrap();
        inner.error = removed.as_ref().err().map(|error| chain_text(error));
        if removed.is_ok() {
            inner.withdrawn.clear();
        }
        removed
    }

    /// Takes a written, verified, synced LTX file into the chain under its name, which it may have already
    /// from an attempt that failed. Files that it replaces (a snapshot replaces all) are kept in
    /// `lost+found/` or removed as `replaced` says.
    pub fn adopt(&self, file: PathBuf, min: Txid, max: Txid, replaced: Replaced) -> Result<()> {
        self.sync()?;
        let _files = self.files.lock().unwrap();
        let target = self.dir.ltx_file(min, max);
        if replaced == Replaced::Keep {
            self.keep_files()?;
        }
        os::rename("chain:adopt", &file, &target).map_err(Error::io("rename ltx file", &target))?;
        self.inner.lock().unwrap().files.retain(|_, file| (file.min, file.max) != (min, max));
        self.sync_dir()?;
        if min == Txid(1) && self.clear(&target)? {
            // Those of higher numbers would be taken for the newer chain if they came back.
            self.sync_dir()?;
        }
        let size = fs::metadata(&target).map_or(0, |meta| meta.len());
        let mut inner = self.inner.lock().unwrap();
        inner.recent.clear();
        inner.unsynced.clear();
        inner.add_file(LtxFile { min, max, size, mtime: SystemTime::now() });
        inner.written = max;
        inner.synced = max;
        Ok(())
    }

    /// Calls `done` when everything up to `txid` is durable: at once if it is already, else from the
    /// writer thread. The caller wakes the [`Writer`] if this returns `Waits`.
    pub fn when_durable(&self, txid: Txid, done: Durable) -> Waiting {
        {
            let mut inner = self.inner.lock().unwrap();
            if inner.synced < txid {
                inner.waiters.push((txid, done));
                return Waiting::Waits;
            }
        }
        done(Ok(()));
        Waiting::Done
    }

    /// Whether everything up to `txid` is durable.
    pub fn is_durable(&self, txid: Txid) -> bool {
        self.inner.lock().unwrap().synced >= txid
    }

    /// Writes all that is queued. An error leaves the rest queued and is remembered.
    pub fn flush(&self) -> Result<()> {
        let _files = self.files.lock().unwrap();
        self.remove_withdrawn()?;
        while let Some(batch) = self.next_batch() {
            let result = self.write_batch(&batch);
            let mut inner = self.inner.lock().unwrap();
            inner.error = result.as_ref().err().map(|error| chain_text(error));
            result?;
            inner.drop_queued(batch.len());
        }
        Ok(())
    }

    /// Writes all that is queued and makes it durable, then answers the waiters.
    pub fn sync(&self) -> Result<()> {
        let result = self.flush().and_then(|()| self.sync_files());
        let ready = {
            let mut inner = self.inner.lock().unwrap();
            let synced = inner.synced;
            let all = std::mem::take(&mut inner.waiters);
            let (ready, rest): (Vec<_>, Vec<_>) =
                all.into_iter().partition(|(txid, _)| result.is_err() || *txid <= synced);
            inner.waiters = rest;
            ready
        };
        for (_, done) in ready {
            done(result.as_ref().copied().map_err(|error| chain_text(error)));
        }
        result
    }

    /// Why no transaction can be accepted now, if the last attempt to write failed.
    pub fn refusal(&self) -> Option<String> {
        let inner = self.inner.lock().unwrap();
        inner.error.as_ref().map(|error| format!("ltx files cannot be written: {error}"))
    }

    /// Whether the last attempt to write failed.
    pub fn has_failed(&self) -> bool {
        self.inner.lock().unwrap().error.is_some()
    }

    /// Whether no transaction can be accepted now: the last attempt to write failed, or so much is queued
    /// that committing has to wait for the writer.
    pub fn refuses(&self) -> bool {
        let inner = self.inner.lock().unwrap();
        let is_congested = inner.queue.len() > limits::CHAIN_QUEUE_LEN
            || inner.queue_bytes > limits::CHAIN_QUEUE_BYTES;
        inner.error.is_some() || is_congested
    }

    /// Whether a sync is due: somebody waits for it, one has failed, or many files have gathered.
    pub fn wants_sync(&self) -> bool {
        let inner = self.inner.lock().unwrap();
        let failed = inner.error.is_some() && !inner.unsynced.is_empty();
        let pages: usize = inner.unsynced.iter().map(|file| file.transaction.page_count()).sum();
        let many = inner.unsynced.len() >= limits::SYNC_FILES || pages >= limits::SYNC_PAGES;
        failed || !inner.waiters.is_empty() || many
    }

    /// Before a transaction that is not to be refused like a writer's: writes what is queued if that is
    /// too much, and tries again what failed. An error: it has no place here now.
    pub fn make_room(&self) -> Result<()> {
        if self.has_failed() {
            self.sync()
        } else if self.refuses() {
            self.flush()
        } else {
            Ok(())
        }
    }

    /// The transaction after `pos.txid`, if it is still in memory.
    pub fn recent_after(&self, pos: Pos) -> Option<Arc<Transaction>> {
        self.inner.lock().unwrap().recent.at(pos.txid.next())
    }

    /// What contains the transaction after `pos.txid`. One that would be too large in memory is to
    /// be read from its file.
    pub fn successor(&self, pos: Pos) -> Result<Successor> {
        let next = pos.txid.next();
        let (recent, is_queued) = {
            let inner = self.inner.lock().unwrap();
            (inner.recent.at(next), inner.is_queued(next))
        };
        match recent {
            Some(found) => Ok(Successor::Recent(found)),
            None if is_queued => Ok(Successor::Queued),
            None => self.file_after(pos),
        }
    }

    /// The file that contains the transaction after `pos.txid`.
    pub fn file_after(&self, pos: Pos) -> Result<Successor> {
        let next = pos.txid.next();
        let file = {
            let inner = self.inner.lock().unwrap();
            inner.files.range(..=next).next_back().map(|(_, file)| *file)
        };
        let Some(file) = file.filter(|file| file.max >= next) else { return Ok(Successor::Gone) };
        let path = self.dir.ltx_file(file.min, file.max);
        match File::open(&path) {
            Ok(opened) => Ok(Successor::File(opened, file)),
            // Retention was quicker.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Successor::Gone),
            Err(error) => Err(Error::io("open ltx file", &path)(error)),
        }
    }

    /// Whether `pos` is known to lie inside `file`, whose transactions lead from one checksum to another:
    /// a peer there can go on with it. What cannot be told is no.
    pub fn is_inside(&self, pos: Pos, file: &LtxFile, ends: [Checksum; 2]) -> bool {
        self.inside(pos.txid, file, ends) == Some(pos)
    }

    /// The position with the number `txid`, if it is known to lie inside `file`, whose transactions lead from
    /// one checksum to another.
    pub fn inside(&self, txid: Txid, file: &LtxFile, ends: [Checksum; 2]) -> Option<Pos> {
        positions::find(&self.dir, file, ends, txid).unwrap_or_else(|error| {
            tracing::warn!(db = %self.db, %txid, %error, "read positions inside an ltx file");
            None
        })
    }

    /// The files that begin right behind `txid` and follow on one another: at most `count` and so many
    /// bytes, but one in any case.
    pub fn files_after(&self, txid: Txid, count: usize, bytes: u64) -> Vec<LtxFile> {
        let inner = self.inner.lock().unwrap();
        let (mut next, mut sum) = (txid.next(), 0);
        let mut found = Vec::new();
        while let Some(file) = inner.files.get(&next) {
            sum += file.size;
            if found.len() == count || (!found.is_empty() && sum > bytes) {
                break;
            }
            found.push(*file);
            next = file.max.next();
        }
        found
    }

    /// Files that are older than `retention`, never the newest, and only durable ones that end before
    /// `keep_from` (a backup's high-water mark), if there is one; the oldest first.
    pub fn expired(&self, retention: Duration, keep_from: Option<Txid>) -> Vec<LtxFile> {
        let now = SystemTime::now();
        let mut inner = self.inner.lock().unwrap();
        inner.note_ahead(now);
        let newest = inner.files.last_key_value().map(|(min, _)| *min);
        let expired = |file: &&LtxFile| {
            inner.is_older(file, now, retention)
                && Some(file.min) != newest
                && file.max <= inner.synced
                && keep_from.is_none_or(|hwm| file.max < hwm)
        };
        inner.files.values().take_while(expired).copied().collect()
    }

    /// Makes durable what is written, if some of it is older than `retention`: then it can expire.
    pub fn sync_overdue(&self, retention: Duration) -> Result<()> {
        let now = SystemTime::now();
        let overdue = {
            let inner = self.inner.lock().unwrap();
            let old = |file: &LtxFile| inner.is_older(file, now, retention);
            inner.files.values().any(|file| file.max > inner.synced && old(file))
        };
        if overdue { self.sync_files() } else { Ok(()) }
    }

    /// Removes files that [`Chain::expired`] found; how many.
    pub fn remove(&self, old: &[LtxFile]) -> Result<usize> {
        let _files = self.files.lock().unwrap();
        for file in old {
            if self.inner.lock().unwrap().files.get(&file.min) != Some(file) {
                continue; // A snapshot has taken its place.
            }
            let path = self.dir.ltx_file(file.min, file.max);
            os::remove_if_present("chain:retain", &path)
                .and_then(|()| positions::remove(&self.dir, file.min, file.max))
                .map_err(Error::io("remove ltx file", &path))?;
            let mut inner = self.inner.lock().unwrap();
            inner.files.remove(&file.min);
            inner.reaped += 1;
        }
        Ok(old.len())
    }

    /// Whether a file contains `txid`.
    pub fn contains(&self, txid: Txid) -> bool {
        let inner = self.inner.lock().unwrap();
        inner.files.range(..=txid).next_back().is_some_and(|(_, file)| file.max >= txid)
    }

    /// Whether a file was written by one of the nodes `own`: it may hold what nobody else has.
    pub fn has_own(&self, own: &HashSet<NodeId>) -> Result<bool> {
        let files: Vec<LtxFile> = self.inner.lock().unwrap().files.values().copied().collect();
        for file in files {
            let path = self.dir.ltx_file(file.min, file.max);
            let mut bytes = [0; ltx::HEADER_SIZE];
            let opened = File::open(&path).map_err(Error::io("open ltx file", &path))?;
            let read = os::read_up_to("read:own", &opened, &mut bytes, 0)
                .map_err(Error::io("read ltx file", &path))?;
            let header = (read == bytes.len()).then(|| Header::decode(&bytes).ok()).flatten();
            if header.is_none_or(|header| own.contains(&header.node_id)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Writes `bytes` to a durable temporary file that [`Chain::adopt`] takes; its path.
    pub fn write_temporary(&self, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.dir.ltx().join("apply.ltx.tmp");
        let write = || {
            os::remove_if_present("apply:ltx", &path)?;
            let file = os::create_new("apply:ltx", &path)?;
            os::write_at("apply:ltx", &file, bytes, 0)?;
            os::sync("apply:ltx", &file)
        };
        write().map_err(Error::io("write ltx file", &path))?;
        Ok(path)
    }

    /// Writes a transaction that is no part of the chain to `lost+found/`, durably; its path.
    pub fn write_aside(&self, transaction: &Transaction) -> Result<PathBuf> {
        let path = self.dir.ltx_file(transaction.min, transaction.max);
        let temporary = path.with_extension("aside.ltx.tmp");
        let file = self.write_temporary_file(transaction, &temporary)?;
        os::sync("chain:aside", &file).map_err(Error::io("sync ltx file", &temporary))?;
        let name = format!("{}-{}.ltx", transaction.min, transaction.max);
        Ok(lost_found::take_as(&self.dir, &temporary, &name)?)
    }

    /// Where its files are.
    pub fn dir(&self) -> &DbDir {
        &self.dir
    }

    /// How much there is.
    pub fn stats(&self) -> Stats {
        let inner = self.inner.lock().unwrap();
        Stats {
            count: inner.files.len(),
            bytes: inner.files.values().map(|file| file.size).sum(),
            reaped: inner.reaped,
            backlog: inner.queue.len(),
        }
    }

    /// Forgets everything in memory after an error that only a snapshot mends.
    pub fn reset(&self, last: Txid) -> Result<()> {
        let files = list(&self.dir)?;
        let mut inner = self.inner.lock().unwrap();
        let waiters = std::mem::take(&mut inner.waiters);
        let reaped = inner.reaped;
        *inner = Inner { files, written: last, synced: last, waiters, reaped, ..Inner::default() };
        Ok(())
    }

    /// The transactions that go into the next file: as many as can be merged and fit.
    fn next_batch(&self) -> Option<Vec<Arc<Transaction>>> {
        let inner = self.inner.lock().unwrap();
        let mut batch = vec![inner.queue.front()?.clone()];
        let mut bytes = batch[0].size_hint();
        for next in inner.queue.iter().skip(1) {
            bytes += next.size_hint();
            let fits = batch.len() < limits::LTX_BATCH_LEN && bytes <= limits::LTX_BATCH_BYTES;
            if !fits || !batch[batch.len() - 1].can_merge(next) {
                break;
            }
            batch.push(next.clone());
        }
        Some(batch)
    }

    fn write_batch(&self, batch: &[Arc<Transaction>]) -> Result<()> {
        let merged;
        let transaction = if let [one] = batch {
            &**one
        } else {
            if let Err(error) = positions::write(&self.dir, batch) {
                // The file counts all the same; who stands in its middle gets a snapshot.
                tracing::warn!(db = %self.db, %error, "write positions inside an ltx file");
            }
            merged = Transaction::merge(batch);
            &merged
        };
        let (_, size) = self.write_file(transaction)?;
        let (min, max) = (transaction.min, transaction.max);
        let mut inner = self.inner.lock().unwrap();
        inner.add_file(LtxFile { min, max, size, mtime: SystemTime::now() });
        inner.unsynced.push(Unsynced::new(transaction));
        Ok(())
    }

    /// Writes the LTX file of one transaction under its name. A torn one left by a crash is found by
    /// its checksum at the next start, and rebuilt from the WAL.
    fn write_file(&self, transaction: &Transaction) -> Result<(File, u64)> {
        let path = self.dir.ltx_file(transaction.min, transaction.max);
        let temporary = path.with_extension("ltx.tmp");
        let file = self.write_temporary_file(transaction, &temporary)?;
        if let Err(error) = os::rename("chain:ltx", &temporary, &path) {
            // It would only take up room on a disk that may be full.
            let _ = os::remove_if_present("chain:ltx", &temporary);
            return Err(Error::io("rename ltx file", &path)(error));
        }
        let size = file.metadata().map_or(0, |meta| meta.len());
        Ok((file, size))
    }

    fn write_temporary_file(&self, transaction: &Transaction, temporary: &Path) -> Result<File> {
        os::remove_if_present("chain:ltx", temporary)
            .map_err(Error::io("remove old temporary", temporary))?;
        let file = os::create_new("chain:ltx", temporary)
            .map_err(Error::io("create ltx file", temporary))?;
        let written = match transaction.encoded_if_any() {
            Some(bytes) => os::write_at("chain:ltx", &file, &bytes, 0).map_err(ltx::Error::Write),
            None => transaction
                .write(
                    BufWriter::with_capacity(
                        limits::IO_BUFFER,
                        os::Labelled::new("chain:ltx", &file),
                    ),
                    self.compression,
                )
                .and_then(|buffer| match buffer.into_inner() {
                    Ok(_) => Ok(()),
                    Err(error) => Err(ltx::Error::Write(error.into_error())),
                }),
        };
        if let Err(source) = written {
            // What was written of it would only take up room on a disk that may be full.
            let _ = os::remove_if_present("chain:ltx", temporary);
            return Err(Error::Ltx { what: "write ltx file", db: self.db.clone(), source });
        }
        Ok(file)
    }

    fn sync_files(&self) -> Result<()> {
        let _files = self.files.lock().unwrap();
        let (unsynced, written) = {
            let mut inner = self.inner.lock().unwrap();
            if inner.unsynced.is_empty() {
                inner.synced = inner.written;
                return Ok(());
            }
            inner.syncing = true;
            (std::mem::take(&mut inner.unsynced), inner.written)
        };
        let result = self.sync_all(&unsynced).and_then(|()| self.sync_dir());
        let mut inner = self.inner.lock().unwrap();
        inner.syncing = false;
        match &result {
            Ok(()) => {
                inner.synced = written;
                // Whether more can be written, the next flush tells.
                if inner.queue.is_empty() {
                    inner.error = None;
                }
            }
            Err(error) => {
                inner.error = Some(chain_text(error));
                // Before those that were written meanwhile.
                let suspects = unsynced.into_iter().map(|file| Unsynced { suspect: true, ..file });
                inner.unsynced.splice(0..0, suspects);
            }
        }
        result
    }

    /// Starts the write-back of all files before waiting for the first: one journal commit of the
    /// file system instead of one for each.
    fn sync_all(&self, files: &[Unsynced]) -> Result<()> {
        let (suspect, fresh): (Vec<_>, Vec<_>) = files.iter().partition(|file| file.suspect);
        suspect.into_iter().try_for_each(|file| self.write_again(&file.transaction))?;
        let dir = self.dir.ltx();
        for part in fresh.chunks(limits::SYNC_FILES) {
            let error = || Error::io("sync ltx files", &dir);
            let open = |file: &&Unsynced| os::open("chain:ltx", &file.path(&self.dir));
            let opened = part.iter().map(open).collect::<io::Result<Vec<File>>>();
            let opened = opened.map_err(error())?;
            opened.iter().for_each(os::start_writeback);
            opened.iter().try_for_each(|file| os::sync("chain:sync", file)).map_err(error())?;
        }
        Ok(())
    }

    /// Writes a file again, durably: from what it was made of, or, where that has changed since, from
    /// itself. If neither is right any more the chain has a gap there.
    fn write_again(&self, transaction: &Transaction) -> Result<()> {
        let path = self.dir.ltx_file(transaction.min, transaction.max);
        let temporary = path.with_extension("ltx.tmp");
        let copied = match self.write_temporary_file(transaction, &temporary) {
            Err(Error::Ltx { source: ltx::Error::Read(_), .. }) => {
                self.copy_verified(&path, &temporary)?
            }
            written => Some(written?),
        };
        match copied {
            Some(file) => {
                os::sync("chain:sync", &file).map_err(Error::io("sync ltx file", &temporary))?;
                os::rename("chain:ltx", &temporary, &path)
                    .map_err(Error::io("rename ltx file", &path))
            }
            None => {
                let kept = lost_found::take(&self.dir, &path)?;
                tracing::error!(db = %self.db, path = %kept.display(), "ltx file is damaged after a failed sync, and what it was made of is gone: replicas that need it get a snapshot");
                self.inner.lock().unwrap().files.remove(&transaction.min);
                Ok(())
            }
        }
    }

    /// Copies an LTX file that verifies; none if it does not.
    fn copy_verified(&self, path: &Path, temporary: &Path) -> Result<Option<File>> {
        let bytes = os::read("read:chain", path).map_err(Error::io("read ltx file", path))?;
        if ltx::verify(&bytes[..]).is_err() {
            return Ok(None);
        }
        os::remove_if_present("chain:ltx", temporary)
            .and_then(|()| os::create_new("chain:ltx", temporary))
            .and_then(|file| os::write_at("chain:ltx", &file, &bytes, 0).map(|()| Some(file)))
            .map_err(Error::io("write ltx file", temporary))
    }

    fn sync_dir(&self) -> Result<()> {
        os::sync_dir("chain:dir", &self.dir.ltx())
            .map_err(Error::io("sync ltx dir", &self.dir.ltx()))
    }

    /// Removes what the durable snapshot `keep` replaces. What cannot be removed is only room lost.
    fn forget_all_but(&self, keep: &Path) {
        let _files = self.files.lock().unwrap();
        if let Err(error) = self.clear(keep) {
            tracing::warn!(db = %self.db, error = chain_text(&error), "remove old ltx files");
        }
        let mut inner = self.inner.lock().unwrap();
        inner.files.clear();
        // The first transaction of a database is one too, and not always durable yet.
        inner.unsynced.retain(|file| file.path(&self.dir) == keep);
        inner.recent.clear();
    }

    /// Puts all files of the chain into `lost+found/` too. Until there is another chain they stay this one:
    /// a crash leaves a whole one.
    fn keep_files(&self) -> Result<()> {
        let files: Vec<LtxFile> = self.inner.lock().unwrap().files.values().copied().collect();
        let paths = files.iter().map(|file| self.dir.ltx_file(file.min, file.max));
        paths
            .filter(|path| path.exists())
            .try_for_each(|path| Ok(lost_found::link(&self.dir, &path)?))
    }

    /// Empties the directory of the chain, but for the snapshot `keep`; whether there was anything. What
    /// an error leaves there is still listed.
    fn clear(&self, keep: &Path) -> Result<bool> {
        let mut had_others = false;
        let old: Vec<LtxFile> = self.inner.lock().unwrap().files.values().copied().collect();
        for file in old {
            let path = self.dir.ltx_file(file.min, file.max);
            if path != keep {
                os::remove_if_present("chain:clear", &path)
                    .and_then(|()| positions::remove(&self.dir, file.min, file.max))
                    .map_err(Error::io("remove ltx file", &path))?;
                had_others = true;
            }
            self.inner.lock().unwrap().files.remove(&file.min);
        }
        Ok(had_others)
    }
}

/// Whether a written file is made durable at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Synced, with its directory.
    Synced,
    /// As durable as the application asked for: not at all.
    Unsynced,
}

/// What happens to the files that a snapshot replaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replaced {
    /// They hold nothing that the snapshot does not: removed.
    Remove,
    /// They may hold transactions that nobody else has: kept in `lost+found/`.
    Keep,
}

/// Whether [`Chain::when_durable`] called back already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// It did.
    Done,
    /// It will, from the writer thread.
    Waits,
}

impl Unsynced {
    fn new(transaction: &Transaction) -> Unsynced {
        Unsynced { transaction: Arc::new(transaction.without_bytes()), suspect: false }
    }

    fn path(&self, dir: &DbDir) -> PathBuf {
        dir.ltx_file(self.transaction.min, self.transaction.max)
    }
}

impl Inner {
    /// Whether `txid` waits to be written.
    fn is_queued(&self, txid: Txid) -> bool {
        let (first, last) = (self.queue.front(), self.queue.back());
        first.is_some_and(|first| first.min <= txid) && last.is_some_and(|last| txid <= last.max)
    }

    fn add_file(&mut self, file: LtxFile) {
        self.written = self.written.max(file.max);
        self.files.insert(file.min, file);
    }

    /// Notes which files are of a time to come, written while the clock was ahead.
    fn note_ahead(&mut self, now: SystemTime) {
        let Inner { files, ahead, .. } = self;
        ahead.retain(|min, _| files.get(min).is_some_and(|file| file.mtime > now));
        for file in files.values().filter(|file| file.mtime > now) {
            ahead.entry(file.min).or_insert_with(Instant::now);
        }
    }

    /// Whether a file is older than `retention`. One of a time to come counts from the moment in which that was seen:
    /// else it would stay until then, and with it all that follow.
    fn is_older(&self, file: &LtxFile, now: SystemTime, retention: Duration) -> bool {
        match now.duration_since(file.mtime) {
            Ok(age) => age > retention,
            Err(_) => self.ahead.get(&file.min).is_some_and(|seen| seen.elapsed() > retention),
        }
    }

    fn drop_queued(&mut self, count: usize) {
        for transaction in self.queue.drain(..count) {
            self.queue_bytes -= transaction.size_hint();
        }
    }
}

fn list(dir: &DbDir) -> Result<BTreeMap<Txid, LtxFile>> {
    let path = dir.ltx();
    let mut files = Vec::new();
    for entry in fs::read_dir(&path).map_err(Error::io("list ltx dir", &path))? {
        let entry = entry.map_err(Error::io("list ltx dir", &path))?;
        let Some((min, max)) = entry.file_name().to_str().and_then(ltx::parse_file_name) else {
            continue;
        };
        let meta = entry.metadata().map_err(Error::io("stat ltx file", &entry.path()))?;
        let mtime = meta.modified().map_err(Error::io("stat ltx file", &entry.path()))?;
        files.push(LtxFile { min, max, size: meta.len(), mtime });
    }
    // What a crash kept from being removed when a snapshot took its place.
    let snapshots = files.iter().filter(|file| file.min == Txid(1));
    let begin = snapshots.map(|file| file.max).max().unwrap_or_default();
    files.retain(|file| file.max > begin || (file.max == begin && file.min == Txid(1)));
    Ok(files.into_iter().map(|file| (file.min, file)).collect())
}
