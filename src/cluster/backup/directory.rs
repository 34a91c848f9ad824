//! A backup in a directory of LTX files, in LiteFS's layout. Everything here blocks.
//!
//! ```text
//! PATH/NAME/MIN-MAX.ltx   each goes on from the one before; the last one by name is where it stands
//! PATH/NAME/upload-*.tmp  one that is being written
//! ```
//!
//! Invariants: a file is there under its name only when it was verified and is durable; none is ever
//! changed or removed. No two uploads write one file, and those of this process come one after the other:
//! the thread of one cannot be stopped, and goes on when nobody waits for it any more. After a change of
//! the page size the next file holds all pages.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use ltx::{Checksum, Compression, Decoder, Encoder, Header, Pgno, Pos, Trailer, Txid};

use super::{Error, Written};
use crate::engine::DbName;
use crate::engine::backup::Upload;
use crate::{limits, os};

/// The directory.
pub struct Directory {
    path: PathBuf,
    /// Held for a whole upload, so that the next one sees what came of it.
    turn: Mutex<()>,
}

/// A file of one database.
struct LtxFile {
    path: PathBuf,
    min: Txid,
    max: Txid,
}

impl LtxFile {
    fn open(&self) -> Result<File, Error> {
        File::open(&self.path).map_err(Error::io("open", &self.path))
    }

    /// What stands at its beginning and its end.
    fn ends(&self) -> Result<(Header, Pos), Error> {
        let ltx = |source| Error::Ltx { path: self.path.clone(), source };
        let file = self.open()?;
        let mut head = [0; ltx::HEADER_SIZE];
        let mut tail = [0; ltx::TRAILER_SIZE];
        let len = file.metadata().map_err(Error::io("stat", &self.path))?.len();
        if len < (ltx::HEADER_SIZE + ltx::TRAILER_SIZE) as u64 {
            return Err(ltx(ltx::Error::Short));
        }
        let tail_at = len - ltx::TRAILER_SIZE as u64;
        os::read_exact_at("read:backup", &file, &mut head, 0)
            .and_then(|()| os::read_exact_at("read:backup", &file, &mut tail, tail_at))
            .map_err(Error::io("read", &self.path))?;
        let header = Header::decode(&head).map_err(ltx)?;
        let trailer = Trailer::decode(&tail, header.commit).map_err(ltx)?;
        Ok((header, Pos { txid: header.max_txid, checksum: trailer.post_apply }))
    }
}

impl Directory {
    /// The directory at `path`.
    pub fn new(path: PathBuf) -> Directory {
        Directory { path, turn: Mutex::new(()) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the backup of each database stands; or why that cannot be read.
    ///
    /// # Errors
    /// The directory is not there, or cannot be listed.
    pub fn positions(&self) -> Result<BTreeMap<String, Result<Pos, Error>>, Error> {
        self.must_be_there()?;
        let mut positions = BTreeMap::new();
        for entry in entries(&self.path)? {
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(|name| DbName::new(name).ok()) else {
                continue;
            };
            if let Some(pos) = self.pos(&name).transpose() {
                positions.insert(name.to_string(), pos);
            }
        }
        Ok(positions)
    }

    /// A directory that is missing is no empty backup: perhaps its disk is not mounted. So it is made by people.
    fn must_be_there(&self) -> Result<(), Error> {
        match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::Missing { path: self.path.clone() })
            }
            other => other.map(drop).map_err(Error::io("stat", &self.path)),
        }
    }

    /// Where the backup of one database stands, if there is one.
    fn pos(&self, name: &DbName) -> Result<Option<Pos>, Error> {
        let files = self.files(name)?;
        files.last().map(|last| Ok(last.ends()?.1)).transpose()
    }

    /// Adds a file, if it goes on from the last one, and as long as `may_send`.
    ///
    /// # Errors
    /// The directory is not there; the last file cannot be read, or this one not be written, or it is not whole.
    pub fn write(
        &self,
        name: &DbName,
        upload: &Upload,
        may_send: &dyn Fn() -> bool,
    ) -> Result<Written, Error> {
        let _turn = self.turn.lock().unwrap();
        self.must_be_there()?;
        if let Some(refused) = self.refusal(name, upload, may_send)? {
            return Ok(refused);
        }
        let dir = self.path.join(name.as_str());
        os::create_dirs("backup:dir", &dir)
            .and_then(|()| os::sync_dir("backup:dir", &self.path))
            .map_err(Error::io("create", &dir))?;
        remove_unfinished(&dir)?;
        // Another node may be writing here, or think that it may.
        let temporary = dir.join(format!("upload-{:016x}.tmp", RandomState::new().hash_one(0)));
        let target = dir.join(ltx::file_name(upload.header.min_txid, upload.header.max_txid));
        let copy = || -> io::Result<File> {
            let file = os::create_new("backup:file", &temporary)?;
            let mut from = os::FileCursor::new("read:backup", &upload.file);
            io::copy(&mut from, &mut os::Labelled::new("backup:file", &file))?;
            os::sync("backup:file", &file)?;
            Ok(file)
        };
        let file = copy().map_err(Error::io("write", &temporary))?;
        verify(&temporary, &file, upload.pos)?;
        // All that may have taken long.
        if let Some(refused) = self.refusal(name, upload, may_send)? {
            os::remove_if_present("backup:file", &temporary)
                .map_err(Error::io("remove", &temporary))?;
            return Ok(refused);
        }
        os::rename("backup:file", &temporary, &target)
            .and_then(|()| os::sync_dir("backup:file", &dir))
            .map_err(Error::io("write", &target))?;
        Ok(Written::Taken { hwm: upload.header.max_txid })
    }

    /// Why a file is not to be added now, if it is not.
    fn refusal(
        &self,
        name: &DbName,
        upload: &Upload,
        may_send: &dyn Fn() -> bool,
    ) -> Result<Option<Written>, Error> {
        if !may_send() {
            return Ok(Some(Written::NotNow));
        }
        let at = self.pos(name)?.unwrap_or_default();
        Ok((upload.header.pre_pos() != at).then_some(Written::Mismatch(at)))
    }

    /// Writes all files of a database as one snapshot.
    pub fn snapshot(&self, name: &DbName, out: &mut dyn Write) -> Result<(), Error> {
        let dir = self.path.join(name.as_str());
        let files = self.files(name)?;
        let mut merged: Option<File> = None;
        for chunk in of_one_page_size(files)?.chunks(limits::BACKUP_FILES - 1) {
            let mut inputs: Vec<File> = merged.take().into_iter().collect();
            for file in chunk {
                inputs.push(file.open()?);
            }
            merged = Some(merge(&self.path, &inputs).map_err(|error| match error {
                Failed::Ltx(source) => Error::Ltx { path: dir.clone(), source },
                Failed::Io(source) => {
                    Error::Io { what: "merge files of", path: dir.clone(), source }
                }
            })?);
        }
        let Some(merged) = merged else {
            let source = io::ErrorKind::NotFound.into();
            return Err(Error::Io { what: "find ltx files in", path: dir, source });
        };
        as_snapshot(&merged, out).map_err(|source| Error::Ltx { path: dir, source })
    }

    /// The files of a database, in their order.
    fn files(&self, name: &DbName) -> Result<Vec<LtxFile>, Error> {
        let mut files = Vec::new();
        for entry in entries(&self.path.join(name.as_str()))? {
            if let Some((min, max)) = entry.file_name().to_str().and_then(ltx::parse_file_name) {
                files.push(LtxFile { path: entry.path(), min, max });
            }
        }
        files.sort_by_key(|file| (file.min, file.max));
        Ok(files)
    }
}

