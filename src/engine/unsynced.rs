//! Database files of which a sync failed.
//!
//! The kernel takes for written what it could not write then: no later sync tries it again, and the next start
//! finds the pages in the page cache. So such a file bears a mark. As long as it does no LTX file is removed, which may
//! be all that explains the pages after a power loss; a start first writes the whole file again.
//!
//! The mark is the sticky bit, which Linux ignores on files (inode(7)): it needs no room on a full disk, and outlives
//! the process. If the machine loses its power it has done its work.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::{limits, os};

/// Makes `database` durable, or marks it.
pub fn sync(label: &str, database: &File) -> io::Result<()> {
    os::sync(label, database).inspect_err(|_| mark(database))
}

/// Marks `database`, whose sync failed.
pub fn mark(database: &File) {
    // What else there is to say is what the sync said.
    if let Err(error) = set(database, true) {
        let path = path_of(database);
        tracing::error!(path = %path.display(), %error, "mark a database file whose sync failed: a power loss may take what was written to it");
    }
}

/// Where an open file stands, for the log; empty if that cannot be told.
fn path_of(file: &File) -> PathBuf {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default()
}

/// Whether `database` is marked. An error: that cannot be told.
pub fn is_marked(database: &File) -> io::Result<bool> {
    Ok(database.metadata()?.permissions().mode() & os::STICKY != 0)
}

/// All of `database` has been written again, and is durable.
pub fn unmark(database: &File) -> io::Result<()> {
    if is_marked(database)? { set(database, false) } else { Ok(()) }
}

/// Writes the database file at `path` again if it is marked, all of it, durably; it may not be there.
pub fn mend(path: &Path) -> io::Result<()> {
    let marked = match File::open(path) {
        Ok(database) => is_marked(&database)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    if !marked {
        return Ok(());
    }
    let database = os::open_or_create("unsynced:open", path)?;
    let mut buffer = vec![0; limits::IO_BUFFER];
    let mut offset = 0;
    loop {
        let read = os::read_up_to("read:unsynced", &database, &mut buffer, offset)?;
        if read == 0 {
            break;
        }
        os::write_at("unsynced:write", &database, &buffer[..read], offset)?;
        offset += read as u64;
    }
    os::sync("unsynced:sync", &database)?;
    unmark(&database)?;
    tracing::info!(path = %path.display(), "database file was written again, because a sync of it had failed");
    Ok(())
}

fn set(database: &File, marked: bool) -> io::Result<()> {
    os::set_sticky("unsynced:mark", database, marked)
}
