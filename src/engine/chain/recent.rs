//! The newest transactions of a database, in memory for the streams, whether they are in a file or not.
//!
//! **Invariant:** what the databases of a node keep here has one bound, however many there are.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ltx::Txid;

use crate::engine::transaction::{PageRef, Transaction};
use crate::limits;

/// What the recent transactions of all databases take up, in bytes.
#[derive(Debug, Clone, Default)]
pub struct Budget(Arc<AtomicUsize>);

impl Budget {
    /// What is taken up now.
    pub fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// The newest transactions of one database, oldest first.
#[derive(Default)]
pub(super) struct Recent {
    transactions: VecDeque<Arc<Transaction>>,
    bytes: usize,
    of_all: Budget,
}

impl Recent {
    /// None yet.
    pub(super) fn new(of_all: Budget) -> Recent {
        Recent { transactions: VecDeque::new(), bytes: 0, of_all }
    }

    /// Adds one behind the others; the oldest ones may go. One whose LTX file is not to stand in memory
    /// ([`limits::ENCODE_IN_MEMORY`]) is left out: streams read it from disk.
    pub(super) fn push(&mut self, transaction: Arc<Transaction>) {
        if transaction.size_hint() > limits::ENCODE_IN_MEMORY {
            return;
        }
        let bytes = memory(&transaction);
        self.bytes += bytes;
        self.of_all.0.fetch_add(bytes, Ordering::Relaxed);
        self.transactions.push_back(transaction);
        while self.transactions.len() > limits::RECENT_LEN
            || (self.is_too_much() && self.transactions.len() > 1)
        {
            if let Some(oldest) = self.transactions.pop_front() {
                self.give_back(memory(&oldest));
            }
        }
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.transactions.clear();
        self.give_back(self.bytes);
    }

    /// The transaction, or range of them, that begins with `txid`. A snapshot is one of all transactions
    /// up to its last.
    pub(super) fn at(&self, txid: Txid) -> Option<Arc<Transaction>> {
        let index = self.transactions.partition_point(|transaction| transaction.max < txid);
        self.transactions.get(index).filter(|transaction| transaction.min == txid).cloned()
    }

    fn is_too_much(&self) -> bool {
        self.bytes > limits::RECENT_BYTES || self.of_all.bytes() > limits::RECENT_BYTES_OF_ALL
    }

    fn give_back(&mut self, bytes: usize) {
        self.bytes -= bytes;
        self.of_all.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Recent {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What a transaction takes up at the most, in bytes: with its LTX file, which a stream may have asked for.
fn memory(transaction: &Transaction) -> usize {
    let pages = transaction.page_count() * mem::size_of::<PageRef>();
    mem::size_of::<Transaction>() + pages + transaction.size_hint()
}
