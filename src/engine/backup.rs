//! What the backup of a database needs next, and a database that is restored from it.
//!
//! A backup is only ever continued: a file is sent if it begins exactly where the backup stands, and
//! what is here is replaced only if the backup has all of it. Anything else is two histories, of which
//! none is overwritten (`docs/decisions/0017-a-backup-is-only-continued.md`).
//!
//! ```text
//! dbs/NAME/backup   TXID/CHECKSUM HWM PAGESIZE, and a newline: what the backup confirmed last
//! ```
//!
//! Invariant: what is handed out to be sent is durable here.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use ltx::{Checksum, Header, PageSize, Pos, Txid};

use super::apply::Receiver;
use super::chain::Successor;
use super::db::{Db, DbState};
use super::error::{Error, Result, chain_text};
use super::follow_on::verified;
use super::layout::DbDir;
use crate::{limits, os};

/// What the backup of one database needs.
pub enum Need {
    /// Nothing: it has everything.
    Nothing,
    /// This file.
    Upload(Upload),
    /// To be taken over, as long as the database stands at this position: it has all of that, and more.
    Restore(Pos),
    /// A decision: it and the database are two histories, and why that is so.
    Diverged(String),
}

/// An LTX file that continues a backup.
pub struct Upload {
    /// The file, without a name.
    pub file: File,
    /// Its length in bytes.
    pub len: u64,
    /// Its header.
    pub header: Header,
    /// Where it leads to.
    pub pos: Pos,
    /// It has another page size than the backup.
    pub resized: bool,
}

/// What a node knows of the backups of all its databases, for the metrics.
#[derive(Debug, Default)]
pub struct Report {
    /// Attempts that failed.
    pub errors: AtomicU64,
    /// When everything was in the backup, in milliseconds since the Unix epoch; 0 for never.
    pub complete_ms: AtomicI64,
}

/// What is known of the backup of one database.
#[derive(Debug, Default)]
pub struct Backed {
    /// Everything before it is durable there.
    hwm: AtomicU64,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// What the backup confirmed to this node.
    confirmed: Option<Confirmed>,
    /// Where this history was at the high-water mark that the primary told last, if that is known.
    told: Option<Pos>,
    /// The mark that it told of the snapshot that waits to be applied, or after that.
    awaited: Option<Txid>,
    /// Why it stands still.
    problem: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Confirmed {
    pos: Pos,
    /// None if it is not known, or the database has no pages.
    page_size: Option<PageSize>,
}

impl Backed {
    /// As a former process left it; a file that cannot be read is as good as none.
    pub(super) fn load(dir: &DbDir) -> Backed {
        let text = os::read_to_string("read:backup-state", &dir.backup()).unwrap_or_default();
        let (hwm, confirmed) = parse(&text).unwrap_or_default();
        let known = Known { confirmed, ..Known::default() };
        Backed { hwm: AtomicU64::new(hwm.0), known: Mutex::new(known) }
    }

    fn confirmed(&self) -> Option<Confirmed> {
        self.known.lock().unwrap().confirmed
    }
}

/// What a file says: the HWM, and what was confirmed.
fn parse(text: &str) -> Option<(Txid, Option<Confirmed>)> {
    let mut words = text.split_whitespace();
    let pos = words.next()?.parse().ok()?;
    let hwm = Txid(words.next()?.parse().ok()?);
    let page_size = words.next()?.parse().ok().and_then(PageSize::new);
    Some((hwm, Some(Confirmed { pos, page_size })))
}

/// What the chain has after a position.
enum Increment {
    File(Upload),
    /// Another history.
    Other,
    /// It does not reach back that far.
    Gone,
}

impl Db {
    /// The backup's high-water mark: everything before it is durable there. Zero without a backup.
    pub fn hwm(&self) -> Txid {
        Txid(self.backed.hwm.load(Ordering::SeqCst))
    }

    /// The primary says what the high-water mark is. Blocking.
    ///
    /// A mark is a number, and may run ahead of what is here. So it says where the backup stands only if the
    /// chain has that position now, and not if a snapshot that came before it is still to take its place.
    pub fn set_hwm(&self, txid: Txid) {
        let awaits = self.awaits_snapshot();
        self.backed.known.lock().unwrap().awaited = awaits.then_some(txid);
        if self.backed.hwm.swap(txid.0, Ordering::SeqCst) != txid.0 {
            let told = if awaits { None } else { self.pos_at(txid) };
            self.backed.known.lock().unwrap().told = told;
        }
    }

