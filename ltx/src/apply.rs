//! From a file to a database: a whole one from a snapshot, or changed pages into one that exists.

use std::io::{Read, Seek, SeekFrom, Write};

use crate::decoder::Decoder;
use crate::error::Error;
use crate::header::{Header, Trailer};
use crate::types::{PageSize, Pgno};

/// Writes the database that a snapshot holds to `out`, with zeros for the lock page.
///
/// The snapshot is only certain when this has returned: until then `out` must not be used.
pub fn materialize(source: impl Read, mut out: impl Write) -> Result<(Header, Trailer), Error> {
    let mut decoder = Decoder::new(source)?;
    let header = *decoder.header();
    if !header.is_snapshot() {
        return Err(Error::NotSnapshot(header.min_txid));
    }
    let lock = header.page_size.lock_pgno();
    let mut page = vec![0; header.page_size.bytes()];
    let mut written = 0;
    while let Some(pgno) = decoder.next_page(&mut page)? {
        if pgno.0 == lock.0 + 1 {
            write_zero_page(&mut out, header.page_size)?;
        }
        out.write_all(&page).map_err(Error::Database)?;
        written = pgno.0;
    }
    if written + 1 == lock.0 && header.commit == lock.0 {
        write_zero_page(&mut out, header.page_size)?;
    }
    let trailer = decoder.finish()?;
    out.flush().map_err(Error::Database)?;
    Ok((header, trailer))
}

fn write_zero_page(out: &mut impl Write, page_size: PageSize) -> Result<(), Error> {
    const ZEROS: [u8; 512] = [0; 512];
    (0..page_size.bytes() / ZEROS.len())
        .try_for_each(|_| out.write_all(&ZEROS))
        .map_err(Error::Database)
}

/// Something whose length can be set, as a database file's must be.
pub trait SetLen {
    /// Cuts or extends to `len` bytes.
    fn set_len(&mut self, len: u64) -> std::io::Result<()>;
}

impl SetLen for std::fs::File {
    fn set_len(&mut self, len: u64) -> std::io::Result<()> {
        std::fs::File::set_len(self, len)
    }
}

impl SetLen for std::io::Cursor<Vec<u8>> {
    fn set_len(&mut self, len: u64) -> std::io::Result<()> {
        let len = usize::try_from(len).map_err(std::io::Error::other)?;
        self.get_mut().resize(len, 0);
        Ok(())
    }
}

/// Writes the pages of a file into `database` and sets its length to the file's `commit`.
///
/// Pages are written as they are read, before the end of the file has proved them. So the caller
/// first verifies the file ([`verify`](crate::verify)) and checks that the database is at
/// [`Header::pre_pos`], and afterwards that its checksum is the trailer's.
pub fn apply<D: Write + Seek + SetLen>(
    source: impl Read,
    database: &mut D,
) -> Result<(Header, Trailer), Error> {
    let mut decoder = Decoder::new(source)?;
    let header = *decoder.header();
    let mut page = vec![0; header.page_size.bytes()];
    let mut at = Pgno(0);
    while let Some(pgno) = decoder.next_page(&mut page)? {
        if pgno.0 != at.0 {
            let offset = SeekFrom::Start(header.page_size.offset(pgno));
            database.seek(offset).map_err(Error::Database)?;
        }
        database.write_all(&page).map_err(Error::Database)?;
        at = Pgno(pgno.0.saturating_add(1));
    }
    let trailer = decoder.finish()?;
    let len = u64::from(header.commit) * u64::from(header.page_size.get());
    database.set_len(len).map_err(Error::Database)?;
    Ok((header, trailer))
}
