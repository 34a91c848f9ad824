//! The pages of the schema table: the b-tree whose root is page 1.
//!
//! ```text
//! page, 0 (page 1: 100)   1  5: interior page, 13: leaf
//!       3                 2  the number of cells
//!       8                 4  interior: the rightmost child
//!       8 or 12          2n  where in the page each cell begins
//! cell, interior          4  a child, then a key
//! cell, leaf                 the length of the payload and a key as varints, the payload; of one that is
//!                            too long only the beginning, and then 4 bytes, the first overflow page
//! overflow page           4  the next one, or 0
//! ```
//!
//! All numbers are big-endian. (Database File Format, sections 1.6 and 1.7.)

use ltx::Pgno;

use super::be_u32;
use super::header::HEADER_SIZE;

const INTERIOR: u8 = 5;
const LEAF: u8 = 13;
const RESERVED_AT: usize = 20;

/// A page to which another one leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// A page of the tree.
    Tree(Pgno),
    /// The rest of a long row.
    Overflow(Pgno),
}

impl Link {
    /// Its number.
    pub fn pgno(self) -> Pgno {
        match self {
            Link::Tree(pgno) | Link::Overflow(pgno) => pgno,
        }
    }
}

/// The bytes of a page that pages of the tree may use, as page 1 says.
pub fn usable(page_1: &[u8]) -> Option<usize> {
    page_1.len().checked_sub(usize::from(*page_1.get(RESERVED_AT)?)).filter(|usable| *usable >= 480)
}

/// Where `page`, to which `link` leads, leads on; none if it is no such page.
pub fn links(link: Link, page: &[u8], usable: usize) -> Option<Vec<Link>> {
    match link {
        Link::Tree(pgno) => tree_links(if pgno == Pgno(1) { HEADER_SIZE } else { 0 }, page, usable),
        Link::Overflow(_) => {
            let next = be_u32(page.get(..4)?, 0);
            Some(if next > 0 { vec![Link::Overflow(Pgno(next))] } else { Vec::new() })
        }
    }
}

fn tree_links(start: usize, page: &[u8], usable: usize) -> Option<Vec<Link>> {
    let head = page.get(start..)?;
    let (kind, cells) = (*head.first()?, usize::from(be_u16(head, 3)?));
    let mut links = Vec::new();
    let cells_at = match kind {
        INTERIOR => {
            links.push(Link::Tree(Pgno(be_u32(head.get(8..12)?, 0))));
            12
        }
        LEAF => 8,
        _ => return None,
    };
    for cell in 0..cells {
        let cell = page.get(usize::from(be_u16(head, cells_at + 2 * cell)?)..)?;
        match kind {
            INTERIOR => links.push(Link::Tree(Pgno(be_u32(cell.get(..4)?, 0)))),
            _ => links.extend(overflow_of(cell, usable)?.map(Link::Overflow)),
        }
    }
    Some(links)
}

/// The first overflow page of a leaf's cell, if it has one.
#[allow(clippy::option_option)]
fn overflow_of(cell: &[u8], usable: usize) -> Option<Option<Pgno>> {
    let (payload, rest) = varint(cell)?;
    let (_key, rest) = varint(rest)?;
    let payload = usize::try_from(payload).ok()?;
    let (most, least) = (usable - 35, (usable - 12) * 32 / 255 - 23);
    if payload <= most {
        return Some(None);
    }
    let here = least + (payload - least) % (usable - 4);
    let here = if here <= most { here } else { least };
    Some(Some(Pgno(be_u32(rest.get(here..here + 4)?, 0))))
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (at, byte) in bytes.iter().enumerate().take(9) {
        if at == 8 {
            return Some((value << 8 | u64::from(*byte), &bytes[9..]));
        }
        value = value << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[at + 1..]));
        }
    }
    None
}

fn be_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn walk(file: &[u8], page_size: usize) -> Option<BTreeSet<Pgno>> {
        let page = |pgno: Pgno| &file[(pgno.0 as usize - 1) * page_size..][..page_size];
        let (mut todo, mut seen) = (vec![Link::Tree(Pgno(1))], BTreeSet::new());
        while let Some(link) = todo.pop() {
            seen.insert(link.pgno());
            todo.extend(links(link, page(link.pgno()), usable(page(Pgno(1)))?)?);
        }
        Some(seen)
    }

    /// All pages of the schema table, as SQLite itself counts them.
    #[track_caller]
    fn check(page_size: usize, tables: usize, long: usize) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let db = rusqlite::Connection::open(&path).unwrap();
        let mut sql = format!("PRAGMA page_size={page_size};");
        for table in 0..tables {
            sql += &format!("CREATE TABLE t{table}(x DEFAULT '{}');", "y".repeat(long));
        }
        db.execute_batch(&sql).unwrap();
        let stat = "SELECT pageno FROM dbstat WHERE name = 'sqlite_schema'";
        let mut stat = db.prepare(stat).unwrap();
        let expected = stat.query_map([], |row| row.get(0).map(Pgno)).unwrap();
        let expected: BTreeSet<Pgno> = expected.map(Result::unwrap).collect();
        let found = walk(&std::fs::read(&path).unwrap(), page_size).unwrap();
        assert_eq!(found, expected);
    }

    #[test]
    fn every_page_of_the_schema_is_found() {
        check(4096, 1, 10);
        check(512, 100, 10);
        check(512, 30, 3000);
        check(1024, 200, 985);
        check(4096, 300, 4060);
        check(65536, 40, 70000);
    }

    #[test]
    fn other_pages_lead_nowhere() {
        let mut rng = crate::sqlite::test_rng::Rng::from_env();
        for _ in 0..2000 {
            let page: Vec<u8> = (0..512).map(|_| rng.below(256) as u8).collect();
            let mut leaf = page.clone();
            leaf[0] = LEAF;
            for page in [page, leaf] {
                let _ = links(Link::Tree(Pgno(2)), &page, 512);
            }
        }
        assert_eq!(links(Link::Tree(Pgno(2)), &[0; 512], 512), None);
        assert_eq!(links(Link::Overflow(Pgno(2)), &[0; 3], 512), None);
    }
}