    /// The backup has confirmed that it stands at `pos`, and everything before `hwm` is durable there.
    /// Blocking.
    pub fn set_backed(&self, pos: Pos, hwm: Txid, page_size: Option<PageSize>) -> Result<()> {
        let is_primary = self.shared.is_writable();
        // An answer that comes late may be about a history that was replaced; nothing is replaced meanwhile.
        let _replica = (!is_primary).then(|| self.change.lock().unwrap());
        if !is_primary && self.pos_at(pos.txid) != Some(pos) {
            return Ok(());
        }
        let confirmed = Confirmed { pos, page_size };
        let is_known = self.backed.confirmed() == Some(confirmed);
        if is_known && self.hwm() == hwm {
            return Ok(());
        }
        let path = self.dir.backup();
        let bytes = page_size.map_or(0, PageSize::get);
        os::write_atomic("backup:state", &path, format!("{pos} {} {bytes}\n", hwm.0).as_bytes())
            .map_err(Error::io("write state of backup", &path))?;
        self.backed.known.lock().unwrap().confirmed = Some(confirmed);
        self.backed.hwm.store(hwm.0, Ordering::SeqCst);
        // The streams tell the replicas.
        self.shared.feed.mark(&self.name);
        Ok(())
    }

    /// Another history may be about to take the place of the one of which the backup has a part: what is
    /// known of the backup says nothing about that. Durable; blocking.
    pub(super) fn forget_backed(&self) -> Result<()> {
        if self.backed.confirmed().is_some() {
            let path = self.dir.backup();
            os::remove_if_present("backup:state", &path)
                .and_then(|()| os::sync_dir("backup:state", self.dir.path()))
                .map_err(Error::io("remove state of backup", &path))?;
        }
        let mut known = self.backed.known.lock().unwrap();
        (known.confirmed, known.told) = (None, None);
        let mark = known.awaited.take().unwrap_or_default();
        self.backed.hwm.store(mark.0, Ordering::SeqCst);
        Ok(())
    }

    /// Why the backup stands still, if it does.
    pub fn backup_problem(&self) -> Option<String> {
        self.backed.known.lock().unwrap().problem.clone()
    }

    /// Says why the backup stands still, or that it does not; whether it did not before, or did.
    pub fn set_backup_problem(&self, problem: Option<String>) -> bool {
        let old = &mut self.backed.known.lock().unwrap().problem;
        let is_new = old.is_some() != problem.is_some();
        *old = problem;
        is_new
    }

    /// What the backup needs that stands at `remote`. Blocking.
    ///
    /// # Errors
    /// The database has failed, or its files cannot be read or made durable.
    pub fn backup_need(&self, remote: Pos) -> Result<Need> {
        if let DbState::Failed(reason) = self.state() {
            return Err(Error::Failed { db: self.name.clone(), reason });
        }
        let local = self.view();
        if local.pos == remote {
            if !remote.is_zero() {
                self.set_backed(remote, self.hwm().max(remote.txid), local.page_size)?;
            }
            return Ok(Need::Nothing);
        }
        let local = local.pos;
        if local.is_zero() {
            return Ok(Need::Restore(local));
        }
        if remote.is_zero() {
            return self.whole_after(remote).map(Need::Upload);
        }
        if remote.txid > local.txid {
            return Ok(match self.backed.confirmed().is_some_and(|known| known.pos == local) {
                true => Need::Restore(local),
                false => Need::Diverged(format!(
                    "the backup stands at {remote} and has transactions that are not here, where {local} is the last"
                )),
            });
        }
        let other = |why| {
            Need::Diverged(format!("the backup stands at {remote}, the database at {local}: {why}"))
        };
        match self.increment(remote)? {
            Increment::File(upload) => Ok(Need::Upload(upload)),
            Increment::Gone if self.has_backed(remote) => {
                self.whole_after(remote).map(Need::Upload)
            }
            Increment::Gone => Ok(other("nothing here says that the one goes on from the other")),
            Increment::Other => Ok(other("the one does not go on from the other")),
        }
    }

    /// The position with the number `txid` in this history, if the chain tells. Blocks while a transaction that
    /// is not small is written to its file.
    fn pos_at(&self, txid: Txid) -> Option<Pos> {
        let present = self.pos();
        if txid.is_zero() || txid >= present.txid {
            return Some(present).filter(|present| !txid.is_zero() && present.txid == txid);
        }
        match self.successor(Pos { txid, checksum: Checksum::NONE }) {
            Ok(Successor::Recent(next)) => Some(Pos { txid, checksum: next.pre }),
            Ok(Successor::File(file, info)) if info.min == txid.next() => {
                header_of(&file).map(|header| header.pre_pos())
            }
            // Nobody knows what is inside of a snapshot.
            Ok(Successor::File(file, info)) if info.min > Txid(1) => {
                let (header, trailer) = verified(&file).ok()?;
                self.chain.inside(txid, &info, [header.pre_apply, trailer.post_apply])
            }
            Ok(_) | Err(_) => None,
        }
    }

