//! What the kernel knows: nodes by id with the count of look-ups it has not forgotten, and open
//! files by handle number.
//!
//! A node's id is its inode number. Both tables are split, so that requests on different files do
//! not wait for each other, and hand out clones, so that no lock is held during a call.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::RwLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Into how many parts a table is split; a power of two.
const SHARDS: usize = 16;

/// The nodes that the kernel has looked up and not forgotten.
#[derive(Debug)]
pub(crate) struct Nodes<N> {
    shards: [RwLock<ById<Known<N>>>; SHARDS],
}

type ById<T> = HashMap<u64, T, BuildHasherDefault<IdHasher>>;

#[derive(Debug)]
struct Known<N> {
    node: N,
    lookups: u64,
}

impl<N: Clone> Nodes<N> {
    /// No node.
    pub fn new() -> Nodes<N> {
        Nodes { shards: std::array::from_fn(|_| RwLock::default()) }
    }

    /// The node with this id.
    pub fn get(&self, id: u64) -> Option<N> {
        self.shard(id).read().unwrap().get(&id).map(|known| known.node.clone())
    }

    /// The kernel is told of the node once more. Of equal ids the first node stays.
    pub fn remember(&self, id: u64, node: N) {
        let mut shard = self.shard(id).write().unwrap();
        shard.entry(id).or_insert(Known { node, lookups: 0 }).lookups += 1;
    }

    /// The kernel forgets so many look-ups of the node.
    pub fn forget(&self, id: u64, lookups: u64) {
        let mut shard = self.shard(id).write().unwrap();
        let Some(known) = shard.get_mut(&id) else { return };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0 {
            let last = shard.remove(&id);
            drop(shard);
            drop(last);
        }
    }

    fn shard(&self, id: u64) -> &RwLock<ById<Known<N>>> {
        &self.shards[(spread(id) >> 60) as usize % SHARDS]
    }
}

/// Numbered values: the number is a place in one of several vectors, so that finding one is an
/// index and not a search.
#[derive(Debug)]
pub(crate) struct Handles<H> {
    shards: [RwLock<Slots<H>>; SHARDS],
    turn: AtomicUsize,
}

#[derive(Debug)]
struct Slots<H> {
    values: Vec<Option<H>>,
    free: Vec<usize>,
}

impl<H> Default for Slots<H> {
    fn default() -> Slots<H> {
        Slots { values: Vec::new(), free: Vec::new() }
    }
}

impl<H> Handles<H> {
    /// No value.
    pub fn new() -> Handles<H> {
        let empty = |_| RwLock::new(Slots::default());
        Handles { shards: std::array::from_fn(empty), turn: AtomicUsize::new(0) }
    }

    /// Keeps a value; its number.
    pub fn insert(&self, value: H) -> u64 {
        let shard = self.turn.fetch_add(1, Ordering::Relaxed) % SHARDS;
        let mut slots = self.shards[shard].write().unwrap();
        let index = match slots.free.pop() {
            Some(index) => {
                slots.values[index] = Some(value);
                index
            }
            None => {
                slots.values.push(Some(value));
                slots.values.len() - 1
            }
        };
        (index * SHARDS + shard) as u64
    }

    /// What `read` makes of the value with this number.
    pub fn get<T>(&self, number: u64, read: impl FnOnce(&H) -> T) -> Option<T> {
        let (shard, index) = place(number);
        self.shards[shard].read().unwrap().values.get(index)?.as_ref().map(read)
    }

    /// Gives up every value.
    pub fn drain(&self) -> Vec<H> {
        let shards = self.shards.iter().map(|shard| shard.write().unwrap());
        shards.flat_map(|mut slots| std::mem::take(&mut *slots).values).flatten().collect()
    }

    /// Gives up the value with this number.
    pub fn remove(&self, number: u64) -> Option<H> {
        let (shard, index) = place(number);
        let mut slots = self.shards[shard].write().unwrap();
        let value = slots.values.get_mut(index)?.take()?;
        slots.free.push(index);
        Some(value)
    }
}

fn place(number: u64) -> (usize, usize) {
    let number = number as usize;
    (number % SHARDS, number / SHARDS)
}

/// Hashes one number by multiplication; ids are chosen by the volume, not by a stranger.
#[derive(Debug, Default)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = spread(self.0 ^ number);
    }
}

/// Fibonacci hashing: 2^64 divided by the golden ratio, high bits well mixed.
fn spread(number: u64) -> u64 {
    number.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_node_stays_until_its_last_lookup_is_forgotten() {
        let nodes = Nodes::new();
        let node = Arc::new(());
        nodes.remember(7, node.clone());
        nodes.remember(7, node.clone());
        assert_eq!(Arc::strong_count(&node), 2);
        nodes.forget(7, 1);
        assert!(nodes.get(7).is_some());
        nodes.forget(7, 1);
        assert!(nodes.get(7).is_none());
        assert_eq!(Arc::strong_count(&node), 1);
        nodes.forget(7, u64::MAX);
    }

    #[test]
    fn a_number_names_its_value_until_removed() {
        let handles = Handles::new();
        let numbers: Vec<u64> = (0..100).map(|value| handles.insert(value)).collect();
        for (value, number) in (0..100).zip(&numbers) {
            assert_eq!(handles.get(*number, |value| *value), Some(value));
        }
        assert_eq!(handles.remove(numbers[5]), Some(5));
        assert_eq!(handles.remove(numbers[5]), None);
        assert_eq!(handles.get(numbers[5], |value| *value), None);
        assert_eq!(handles.get(u64::MAX, |value| *value), None);
        assert_eq!(handles.drain().len(), 99);
        assert_eq!(handles.get(numbers[6], |value| *value), None);
        let again: Vec<u64> = (0..SHARDS).map(|value| handles.insert(value as i32)).collect();
        again.iter().for_each(|number| assert!(handles.remove(*number).is_some()));
    }
}
