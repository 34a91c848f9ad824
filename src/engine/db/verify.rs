//! Comparing the whole database with its checksums; and closing it.

use ltx::Pgno;

use super::Db;
use crate::engine::capture::Change;
use crate::engine::capture::resync::read_page;
use crate::engine::checksum::{self, Saved};
use crate::engine::error::{Error, Result};
use crate::engine::files::FileKind;
use crate::os;

impl Db {
    /// With `strict-verify`: the whole database must have the checksum of the position.
    pub(in crate::engine) fn verify_if_strict(&self, change: &mut Change) -> Result<()> {
        if self.shared.strict_verify { self.verify_all(change) } else { Ok(()) }
    }

    /// Compares every page with its checksum.
    pub(in crate::engine) fn verify_all(&self, change: &Change) -> Result<()> {
        let Some(database) = self.files.get(FileKind::Database) else { return Ok(()) };
        let Some(page_size) = change.page_size else { return Ok(()) };
        let wal = self.files.get(FileKind::Wal);
        let map = match &wal {
            Some(wal) if change.wal.frame() > 0 => {
                self.wal_map(&wal.file, Some(change.wal.frame()))?
            }
            _ => None,
        };
        let mut image = vec![0; page_size.bytes()];
        let lock = page_size.lock_pgno();
        for pgno in (1..=change.pages()).map(Pgno).filter(|pgno| *pgno != lock) {
            let read = match (&map, &wal) {
                (Some(map), Some(wal)) => {
                    read_page(map, &wal.file, &database.file, page_size, pgno, &mut image)
                }
                _ => os::read_up_to(&database.file, &mut image, page_size.offset(pgno)).map(
                    |filled| {
                        image[filled..].fill(0);
                    },
                ),
            };
            read.map_err(Error::io("read page", &self.files.path(FileKind::Database)))?;
            if ltx::page_checksum(pgno, &image) != change.sums.get(pgno) {
                let text = format!("page {pgno} is not what {} says", change.pos);
                return Err(self.corrupt("verify database", &text));
            }
        }
        Ok(())
    }

    /// The node stops: everything captured is durable in the chain, the WAL is in the database file,
    /// and the page checksums are saved, so that the next start has nothing to compute.
    pub(in crate::engine) fn close(&self) -> Result<()> {
        self.take_back(None, "the node stops");
        self.close_borrowing();
        self.stop_applier();
        if self.is_lost() {
            // What could not be brought to one state stays as it is for the next start.
            return Ok(());
        }
        let mut turn = self.turn();
        let mut change = self.change.lock().unwrap();
        self.settle_wal(&mut change)?;
        self.let_go(&mut turn, &mut change);
        self.checkpoint_fully(&mut change)?;
        change.wal.clear();
        self.files.remove(FileKind::Wal)?;
        self.files.remove(FileKind::Shm)?;
        self.save_checksums(&mut change)
    }

    /// Saves the page checksums. Nothing is committed any more.
    fn save_checksums(&self, change: &mut Change) -> Result<()> {
        let (Some(page_size), Some(database)) =
            (change.page_size, self.files.get(FileKind::Database))
        else {
            return Ok(());
        };
        let saved = Saved { page_size, pos: change.pos, sums: std::mem::take(&mut change.sums) };
        let path = self.dir.checksums();
        checksum::save(&path, &database.file, &saved).map_err(Error::io("save checksums", &path))
    }
}
