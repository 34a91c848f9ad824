//! `litefs export`: a database of the cluster into a file.
//!
//! The file is replaced only by a whole one: received into `PATH.tmp` beside it, its length
//! compared with its own header, synced, renamed. The journal, WAL and shared-memory files of the
//! old database go after that, since they would be applied to the new one; the directory is synced
//! once at the end, so that a crash leaves both or neither of these steps on most file systems.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;

use super::flags::{Flag, Flags, Kind, Spec};
use super::progress::Progress;
use super::{Failure, block_on, call, say, usage};
use crate::http::client::Client;
use crate::os;
use crate::sqlite::header::{DatabaseHeader, HEADER_SIZE};

pub const SPEC: Spec = Spec {
    name: "export",
    arguments: "PATH",
    about: "Copies a database of the cluster into a SQLite file.",
    flags: &[
        Flag { name: "name", kind: Kind::Value("DB"), about: "the database's name in the mount" },
        call::URL,
        call::CONFIG,
        call::NO_EXPAND_ENV,
    ],
};

/// What SQLite keeps beside a database.
const SIDE_FILES: [&str; 3] = ["-journal", "-wal", "-shm"];

pub fn run(flags: Flags) -> Result<u8, Failure> {
    let Transfer { name, path } = Transfer::of(&flags)?;
    let started = Instant::now();
    let client = call::client(&flags)?;
    let temporary = beside(&path, ".tmp");
    os::remove_if_present("export:temporary", &temporary)?;
    let result = receive(&client, &name, &temporary).and_then(|()| replace(&temporary, &path));
    if let Err(error) = result {
        // The error says what is wrong; a leftover is cleared by the next run.
        let _ = os::remove_if_present("export:temporary", &temporary);
        return Err(Failure::Run(error));
    }
    say(format_args!("Export of database {name:?} in {:.1?}", started.elapsed()));
    Ok(0)
}

/// What `export` and `import` share on the command line.
pub struct Transfer {
    pub name: String,
    pub path: PathBuf,
}

impl Transfer {
    pub fn of(flags: &Flags) -> Result<Transfer, Failure> {
        let [path] = flags.arguments.as_slice() else {
            return Err(match flags.arguments.len() {
                0 => Failure::Help,
                _ => usage(anyhow::anyhow!("too many arguments")),
            });
        };
        let name = flags.given("name").ok_or_else(|| usage(anyhow::anyhow!("-name required")))?;
        Ok(Transfer { name: name.to_owned(), path: path.into() })
    }
}

/// `path` with something added to its last part.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn receive(client: &Client, name: &str, temporary: &Path) -> anyhow::Result<()> {
    let file = os::create_new("export:temporary", temporary)
        .with_context(|| format!("create {}", temporary.display()))?;
    let mut out = Progress::new(file, None);
    let received = block_on(client.export(name, &mut out))?;
    let file = out.finish();
    let len = received?;
    check_length(&file, len)?;
    os::sync("export:temporary", &file).with_context(|| format!("sync {}", temporary.display()))
}

/// A whole database is as long as its own header says. One that was never written is empty.
fn check_length(file: &File, len: u64) -> anyhow::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let mut start = [0; HEADER_SIZE];
    let read = file.read_at(&mut start, 0)?;
    let header = DatabaseHeader::parse(&start[..read]).context("the answer is no database")?;
    let page_size = u64::from(header.page_size.get());
    let expected = header.page_count().map_or(len, |pages| u64::from(pages) * page_size);
    if len != expected || !len.is_multiple_of(page_size) {
        anyhow::bail!("the answer ends early: {len} bytes of {expected}");
    }
    Ok(())
}

fn replace(temporary: &Path, path: &Path) -> anyhow::Result<()> {
    os::rename("export:rename", temporary, path)
        .with_context(|| format!("replace {}", path.display()))?;
    for suffix in SIDE_FILES {
        let stale = beside(path, suffix);
        os::remove_if_present("export:stale", &stale).with_context(|| {
            format!("remove {}, which belongs to the old file", stale.display())
        })?;
    }
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    os::sync_dir("export:dir", dir).with_context(|| format!("sync {}", dir.display()))
}
