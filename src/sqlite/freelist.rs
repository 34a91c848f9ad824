//! The freelist: pages of a database that hold nothing.
//!
//! ```text
//! page 1, 32   4  the first trunk page; 0 if no page is free
//! trunk,   0   4  the next trunk page; 0 in the last one
//!          4   4  the number of leaves
//!          8  4n  the leaves
//! ```
//!
//! What a leaf holds means nothing, and a rollback journal does not keep it. (Database File Format,
//! section 1.5.)

use ltx::Pgno;

use super::be_u32;
use super::header::HEADER_SIZE;

const FIRST_TRUNK_AT: usize = 32;
const NEXT_AT: usize = 0;
const COUNT_AT: usize = 4;
const LEAVES_AT: usize = 8;

/// The first trunk page, from the start of page 1; none if no page is free.
pub fn first_trunk(page: &[u8]) -> Option<Pgno> {
    let trunk = if page.len() < HEADER_SIZE { 0 } else { be_u32(page, FIRST_TRUNK_AT) };
    (trunk > 0).then_some(Pgno(trunk))
}

/// The next trunk page, if there is one, and the leaves of a trunk page.
pub fn trunk(page: &[u8]) -> (Option<Pgno>, impl Iterator<Item = Pgno> + '_) {
    let next = be_u32(page, NEXT_AT);
    let words = page[LEAVES_AT..].chunks_exact(size_of::<u32>());
    let leaves = words.take(be_u32(page, COUNT_AT) as usize).map(|word| Pgno(be_u32(word, 0)));
    ((next > 0).then_some(Pgno(next)), leaves)
}
