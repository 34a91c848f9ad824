//! The wal-index as its only writer keeps it: a copy in memory, written through to the file that
//! clients have mapped.
//!
//! The file is written with pwrite, never mapped. Clients look at it meanwhile, so words that they
//! read without a lock (hash slots, the number of backfilled frames) are written within aligned
//! units of 8 bytes, which a copy into the page cache does not tear.
//!
//! Invariant: what is not yet written through belongs to frames that no published header names.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use ltx::Pgno;

use super::ReaderCache;
use crate::os;
use crate::sqlite::wal_index::{
    self, ATTEMPTED_AT, CKPT_AT, CheckpointInfo, HEADER_COPY_SIZE, HEADER_SIZE, IndexHeader, Place,
    READ_MARKS_AT, REGION_SIZE, Region, SLOTS_AT,
};

/// How many hash slots of a region are written one by one; more, and the region is written as a
/// whole. A pwrite of 32 KiB costs what about 16 small ones cost.
const SLOTS_MAX: usize = 16;

/// The unit in which words are written, in bytes.
const UNIT: usize = 8;

/// Whether the file became longer, which clients must learn before they look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Growth {
    /// It has the length it had.
    Same,
    /// It is longer.
    Grown,
}

/// What of a region is not written through.
#[derive(Debug)]
enum Unwritten {
    /// It is in the file as it is here.
    Nothing,
    /// The entries from the first place to the last, and the slots at these bytes.
    Entries { first: Place, last: Place, slots: Vec<usize> },
    /// All of it.
    Whole,
}

#[derive(Debug)]
struct RegionCopy {
    bytes: Box<Region>,
    unwritten: Unwritten,
}

impl RegionCopy {
    fn new() -> RegionCopy {
        RegionCopy { bytes: Box::new([0; REGION_SIZE]), unwritten: Unwritten::Nothing }
    }
}

/// The wal-index of one database.
#[derive(Debug)]
pub(super) struct Mirror {
    shm: Arc<File>,
    regions: Vec<RegionCopy>,
    /// The length of the file in bytes.
    len: u64,
    /// The bytes that were written since readers were told.
    untold: Range<usize>,
}

impl Mirror {
    /// Without any entry.
    pub(super) fn new(shm: Arc<File>) -> io::Result<Mirror> {
        let len = shm.metadata()?.len();
        Ok(Mirror { shm, regions: Vec::new(), len, untold: 0..0 })
    }

    /// The header and the checkpoint information in the file; `None` if they do not count.
    pub(super) fn read_header(&self) -> io::Result<Option<(IndexHeader, CheckpointInfo)>> {
        let mut bytes = [0; HEADER_SIZE];
        if self.len < REGION_SIZE as u64 {
            return Ok(None);
        }
        os::read_exact_at("read:apply-index", &self.shm, &mut bytes, 0)?;
        Ok(IndexHeader::parse(&bytes).zip(CheckpointInfo::parse(&bytes)))
    }

    /// Reads the entries up to `mx_frame` from the file, which must be long enough.
    pub(super) fn load(&mut self, mx_frame: u32) -> io::Result<()> {
        self.regions.clear();
        let count = if mx_frame == 0 { 0 } else { wal_index::region_count(mx_frame) };
        for region in 0..count {
            let mut copy = RegionCopy::new();
            os::read_exact_at(
                "read:apply-index",
                &self.shm,
                &mut copy.bytes[..],
                (region * REGION_SIZE) as u64,
            )?;
            self.regions.push(copy);
        }
        self.drop_after(mx_frame);
        Ok(())
    }

    /// Whether the file is long enough for the entries up to `mx_frame`.
    pub(super) fn has_room(&self, mx_frame: u32) -> bool {
        (wal_index::region_count(mx_frame) * REGION_SIZE) as u64 <= self.len
    }

    /// Enters `frame`, the next one, as the newest of page `pgno`.
    pub(super) fn push(&mut self, frame: u32, pgno: Pgno) {
        let place = Place::of(frame);
        if place.region == self.regions.len() {
            self.regions.push(RegionCopy::new());
        }
        let region = &mut self.regions[place.region];
        let slot = wal_index::insert(&mut region.bytes, place, pgno)
            .expect("a region holds half as many entries as slots");
        match &mut region.unwritten {
            // The first entry clears the region.
            unwritten if place.entry == 1 => *unwritten = Unwritten::Whole,
            unwritten @ Unwritten::Nothing => {
                *unwritten = Unwritten::Entries { first: place, last: place, slots: vec![slot] };
            }
            Unwritten::Entries { last, slots, .. } if slots.len() < SLOTS_MAX => {
                *last = place;
                slots.push(slot);
            }
            unwritten => *unwritten = Unwritten::Whole,
        }
    }

    /// Drops the entries after `mx_frame`.
    pub(super) fn drop_after(&mut self, mx_frame: u32) {
        if mx_frame == 0 {
            return self.regions.clear();
        }
        let last = Place::of(mx_frame);
        self.regions.truncate(last.region + 1);
        let region = &mut self.regions[last.region];
        wal_index::drop_after(&mut region.bytes, last);
        region.unwritten = Unwritten::Whole;
    }

    /// The newest frame of page `pgno` up to `mx_frame`.
    pub(super) fn find(&self, mx_frame: u32, pgno: Pgno) -> Option<u32> {
        if mx_frame == 0 {
            return None;
        }
        let top = Place::of(mx_frame);
        (0..=top.region).rev().find_map(|region| {
            let last = if region == top.region { top } else { wal_index::last_place(region) };
            wal_index::find(&self.regions[region].bytes, last, pgno).map(Place::frame)
        })
    }

