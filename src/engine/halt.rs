//! The HALT lock: the right to write one database, lent by the primary to one other node at a time.
//!
//! ```text
//! application    NAME-lock     replica                             primary
//! F_SETLKW ----> volume/halt -> Forward::acquire -- POST /halt --> [`lent`]: writers are locked out
//!                               [`borrowed`]: clients may write
//! commit ------> capture -----> Forward::commit --- POST /tx ----> [`lent`]: verified, applied
//! F_UNLCK -----> volume/halt -> Forward::release -- DELETE /halt > [`lent`]: writers go on
//! ```
//!
//! A commit on the replica counts only after the primary has taken it: until then what would make it
//! valid here (the end of the journal, the last bytes of a commit frame) is held back with the answer
//! to the client, and no thread waits. Both sides know by a clock of their own how long the lock is
//! valid; the replica's is never later than the primary's. Whatever becomes of an answer on its way,
//! positions decide what a node has: nothing is left out because of who wrote it.

use std::fmt;
use std::sync::Arc;

use ltx::Pos;

use super::db::{Answer, Db};
use super::follow_on::LtxBytes;

pub mod borrowed;
pub mod lent;

pub use lent::Lent;

/// Names one holder of a HALT lock; drawn by the node that asks for it, never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HaltId(pub i64);

impl fmt::Display for HaltId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A transaction that is about to be sent.
pub struct Outgoing {
    /// Under which lock.
    pub id: HaltId,
    /// Its LTX file.
    pub ltx: LtxBytes,
    /// Where it leads from.
    pub base: Pos,
    /// Where it leads to.
    pub pos: Pos,
}

/// A replica's way to its primary. No call waits; each answer is given once, on a thread that may
/// block.
pub trait Forward: Send + Sync {
    /// Takes the HALT lock of a database. Answered with success when the database is borrowed and
    /// stands where the primary stood; after anything else nothing is held.
    fn acquire(&self, db: Arc<Db>, id: HaltId, answer: Answer);
    /// Ends an [`Forward::acquire`] early: it is answered `Interrupted`. Whether there was one.
    fn cancel(&self, id: HaltId) -> bool;
    /// Gives the lock back; answered when the primary knows, or will find out by itself.
    fn release(&self, db: Arc<Db>, id: HaltId, answer: Answer);
    /// Sends one transaction; success means that the primary has it.
    fn commit(&self, db: Arc<Db>, outgoing: Outgoing, answer: Answer);
}
