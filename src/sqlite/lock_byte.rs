//! The bytes on which SQLite takes its locks, as names.
//!
//! ```text
//! PENDING   0x40000000       database     the next writer, keeps new readers out
//! RESERVED  0x40000001       database     the one writer
//! SHARED    0x40000002 (510) database     readers; exclusive: nobody reads
//! WRITE     120              -shm         the one writer of the WAL
//! CKPT      121              -shm         the one checkpointer
//! RECOVER   122              -shm         rebuilding the wal-index
//! READ0-4   123-127          -shm         readers of the database file alone (0), of a mark (1-4)
//! DMS       128              -shm         whoever has the wal-index open
//! ```
//!
//! (Database File Format, section 1.4 and "File Locking And Concurrency"; WAL-mode File Format,
//! section 2.3.) Of SHARED only the first byte counts: no client locks another part of it alone.

use std::fmt;

use ltx::PENDING_BYTE;

const WRITE_BYTE: u64 = 120;
const DMS_BYTE: u64 = WRITE_BYTE + 8;

/// The length of the SHARED range in bytes.
const SHARED_SIZE: u64 = 510;

/// A file of a database that SQLite locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LockFile {
    /// The database file.
    Database,
    /// The wal-index.
    Shm,
}

/// One of SQLite's locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Lock {
    /// Taken before EXCLUSIVE; keeps new readers out.
    Pending,
    /// The one writer in rollback mode.
    Reserved,
    /// Held shared by every reader, exclusively to write the database file.
    Shared,
    /// The one writer in WAL mode.
    Write,
    /// The one checkpointer.
    Ckpt,
    /// Who rebuilds the wal-index.
    Recover,
    /// Readers that use the database file only.
    Read0,
    /// Readers up to mark 1.
    Read1,
    /// Readers up to mark 2.
    Read2,
    /// Readers up to mark 3.
    Read3,
    /// Readers up to mark 4.
    Read4,
    /// Whoever has the wal-index open ("dead man's switch").
    Dms,
}

impl Lock {
    /// All locks, in the order in which a range is worked through.
    pub const ALL: [Lock; 12] = [
        Lock::Pending,
        Lock::Reserved,
        Lock::Shared,
        Lock::Write,
        Lock::Ckpt,
        Lock::Recover,
        Lock::Read0,
        Lock::Read1,
        Lock::Read2,
        Lock::Read3,
        Lock::Read4,
        Lock::Dms,
    ];

    /// The READ locks by the number of their mark.
    pub const READ: [Lock; 5] = [Lock::Read0, Lock::Read1, Lock::Read2, Lock::Read3, Lock::Read4];

    /// The file on which the lock is taken.
    pub fn file(self) -> LockFile {
        if self <= Lock::Shared { LockFile::Database } else { LockFile::Shm }
    }

    /// The first byte of the lock.
    pub fn byte(self) -> u64 {
        match self.file() {
            LockFile::Database => PENDING_BYTE + self as u64,
            LockFile::Shm => WRITE_BYTE + (self as u64 - Lock::Write as u64),
        }
    }

    /// The bytes of the lock, both ends included.
    pub fn range(self) -> (u64, u64) {
        let len = if self == Lock::Shared { SHARED_SIZE } else { 1 };
        (self.byte(), self.byte() + len - 1)
    }

    const fn bit(self) -> u16 {
        1 << self as u8
    }
}

impl fmt::Display for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 12] = [
            "PENDING", "RESERVED", "SHARED", "WRITE", "CKPT", "RECOVER", "READ0", "READ1", "READ2",
            "READ3", "READ4", "DMS",
        ];
        f.write_str(NAMES[*self as usize])
    }
}

/// A set of locks; iterates in the order of [`Lock::ALL`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct LockSet(u16);

impl LockSet {
    /// No lock.
    pub const EMPTY: LockSet = LockSet(0);
    /// Every lock.
    pub const ALL: LockSet = LockSet(0b1111_1111_1111);
    /// The locks of the database file.
    pub const DATABASE: LockSet = LockSet(0b111);
    /// The locks of the wal-index.
    pub const SHM: LockSet = LockSet(0b1111_1111_1000);
    /// READ0 to READ4.
    pub const READERS: LockSet = LockSet(0b0111_1100_0000);
    /// READ1 to READ4: readers of the log, each with a mark.
    pub const MARKS: LockSet = LockSet::READERS.without(LockSet::one(Lock::Read0));

    /// A set of one.
    pub const fn one(lock: Lock) -> LockSet {
        LockSet(lock.bit())
    }