    /// The page of a frame that was entered.
    pub(super) fn pgno_of(&self, frame: u32) -> u32 {
        let place = Place::of(frame);
        wal_index::pgno_of(&self.regions[place.region].bytes, place)
    }

    /// Writes the entries that are not in the file yet. The file is kept one region longer than
    /// that: a client that asks for its size while it grows may be told the former one.
    pub(super) fn write_entries(&mut self) -> io::Result<Growth> {
        for number in 0..self.regions.len() {
            let unwritten =
                std::mem::replace(&mut self.regions[number].unwritten, Unwritten::Nothing);
            if let Err(error) = self.write_unwritten(number, &unwritten) {
                self.regions[number].unwritten = unwritten;
                return Err(error);
            }
        }
        let len = ((self.regions.len() + 1) * REGION_SIZE) as u64;
        if self.len >= len {
            return Ok(Growth::Same);
        }
        os::truncate("apply:shm", &self.shm, len)?;
        self.len = len;
        Ok(Growth::Grown)
    }

    fn write_unwritten(&mut self, number: usize, unwritten: &Unwritten) -> io::Result<()> {
        match unwritten {
            Unwritten::Nothing => {}
            Unwritten::Entries { first, last, slots } => {
                self.write_region(number, first.pgno_at(), last.pgno_at() + 4)?;
                for &slot in slots {
                    self.write_region(number, slot, slot + 2)?;
                }
            }
            Unwritten::Whole => {
                let first = Place { region: number, entry: 1 };
                self.write_region(number, first.pgno_at(), SLOTS_AT)?;
                self.write_region(number, SLOTS_AT, REGION_SIZE)?;
            }
        }
        Ok(())
    }

    /// Writes the bytes from `start` to `end` of a region, widened to whole units.
    fn write_region(&mut self, number: usize, start: usize, end: usize) -> io::Result<()> {
        let (start, end) = (start - start % UNIT, end.next_multiple_of(UNIT));
        self.note(number * REGION_SIZE + start, end - start);
        let bytes = &self.regions[number].bytes[start..end];
        os::write_at("apply:shm", &self.shm, bytes, (number * REGION_SIZE + start) as u64)
    }

    /// Clears the file up to the end of the first region, so that an empty log is all it tells.
    pub(super) fn clear_file(&mut self) -> io::Result<()> {
        self.regions.clear();
        self.write(&[0; REGION_SIZE], 0)?;
        self.len = self.len.max(REGION_SIZE as u64);
        Ok(())
    }

    /// Makes `header` the one that readers see: the second copy first, because readers take the
    /// first and then compare.
    pub(super) fn write_header(&mut self, header: &IndexHeader) -> io::Result<()> {
        let copy = header.encode();
        fence(Ordering::SeqCst);
        self.write(&copy, HEADER_COPY_SIZE)?;
        fence(Ordering::SeqCst);
        self.write(&copy, 0)
    }

    /// Sets all checkpoint information; the caller holds READ1 to READ4 exclusively.
    pub(super) fn write_info(&mut self, info: &CheckpointInfo) -> io::Result<()> {
        let bytes = info.encode();
        let marks_end = READ_MARKS_AT - CKPT_AT + 4 * wal_index::READ_MARKS;
        self.write(&bytes[..marks_end], CKPT_AT)?;
        self.write_attempted(info.attempted)
    }

    /// Says that frames up to this one may get into the database file.
    pub(super) fn write_attempted(&mut self, frame: u32) -> io::Result<()> {
        // The word after it is unused.
        self.write_pair(frame, ATTEMPTED_AT)
    }

    /// Says that the frames up to this one are in the database file.
    pub(super) fn write_backfill(&mut self, frame: u32) -> io::Result<()> {
        // The word after it is read mark 0, which is always 0.
        fence(Ordering::SeqCst);
        self.write_pair(frame, CKPT_AT)
    }

    /// Read mark `i`, which its reader may be changing.
    pub(super) fn read_mark(&self, i: usize) -> io::Result<u32> {
        let mut bytes = [0; 4];
        os::read_exact_at(
            "read:apply-index",
            &self.shm,
            &mut bytes,
            wal_index::read_mark_at(i) as u64,
        )?;
        Ok(u32::from_ne_bytes(bytes))
    }

    /// Sets read mark `i`; the caller holds its lock exclusively.
    pub(super) fn write_mark(&mut self, i: usize, frame: u32) -> io::Result<()> {
        self.write(&frame.to_ne_bytes(), wal_index::read_mark_at(i))
    }

    fn write_pair(&mut self, word: u32, at: usize) -> io::Result<()> {
        let mut bytes = [0; UNIT];
        bytes[..4].copy_from_slice(&word.to_ne_bytes());
        self.write(&bytes, at)
    }

    /// Tells readers of what was written since the last time.
    pub(super) fn tell(&mut self, cache: &dyn ReaderCache) {
        let Range { start, end } = std::mem::replace(&mut self.untold, 0..0);
        if start < end {
            cache.index_written(start as u64, (end - start) as u64);
        }
    }

    /// Bytes are about to be written; even a write that fails may have written something.
    fn note(&mut self, at: usize, len: usize) {
        let Range { start, end } = self.untold;
        self.untold = if start < end { start.min(at)..end.max(at + len) } else { at..at + len };
    }

    fn write(&mut self, bytes: &[u8], at: usize) -> io::Result<()> {
        self.note(at, bytes.len());
        os::write_at("apply:shm", &self.shm, bytes, at as u64)
    }
}