/// What a directory holds; nothing if there is none.
fn entries(dir: &Path) -> Result<Vec<fs::DirEntry>, Error> {
    let listed = fs::read_dir(dir).and_then(|entries| entries.collect());
    match listed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        // A file beside the databases.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(Vec::new()),
        listed => listed.map_err(Error::io("list", dir)),
    }
}

/// Removes what uploads have left that came to no end.
fn remove_unfinished(dir: &Path) -> Result<(), Error> {
    for entry in entries(dir)? {
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with("upload") && name.ends_with(".tmp")) {
            let path = entry.path();
            os::remove_if_present("backup:file", &path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// What was written is what was to be written.
fn verify(path: &Path, file: &File, pos: Pos) -> Result<(), Error> {
    let ltx = |source| Error::Ltx { path: path.to_owned(), source };
    let (header, trailer) = ltx::verify(reader(file)).map_err(ltx)?;
    let found = Pos { txid: header.max_txid, checksum: trailer.post_apply };
    match found == pos {
        true => Ok(()),
        false => {
            let source = io::Error::other(format!("it leads to {found} and not to {pos}"));
            Err(Error::Io { what: "verify", path: path.to_owned(), source })
        }
    }
}

fn reader(file: &File) -> BufReader<os::FileCursor<&File>> {
    BufReader::with_capacity(limits::MERGE_BUFFER, os::FileCursor::new("read:backup", file))
}

/// The files from the last change of the page size on.
fn of_one_page_size(files: Vec<LtxFile>) -> Result<Vec<LtxFile>, Error> {
    let mut tail = Vec::new();
    let mut page_size = None;
    for file in files.into_iter().rev() {
        let (header, _) = file.ends()?;
        if page_size.is_some_and(|size| size != header.page_size) {
            break;
        }
        page_size = Some(header.page_size);
        tail.push(file);
    }
    tail.reverse();
    Ok(tail)
}

enum Failed {
    Ltx(ltx::Error),
    Io(io::Error),
}

/// Several files as one, without a name.
fn merge(dir: &Path, inputs: &[File]) -> Result<File, Failed> {
    let out = os::unnamed_file("backup:merge", dir).map_err(Failed::Io)?;
    let writer =
        BufWriter::with_capacity(limits::IO_BUFFER, os::Labelled::new("backup:merge", &out));
    let inputs: Vec<_> = inputs.iter().map(reader).collect();
    ltx::compact(inputs, writer, Compression::None).map_err(Failed::Ltx)?;
    Ok(out)
}

/// The file as a snapshot: a whole database may also have been sent as a later transaction.
fn as_snapshot(file: &File, out: &mut dyn Write) -> Result<(), ltx::Error> {
    let mut decoder = Decoder::new(reader(file))?;
    let header = Header {
        min_txid: Txid(1),
        pre_apply: Checksum::NONE,
        compression: Compression::Lz4,
        ..*decoder.header()
    };
    let mut encoder = Encoder::new(out, header)?;
    let mut page = vec![0; header.page_size.bytes()];
    while let Some(pgno) = decoder.next_page(&mut page)? {
        encoder.page(Pgno(pgno.0), &page)?;
    }
    let post = decoder.finish()?.post_apply;
    encoder.finish(post).map(drop)
}
