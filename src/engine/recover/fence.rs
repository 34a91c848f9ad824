//! Keeping an application that outlived the last process from writing to the WAL unseen.
//!
//! With passthrough a file of the mount stays writable when the process that served it is gone. A
//! transaction that had begun could append its frames to the WAL after it was read here, and SQLite,
//! which ignores the error of its unlock, would report success. So the WAL's content moves to a new
//! file, and the old inode, which then has no name any more, is made immutable; what was written to
//! it until then is taken over. Later writes fail, and with them the transaction. The old inode goes
//! by itself when the last who has it open closes it.
//!
//! The name is given up durably before the flag is set: no immutable file is ever left under a name.
//!
//! ext4 and f2fs heed the flag at each write. Others do so only when a file is opened, or have none;
//! there a late write is lost with the old inode, and the log says so.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Once;

use super::{Error, io_error};
use crate::engine::layout::DbDir;
use crate::os;

/// How much is compared at once, in bytes.
const PIECE: usize = 1 << 20;

/// Puts the WAL out of reach of who still has it open. Where that is impossible it stays as it is: start
/// goes on as long as nothing is lost by that.
pub(super) fn fence_wal(dir: &DbDir) -> Result<(), Error> {
    let path = dir.wal();
    let old = match os::open("fence:open", &path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        old => old.map_err(io_error("open wal", &path))?,
    };
    if let Err(error) = replace(dir, &path, &old).and_then(|()| make_immutable(&old)) {
        // No room, most likely.
        warn(&path, &error);
    }
    let new = os::open("fence:open", &path).map_err(io_error("open wal", &path))?;
    // The name may have changed hands although that did not become durable.
    match is_same(&old, &new).map_err(io_error("look at wal", &path))? {
        true => Ok(()),
        false => take_over(&old, &new, &path).map_err(io_error("copy wal", &path)),
    }
}

fn is_same(a: &File, b: &File) -> io::Result<bool> {
    let (a, b) = (a.metadata()?, b.metadata()?);
    Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
}

fn warn(path: &Path, error: &io::Error) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            path = %path.display(), %error,
            "late commits cannot be refused: applications that had a database open when the last \
             process ended must be started again"
        );
    });
}

/// Puts a copy of the WAL in its place.
fn replace(dir: &DbDir, path: &Path, old: &File) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let replaced = os::copy("fence:copy", path, &temporary)
        .and_then(|()| same_time(old, &temporary))
        .and_then(|()| os::rename("fence:rename", &temporary, path));
    if replaced.is_err() {
        let _ = os::remove_if_present("fence:remove", &temporary);
    }
    replaced.and_then(|()| os::sync_dir("fence:rename", dir.path()))
}

/// Has every write to the inode fail, also through descriptors that are open. An error if it does not.
fn make_immutable(old: &File) -> io::Result<()> {
    os::make_immutable("fence:flag", old)?;
    match old.write_at(&[], 0) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the file system lets immutable files be written that are open",
        )),
    }
}

/// Copies what was written to `old` since it was copied to `new`.
fn take_over(old: &File, new: &File, path: &Path) -> io::Result<()> {
    let len = old.metadata()?.len();
    let mut changed = new.metadata()?.len() != len;
    if changed {
        os::truncate("fence:write", new, len)?;
    }
    let (mut theirs, mut ours) = (vec![0; PIECE], vec![0; PIECE]);
    for offset in (0..len).step_by(PIECE) {
        let piece = (len - offset).min(PIECE as u64) as usize;
        os::read_exact_at("read:fence", old, &mut theirs[..piece], offset)?;
        os::read_exact_at("read:fence", new, &mut ours[..piece], offset)?;
        if theirs[..piece] != ours[..piece] {
            os::write_at("fence:write", new, &theirs[..piece], offset)?;
            changed = true;
        }
    }
    if !changed {
        return Ok(());
    }
    same_time(old, path)?;
    os::sync("fence:write", new)
}

/// The time of the last change counts when WAL and database file are compared.
fn same_time(old: &File, new: &Path) -> io::Result<()> {
    os::set_modified("fence:time", new, old.metadata()?.modified()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "tests make files in directories of their own")]

    use super::*;
    use crate::os::fault;

    /// The new file has the name, but its directory could not be synced, and meanwhile an application
    /// wrote to the old one.
    #[test]
    fn what_was_written_is_taken_over_although_the_name_is_not_durable() {
        let dir = tempfile::tempdir().unwrap();
        let db = DbDir::new(dir.path());
        std::fs::write(db.wal(), b"frames").unwrap();
        let late = std::fs::OpenOptions::new().write(true).open(db.wal()).unwrap();
        let write = move || {
            late.write_at(b" and more", 6).unwrap();
            // After the rename itself.
            let label = "fence:rename".to_owned();
            fault::arm_here(fault::Fault { label, after: 1, errno: nix::libc::EIO });
        };
        fault::meanwhile("fence:rename", write);
        fence_wal(&db).unwrap();
        assert!(!fault::disarm_here(), "the directory was synced");
        assert_eq!(std::fs::read(db.wal()).unwrap(), b"frames and more");
    }

    /// Frames that an application wrote between the copy and the flag.
    #[test]
    fn what_was_written_meanwhile_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        let copied = vec![1; 3 * PIECE];
        let mut changed = copied.clone();
        changed[2 * PIECE + 5] = 2;
        let longer = [&copied[..], &[3; 100]].concat();
        for content in [&copied, &changed, &longer, &vec![], &copied[..PIECE].to_vec()] {
            std::fs::write(&new, &copied).unwrap();
            std::fs::write(&old, content).unwrap();
            let file = os::open("test", &new).unwrap();
            take_over(&File::open(&old).unwrap(), &file, &new).unwrap();
            assert!(std::fs::read(&new).unwrap() == *content, "{} bytes", content.len());
        }
    }
}
