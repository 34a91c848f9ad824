//! Keeping an application that outlived the last process from writing to the WAL unseen.
//!
//! With passthrough a file of the mount stays writable when the process that served it is gone: a
//! transaction that had begun could append its frames to the WAL after it was read here, and SQLite,
//! which ignores the error of its unlock, would report success. So the content moves to a new file,
//! and the old inode, which has no name any more, is made immutable; what was written until then is
//! taken over. Later writes fail, and with them the transaction.
//!
//! ext4 and f2fs look at that flag at each write. Others look only when a file is opened; there it has
//! no effect, and what is left is the moment between the last look and the end of the transaction.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{Error, io_error, open_if_present};
use crate::engine::error::chain_text;
use crate::engine::layout::DbDir;
use crate::os;

/// How much is compared at once, in bytes.
const PIECE: usize = 1 << 20;

/// Puts the WAL out of reach of who still has it open. Where that fails it stays as it is, as long as
/// nothing is lost by that.
pub(super) fn fence_wal(dir: &DbDir) -> Result<(), Error> {
    let path = dir.wal();
    let Some(old) = open_if_present(&path).map_err(io_error("open wal", &path))? else {
        return Ok(());
    };
    let temporary = path.with_extension("tmp");
    let moved = os::copy("fence:copy", &path, &temporary)
        .and_then(|()| same_time(&old, &temporary))
        .and_then(|()| os::rename("fence:rename", &temporary, &path));
    if let Err(error) = moved {
        // No room, most likely.
        let _ = os::remove_if_present("fence:copy", &temporary);
        tracing::warn!(path = %path.display(), error = chain_text(&error), "the wal stays open for applications that outlived the last process");
        return Ok(());
    }
    if let Err(error) = os::make_immutable("fence:flag", &old) {
        tracing::debug!(path = %path.display(), %error, "the file system has no immutable files");
    }
    let new = os::open("fence:open", &path).map_err(io_error("open wal", &path))?;
    take_over(&old, &new)
        .and_then(|()| same_time(&old, &path))
        .and_then(|()| os::sync("fence:sync", &new))
        .and_then(|()| os::sync_dir("fence:sync", dir.path()))
        .map_err(io_error("copy wal", &path))
}

/// The time of the last change counts when WAL and database file are compared.
fn same_time(old: &File, new: &std::path::Path) -> io::Result<()> {
    os::set_modified("fence:time", new, old.metadata()?.modified()?)
}

/// Copies what was written to `old` since it was copied to `new`.
fn take_over(old: &File, new: &File) -> io::Result<()> {
    let len = old.metadata()?.len();
    if new.metadata()?.len() != len {
        os::truncate("fence:write", new, len)?;
    }
    let (mut theirs, mut ours) = (vec![0; PIECE], vec![0; PIECE]);
    for offset in (0..len).step_by(PIECE) {
        let piece = (len - offset).min(PIECE as u64) as usize;
        old.read_exact_at(&mut theirs[..piece], offset)?;
        new.read_exact_at(&mut ours[..piece], offset)?;
        if theirs[..piece] != ours[..piece] {
            os::write_at("fence:write", new, &theirs[..piece], offset)?;
        }
    }
    Ok(())
}