    /// Whether the backup was at `pos`, and this history too: by the chain; or, where that does not reach
    /// back, by what the backup confirmed to this node, or to the primary that it followed.
    fn has_backed(&self, pos: Pos) -> bool {
        if let Some(here) = self.pos_at(pos.txid) {
            return here == pos;
        }
        let known = self.backed.known.lock().unwrap();
        known.told == Some(pos) || known.confirmed.is_some_and(|known| known.pos == pos)
    }

    /// The LTX files after `remote`, as one.
    fn increment(&self, remote: Pos) -> Result<Increment> {
        self.chain.sync()?;
        let files = self.chain.files_after(remote.txid, limits::BACKUP_FILES, limits::BACKUP_BYTES);
        let mut opened = Vec::with_capacity(files.len());
        for file in &files {
            let path = self.dir.ltx_file(file.min, file.max);
            match File::open(&path) {
                Ok(file) => opened.push(file),
                // Something else took their place.
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(Error::io("open ltx file", &path)(error)),
            }
        }
        let Some(first) = opened.first() else { return Ok(Increment::Gone) };
        match header_of(first) {
            Some(header) if header.pre_pos() == remote => {}
            Some(_) => return Ok(Increment::Other),
            None => return Ok(Increment::Gone),
        }
        let spool = self.spool_file()?;
        let out =
            BufWriter::with_capacity(limits::IO_BUFFER, os::Labelled::new("backup:spool", &spool));
        let inputs = opened.iter();
        let inputs = inputs.map(|file| {
            BufReader::with_capacity(limits::MERGE_BUFFER, os::FileCursor::new("read:backup", file))
        });
        match ltx::compact(inputs.collect(), out, self.shared.compression) {
            Ok((header, trailer)) => {
                let pos = Pos { txid: header.max_txid, checksum: trailer.post_apply };
                Ok(Increment::File(self.upload(spool, header, pos)?))
            }
            Err(error @ ltx::Error::Write(_)) => Err(self.ltx_error("merge ltx files", error)),
            Err(error) => {
                tracing::error!(db = %self.name, after = %remote, error = chain_text(&error), "ltx files are damaged: the backup gets the whole database");
                Ok(Increment::Gone)
            }
        }
    }

    /// The whole database, as the one transaction that follows on `base`.
    fn whole_after(&self, base: Pos) -> Result<Upload> {
        let spool = self.spool_file()?;
        let mut out =
            BufWriter::with_capacity(limits::IO_BUFFER, os::Labelled::new("backup:spool", &spool));
        let pos = self.write_whole(base, &mut out)?;
        out.flush().map_err(Error::io("write spool file", self.dir.path()))?;
        drop(out);
        self.chain.sync()?;
        let Some(header) = header_of(&spool) else {
            return Err(self.corrupt("read back snapshot", "it has no header"));
        };
        self.upload(spool, header, pos)
    }

    fn upload(&self, file: File, header: Header, pos: Pos) -> Result<Upload> {
        let len = file.metadata().map_err(Error::io("stat spool file", self.dir.path()))?.len();
        let known = self.backed.confirmed().and_then(|known| known.page_size);
        let resized = !header.is_snapshot()
            && header.commit > 0
            && known.is_some_and(|known| known != header.page_size);
        Ok(Upload { file, len, header, pos, resized })
    }
}

impl Receiver {
    /// The file is complete, and is the snapshot of a backup that takes the place of the database, which
    /// must stand at `expected`; where the backup stands. Blocking.
    ///
    /// # Errors
    /// The file does not verify or is no snapshot; the database stands elsewhere by now, or is in use;
    /// this node is not the primary.
    pub fn finish_restore(self, expected: Pos) -> Result<Pos> {
        self.put_in_place(expected)
    }
}

/// The header of an LTX file; none if there is none.
fn header_of(file: &File) -> Option<Header> {
    let mut bytes = [0; ltx::HEADER_SIZE];
    os::read_exact_at("read:backup", file, &mut bytes, 0).ok()?;
    Header::decode(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let text = "000000000000003c/c000000000000001 55 4096\n";
        let pos = "000000000000003c/c000000000000001".parse().unwrap();
        let page_size = PageSize::new(4096);
        assert_eq!(parse(text), Some((Txid(55), Some(Confirmed { pos, page_size }))));
        let without = parse("000000000000003c/c000000000000001 55 0").unwrap();
        assert_eq!(without.1.unwrap().page_size, None);
        for damaged in ["", "x 1 2", "000000000000003c/c000000000000001 55"] {
            assert_eq!(parse(damaged), None, "{damaged:?}");
        }
    }
}
