//! A kernel without caches, for engines without a mount.

use litefs::engine::PageCache;

/// A kernel that has nothing cached.
pub struct NoCache;

impl PageCache for NoCache {
    fn pages_changed(&self, _ino: u64, _offset: u64, _len: u64) {}
    fn file_grown(&self, _ino: u64, _offset: u64, _bytes: &[u8]) {}
    fn file_changed(&self, _ino: u64) {}
    fn attr_changed(&self, _ino: u64) {}
    fn name_changed(&self, _name: &str) {}
    fn name_gone(&self, _name: &str) {}
    fn file_mistaken(&self, _ino: u64, _name: &str) {}
}
