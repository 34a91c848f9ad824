//! `lost+found/` of a database: files that nothing here goes on from, kept for who wants to look.
//!
//! Nothing is there twice: what an attempt that was cut short has left is found again by its content.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::layout::DbDir;
use crate::{limits, os};

/// A file could not be kept.
#[derive(Debug)]
pub struct Error {
    /// What was being done.
    pub(super) what: &'static str,
    /// To which file.
    pub(super) path: PathBuf,
    /// Why.
    pub(super) source: io::Error,
}

impl Error {
    /// For `map_err` on a file call.
    fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
        move |source| Error { what, path: path.to_owned(), source }
    }
}

/// Moves `path` there, durably, under its name or one like it that is not taken; where it is now.
pub fn take(dir: &DbDir, path: &Path) -> Result<PathBuf, Error> {
    take_as(dir, path, &name_of(path))
}

/// [`take`] under the name `name`.
pub fn take_as(dir: &DbDir, path: &Path, name: &str) -> Result<PathBuf, Error> {
    let target = match place(dir, path, name)? {
        Place::Free(target) => {
            os::rename("lost:rename", path, &target).map_err(Error::io("set aside", path))?;
            target
        }
        Place::Taken(target) => {
            // Who gave it that name may have ended before the name was durable.
            sync(dir)?;
            os::remove("lost:rename", path).map_err(Error::io("set aside", path))?;
            target
        }
    };
    sync(dir)?;
    let parent = path.parent().unwrap_or(dir.path());
    os::sync_dir("lost:dir", parent).map_err(Error::io("sync directory", parent))?;
    Ok(target)
}

/// Copies `path` there, durably, under a name that is not taken, unless it is there already.
pub fn copy(dir: &DbDir, path: &Path) -> Result<(), Error> {
    let Place::Free(target) = place(dir, path, &name_of(path))? else { return sync(dir) };
    if let Err(error) = os::copy("lost:copy", path, &target) {
        // Half of it would only take up room.
        let _ = os::remove_if_present("lost:copy", &target);
        return Err(Error::io("copy to lost+found", path)(error));
    }
    sync(dir)
}

/// As [`copy`], without taking more room where the file system has hard links. `path` is not written any
/// more.
pub fn link(dir: &DbDir, path: &Path) -> Result<(), Error> {
    let Place::Free(target) = place(dir, path, &name_of(path))? else { return sync(dir) };
    match os::link("lost:link", path, &target) {
        Ok(()) => sync(dir),
        Err(_) => copy(dir, path),
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A place for a file.
enum Place {
    /// Nothing has this name.
    Free(PathBuf),
    /// It is there already, from an attempt that was not finished.
    Taken(PathBuf),
}

/// Where `file` can stand under `name` or one like it. The directory is made if it is missing.
fn place(dir: &DbDir, file: &Path, name: &str) -> Result<Place, Error> {
    let lost = dir.lost_found();
    os::create_dirs("lost:dir", &lost)
        .and_then(|()| os::sync_dir("lost:dir", dir.path()))
        .map_err(Error::io("create lost+found", &lost))?;
    let mut target = lost.join(name);
    let mut n = 1;
    while target.exists() {
        // If that cannot be told, it is there twice.
        if is_same(file, &target).unwrap_or(false) {
            // Who wrote it may have ended before it was durable.
            File::open(&target)
                .and_then(|file| os::sync("lost:copy", &file))
                .map_err(Error::io("sync file in lost+found", &target))?;
            return Ok(Place::Taken(target));
        }
        target = lost.join(format!("{name}.{n}"));
        n += 1;
    }
    Ok(Place::Free(target))
}

fn sync(dir: &DbDir) -> Result<(), Error> {
    let lost = dir.lost_found();
    os::sync_dir("lost:dir", &lost).map_err(Error::io("sync lost+found", &lost))
}

/// Whether two files hold the same.
pub fn is_same(one: &Path, other: &Path) -> io::Result<bool> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    let (meta, other_meta) = (one.metadata()?, other.metadata()?);
    if meta.len() != other_meta.len() || meta.ino() == other_meta.ino() {
        return Ok(meta.ino() == other_meta.ino());
    }
    let mut buffers = [vec![0; limits::IO_BUFFER], vec![0; limits::IO_BUFFER]];
    let mut at = 0;
    while at < meta.len() {
        let [ours, theirs] = &mut buffers;
        let read = os::read_up_to("read:same", &one, ours, at)?;
        if read == 0
            || os::read_up_to("read:same", &other, theirs, at)? != read
            || ours[..read] != theirs[..read]
        {
            return Ok(false);
        }
        at += read as u64;
    }
    Ok(true)
}
