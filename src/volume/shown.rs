//! The attributes of the files of the mount.

use std::sync::Arc;
use std::time::SystemTime;

use fuse::{Attr, Errno, FileType};

use super::{ASK, KEEP, Node, os_errno, text};
use crate::engine::files::{FileKind, next_ino};
use crate::engine::{Engine, Role};

/// What attributes are made of.
#[derive(Clone)]
pub struct Shown {
    engine: Arc<Engine>,
    started: SystemTime,
    uid: u32,
    gid: u32,
    /// Inode numbers of `.primary` and `.lag`.
    pub inos: [u64; 2],
}

impl Shown {
    /// The files belong to who runs this process.
    pub fn new(engine: Arc<Engine>) -> Shown {
        Shown {
            engine,
            started: SystemTime::now(),
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            inos: [next_ino(), next_ino()],
        }
    }

    /// Of the root directory.
    pub fn root(&self) -> Attr {
        let primary = self.engine.role() == Role::Primary;
        Attr {
            ino: fuse::ROOT,
            size: 0,
            blocks: 0,
            mtime: self.started,
            file_type: FileType::Directory,
            perm: if primary { 0o777 } else { 0o555 },
            uid: self.uid,
            gid: self.gid,
            ttl: ASK,
        }
    }

    /// Of a node, now.
    pub fn attr(&self, node: &Node) -> Result<Attr, Errno> {
        let primary = self.engine.role() == Role::Primary;
        let base = Attr {
            ino: 0,
            size: 0,
            blocks: 0,
            mtime: self.started,
            file_type: FileType::Regular,
            perm: 0o666,
            uid: self.uid,
            gid: self.gid,
            ttl: ASK,
        };
        Ok(match node {
            Node::File(db, backing) => {
                let meta = backing.file.metadata().map_err(|error| os_errno(&error))?;
                let database = backing.kind == FileKind::Database;
                let writable = !database || primary || db.may_write();
                // The size of these is changed past us, or by us past the kernel.
                let shared = matches!(backing.kind, FileKind::Wal | FileKind::Shm);
                Attr {
                    ino: backing.ino,
                    size: meta.len(),
                    blocks: meta.len().div_ceil(512),
                    mtime: meta.modified().unwrap_or(self.started),
                    perm: if writable { 0o666 } else { 0o444 },
                    ttl: if shared { ASK } else { KEEP },
                    ..base
                }
            }
            Node::Pos(db) => Attr {
                ino: db.virtual_inos()[0],
                size: text::POS_LEN,
                mtime: text::time(db.view().timestamp_ms),
                ..base
            },
            Node::Lock(db) => Attr { ino: db.virtual_inos()[1], perm: 0o444, ..base },
            Node::Primary => Attr {
                ino: self.inos[0],
                size: text::primary(&self.engine).len() as u64,
                perm: 0o444,
                ..base
            },
            Node::Lag => Attr {
                ino: self.inos[1],
                size: text::LAG_LEN,
                mtime: text::lag_mtime(&self.engine),
                perm: 0o444,
                ..base
            },
            Node::Plain(file) => {
                let meta = file.file.metadata().map_err(|error| os_errno(&error))?;
                Attr { ino: file.ino, size: meta.len(), blocks: meta.len().div_ceil(512), ..base }
            }
        })
    }
}