    /// The set of `locks`.
    pub fn of(locks: &[Lock]) -> LockSet {
        locks.iter().copied().collect()
    }

    /// The locks of one file.
    pub fn file(file: LockFile) -> LockSet {
        match file {
            LockFile::Database => LockSet::DATABASE,
            LockFile::Shm => LockSet::SHM,
        }
    }

    /// The locks of `file` that a request for the bytes from `start` to `end`, both included,
    /// concerns: those whose (first) byte lies in the range.
    pub fn in_range(file: LockFile, start: u64, end: u64) -> LockSet {
        let (first, last) = match file {
            LockFile::Database => (PENDING_BYTE, Lock::Shared.byte()),
            LockFile::Shm => (WRITE_BYTE, DMS_BYTE),
        };
        if start > last || end < first || start > end {
            return LockSet::EMPTY;
        }
        LockSet::file(file).iter().filter(|lock| (start..=end).contains(&lock.byte())).collect()
    }

    /// Whether it holds `lock`.
    pub const fn contains(self, lock: Lock) -> bool {
        self.0 & lock.bit() != 0
    }

    /// Whether it holds none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many it holds.
    pub const fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// With `lock`.
    #[must_use]
    pub const fn with(self, lock: Lock) -> LockSet {
        LockSet(self.0 | lock.bit())
    }

    /// What is in either.
    #[must_use]
    pub const fn union(self, other: LockSet) -> LockSet {
        LockSet(self.0 | other.0)
    }

    /// What is in both.
    #[must_use]
    pub const fn and(self, other: LockSet) -> LockSet {
        LockSet(self.0 & other.0)
    }

    /// What is in this one only.
    #[must_use]
    pub const fn without(self, other: LockSet) -> LockSet {
        LockSet(self.0 & !other.0)
    }

    /// The locks in order.
    pub fn iter(self) -> impl Iterator<Item = Lock> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let lock = *Lock::ALL.get(rest.trailing_zeros() as usize)?;
            rest &= rest - 1;
            Some(lock)
        })
    }
}

impl FromIterator<Lock> for LockSet {
    fn from_iter<I: IntoIterator<Item = Lock>>(locks: I) -> LockSet {
        locks.into_iter().fold(LockSet::EMPTY, LockSet::with)
    }
}

impl fmt::Debug for LockSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(file: LockFile, start: u64, end: u64, expected: &[Lock]) {
        let set = LockSet::in_range(file, start, end);
        assert_eq!(set, LockSet::of(expected));
        assert_eq!(set.iter().collect::<Vec<_>>(), expected);
        assert_eq!(set.len() as usize, expected.len());
    }

    #[test]
    fn a_range_names_the_locks_whose_first_byte_it_covers() {
        use Lock::*;
        check(LockFile::Database, PENDING_BYTE, PENDING_BYTE, &[Pending]);
        check(LockFile::Database, PENDING_BYTE + 2, PENDING_BYTE + 511, &[Shared]);
        check(LockFile::Database, PENDING_BYTE + 3, PENDING_BYTE + 511, &[]);
        check(LockFile::Database, 0, i64::MAX as u64, &[Pending, Reserved, Shared]);
        check(LockFile::Database, 0, u64::MAX, &[Pending, Reserved, Shared]);
        check(LockFile::Database, 0, PENDING_BYTE - 1, &[]);
        check(LockFile::Shm, 120, 120, &[Write]);
        check(LockFile::Shm, 124, 127, &[Read1, Read2, Read3, Read4]);
        check(LockFile::Shm, 128, 128, &[Dms]);
        check(LockFile::Shm, 129, u64::MAX, &[]);
        check(LockFile::Shm, 121, 120, &[]);
        check(LockFile::Shm, PENDING_BYTE, PENDING_BYTE + 3, &[]);
    }

    #[test]
    fn a_lock_lies_in_its_own_range() {
        for lock in Lock::ALL {
            let (start, end) = lock.range();
            assert_eq!(LockSet::in_range(lock.file(), start, end), LockSet::one(lock), "{lock}");
            assert!(LockSet::file(lock.file()).contains(lock));
        }
        assert_eq!(Lock::Shared.range(), (0x4000_0002, 0x4000_01ff));
        assert_eq!(Lock::READ.map(Lock::byte), [123, 124, 125, 126, 127]);
        assert_eq!(LockSet::of(&Lock::READ), LockSet::READERS);
        assert_eq!(LockSet::of(&Lock::ALL), LockSet::ALL);
    }
}
