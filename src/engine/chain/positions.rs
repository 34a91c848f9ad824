//! The positions inside an LTX file of several transactions, which its pages do not tell: a peer that
//! stands at one of them can go on with the file, while one that stands at a transaction of the same
//! number, but of another history, would lose what only it has.
//!
//! ```text
//! ltx/MIN-MAX.positions   8 bytes each, big-endian: the database checksum before MIN, then after each
//!                         transaction from MIN to MAX (0 where it is not known), then the page
//!                         checksum (as of page 1) of the bytes before
//! ```
//!
//! It is written before its LTX file and never synced. Missing, torn, or of other transactions (its first
//! and last checksum are not those of the LTX file), it proves nothing, and the peer gets a snapshot.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ltx::{Checksum, Pgno, Pos, Txid};

use super::LtxFile;
use crate::engine::layout::DbDir;
use crate::engine::transaction::Transaction;
use crate::{limits, os};

const EXTENSION: &str = "positions";
/// Bytes of a checksum.
pub(in crate::engine) const SUM_SIZE: usize = 8;

/// Writes what lies inside the file of `batch`, transactions that follow on one another.
pub(super) fn write(dir: &DbDir, batch: &[Arc<Transaction>]) -> io::Result<()> {
    let (first, last) = (&batch[0], &batch[batch.len() - 1]);
    let Some(len) = len(first.min, last.max) else { return Ok(()) };
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(&first.pre.get().to_be_bytes());
    for transaction in batch {
        let unknown = (transaction.max.0 - transaction.min.0) as usize;
        bytes.resize(bytes.len() + unknown * SUM_SIZE, 0);
        bytes.extend_from_slice(&transaction.post.get().to_be_bytes());
    }
    let sum = ltx::page_checksum(Pgno(1), &bytes);
    bytes.extend_from_slice(&sum.get().to_be_bytes());
    let path = path(dir, first.min, last.max);
    os::remove_if_present("chain:positions", &path)?;
    let file = os::create_new("chain:positions", &path)?;
    os::write_at("chain:positions", &file, &bytes, 0)
}

/// The position with the number `txid`, if it is known to lie inside `file`, which leads from one checksum to
/// another.
pub(in crate::engine) fn find(
    dir: &DbDir,
    file: &LtxFile,
    [pre, post]: [Checksum; 2],
    txid: Txid,
) -> io::Result<Option<Pos>> {
    let Some(len) = len(file.min, file.max) else { return Ok(None) };
    if txid < file.min || file.max <= txid {
        return Ok(None);
    }
    let opened = match File::open(path(dir, file.min, file.max)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut bytes = vec![0; len];
    if os::read_up_to("read:positions", &opened, &mut bytes, 0)? != len {
        return Ok(None);
    }
    let sums: Vec<u64> = bytes
        .chunks_exact(SUM_SIZE)
        .map(|sum| u64::from_be_bytes(sum.try_into().expect("eight bytes")))
        .collect();
    let whole = ltx::page_checksum(Pgno(1), &bytes[..len - SUM_SIZE]);
    let is_of_file = sums[sums.len() - 1] == whole.get()
        && sums[0] == pre.get()
        && sums[sums.len() - 2] == post.get();
    let inside = sums[(txid.0 - file.min.0) as usize + 1];
    let checksum = Checksum::from_raw(inside).filter(|sum| is_of_file && !sum.is_none());
    Ok(checksum.map(|checksum| Pos { txid, checksum }))
}

/// Removes what belongs to the LTX file from `min` to `max`, which is gone.
pub(super) fn remove(dir: &DbDir, min: Txid, max: Txid) -> io::Result<()> {
    if min == max {
        return Ok(());
    }
    os::remove_if_present("chain:positions", &path(dir, min, max))
}

/// Removes what belongs to no LTX file any more, after a crash.
pub(super) fn remove_orphans(dir: &DbDir) -> io::Result<()> {
    for entry in fs::read_dir(dir.ltx())? {
        let path = entry?.path();
        let is_ours = path.extension().is_some_and(|extension| extension == EXTENSION);
        if is_ours && !path.with_extension("ltx").try_exists()? {
            os::remove_if_present("chain:positions", &path)?;
        }
    }
    Ok(())
}

fn path(dir: &DbDir, min: Txid, max: Txid) -> PathBuf {
    Path::new(&dir.ltx_file(min, max)).with_extension(EXTENSION)
}

/// Bytes for the transactions from `min` to `max`; none if these are more than one file gets.
fn len(min: Txid, max: Txid) -> Option<usize> {
    let count = usize::try_from(max.0.checked_sub(min.0)?).ok()?.checked_add(1)?;
    (1 < count && count <= limits::LTX_BATCH_LEN).then_some((count + 2) * SUM_SIZE)
}
