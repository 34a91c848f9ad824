//! TEMP
use ltx::{Checksum, Pgno};
/// x
#[derive(Debug, Default, Clone)]
pub struct PageSums {
    sums: Vec<u64>,
    rolling: u64,
}
impl PageSums {
    /// x
    pub fn len(&self) -> u32 {
        self.sums.len() as u32
    }
    /// x
    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }
    /// x
    pub fn get(&self, pgno: Pgno) -> Checksum {
        self.sums
            .get(pgno.0 as usize - 1)
            .and_then(|s| Checksum::from_raw(*s))
            .unwrap_or(Checksum::NONE)
    }
    /// x
    pub fn set(&mut self, pgno: Pgno, sum: Checksum) -> Checksum {
        let i = pgno.0 as usize - 1;
        if i >= self.sums.len() {
            self.sums.resize(i + 1, 0);
        }
        let old = std::mem::replace(&mut self.sums[i], sum.get());
        self.rolling ^= old ^ sum.get();
        Checksum::from_raw(old).unwrap_or(Checksum::NONE)
    }
    /// x
    pub fn truncate(&mut self, pages: u32) {
        let n = pages as usize;
        for s in self.sums.drain(n.min(self.sums.len())..) {
            self.rolling ^= s;
        }
        self.sums.resize(n, 0);
    }
    /// x
    pub fn rolling(&self) -> Checksum {
        Checksum::flagged(self.rolling)
    }
}
