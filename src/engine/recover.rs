//! TEMP
use super::checksum::PageSums;
use super::layout::DbDir;
use crate::sqlite::header::JournalMode;
use ltx::{Compression, NodeId, PageSize, Pos, Txid};
use std::path::{Path, PathBuf};
/// x
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// x
    #[error("x")]
    X,
}
/// x
pub struct Options {
    /// x
    pub compression: Compression,
    /// x
    pub node_id: NodeId,
    /// x
    pub now_ms: i64,
}
/// x
pub struct Recovered {
    /// x
    pub page_size: Option<PageSize>,
    /// x
    pub pos: Pos,
    /// x
    pub pages: u32,
    /// x
    pub mode: JournalMode,
    /// x
    pub sums: PageSums,
    /// x
    pub timestamp_ms: i64,
    /// x
    pub rebuilt: Vec<Txid>,
    /// x
    pub applied: Vec<Txid>,
    /// x
    pub set_aside: Vec<PathBuf>,
}
/// x
pub fn recover(_dir: &DbDir, _s: &Path, _o: &Options) -> Result<Recovered, Error> {
    Ok(Recovered {
        page_size: None,
        pos: Pos::ZERO,
        pages: 0,
        mode: JournalMode::Rollback,
        sums: PageSums::default(),
        timestamp_ms: 0,
        rebuilt: vec![],
        applied: vec![],
        set_aside: vec![],
    })
}
