//! What all databases of a node have in common.

use std::collections::HashSet;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use ltx::{Compression, NodeId};

use super::backup;
use super::brief::Brief;
use super::chain::{Budget, Waker};
use super::feed::Feed;
use super::fence::Fence;
use super::files::FileKind;
use super::halt::Forward;
use crate::{limits, os};

/// A clock that is not known.
const UNKNOWN: i64 = i64::MAX;

/// How long a look at the free space holds, in milliseconds.
const SPACE_INTERVAL_MS: u64 = 20;

/// Tells the kernel that something of the mount changed without it. Never called by a thread that
/// answers kernel requests, nor with a lock held that such a thread could want.
pub trait PageCache: Send + Sync {
    /// `len` bytes at `offset` of the file `ino` changed, and perhaps its size.
    fn pages_changed(&self, ino: u64, offset: u64, len: u64);
    /// The file `ino` is so long that these bytes are in it at `offset`; known before this returns.
    fn file_grown(&self, ino: u64, offset: u64, bytes: &[u8]);
    /// All of the file `ino` changed.
    fn file_changed(&self, ino: u64);
    /// The attributes of the file `ino` changed; may be called from anywhere.
    fn attr_changed(&self, ino: u64);
    /// The name appeared or went; may be called from anywhere.
    fn name_changed(&self, name: &str);
    /// Nothing has the name any more, and nobody finds it when this returns.
    fn name_gone(&self, name: &str);
    /// The file `ino` of that name is not what the kernel believes; may be called from anywhere.
    fn file_mistaken(&self, ino: u64, name: &str);
}

/// What a [`Shared`] is made of.
pub struct Settings {
    /// Whether LTX files are compressed.
    pub compression: Compression,
    /// This process, in the LTX files it writes.
    pub node_id: NodeId,
    /// The ids of earlier processes on this data directory, and of this one.
    pub own_nodes: HashSet<NodeId>,
    /// The wall clock, in milliseconds since the Unix epoch.
    pub clock: Box<dyn Fn() -> i64 + Send + Sync>,
    /// Whether each commit is followed by a check of the whole database.
    pub strict_verify: bool,
    /// The data directory.
    pub data_dir: PathBuf,
    /// Wakes the LTX writer.
    pub writer: Waker,
}

/// What applications may do to the databases of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Writing {
    /// Nothing.
    Refused = 0,
    /// Finish the transactions that they have begun; that counts.
    Finishing = 1,
    /// Everything.
    Allowed = 2,
}

/// What all databases of a node have in common.
pub struct Shared {
    settings: Settings,
    /// Who wants to know.
    pub feed: Arc<Feed>,
    /// What is known of the backups.
    pub backup: backup::Report,
    /// Until when a primary may commit.
    pub fence: Fence,
    /// What the recent transactions of all databases take up.
    pub recent: Budget,
    /// The ends of waits for the engine itself.
    pub brief: Arc<Brief>,
    /// What applications may do, a [`Writing`].
    writing: AtomicU8,
    /// Whether everything here is known to come from the primary that the node follows.
    same_line: AtomicBool,
    /// How far this node's clock is ahead of the primary's, the way of the news included: the least that
    /// was seen on the present stream.
    clock_ahead_ms: AtomicI64,
    /// Whether clients share the pages of `-wal` and `-shm` with us.
    passthrough: AtomicBool,
    /// The kernel, once something is mounted.
    page_cache: OnceLock<Arc<dyn PageCache>>,
    /// The way to the primary of a replica that writes.
    forward: OnceLock<Arc<dyn Forward>>,
    /// Asks for the stream to be opened again.
    reconnect: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Where writes should go, for the log.
    primary_hint: Mutex<String>,
    space: Space,
}

/// The last look at the free space.
struct Space {
    /// Held by who looks.
    looking: Mutex<()>,
    begun: Instant,
    /// For how long it holds, in milliseconds since `begun`.
    holds_ms: AtomicU64,
    /// Whether there was too little.
    is_full: AtomicBool,
}

impl Default for Space {
    fn default() -> Space {
        Space {
            looking: Mutex::default(),
            begun: Instant::now(),
            holds_ms: AtomicU64::new(0),
            is_full: AtomicBool::new(false),
        }
    }
}

impl Space {
    /// What was seen, as long as that holds.
    fn known(&self) -> Option<bool> {
        let holds = self.now_ms() < self.holds_ms.load(Ordering::SeqCst);
        holds.then(|| self.is_full.load(Ordering::SeqCst))
    }

    fn note(&self, is_full: bool) {
        self.is_full.store(is_full, Ordering::SeqCst);
        self.holds_ms.store(self.now_ms() + SPACE_INTERVAL_MS, Ordering::SeqCst);
    }

    fn now_ms(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }
}

impl Deref for Shared {
    type Target = Settings;

    fn deref(&self) -> &Settings {
        &self.settings
    }
}

impl Shared {
    /// A node that may not write and is not mounted.
    pub fn new(settings: Settings) -> Shared {
        Shared {
            settings,
            feed: Arc::default(),
            backup: backup::Report::default(),
            fence: Fence::default(),
            recent: Budget::default(),
            brief: Arc::default(),
            writing: AtomicU8::new(Writing::Refused as u8),
            same_line: AtomicBool::new(false),
            clock_ahead_ms: AtomicI64::new(UNKNOWN),
            passthrough: AtomicBool::new(false),
            page_cache: OnceLock::new(),
            forward: OnceLock::new(),
            reconnect: OnceLock::new(),
            primary_hint: Mutex::default(),
            space: Space::default(),
        }
    }

    /// What applications may do.
    pub fn writing(&self) -> Writing {
        match self.writing.load(Ordering::SeqCst) {
            2 => Writing::Allowed,
            1 => Writing::Finishing,
            _ => Writing::Refused,
        }
    }

    /// Whether this node is the primary, and what was begun may be finished or undone.
    pub fn is_writable(&self) -> bool {
        self.writing() != Writing::Refused
    }

    /// Whether a transaction may begin at this moment.
    pub fn may_begin(&self) -> bool {
        self.writing() == Writing::Allowed && self.fence.is_open()
    }

    /// Whether a transaction may be committed at this moment.
    pub fn may_commit(&self) -> bool {
        self.is_writable() && self.fence.is_open()
    }

    /// Whether this node is the primary and its lease is not confirmed.
    pub fn is_fenced(&self) -> bool {
        self.is_writable() && !self.fence.is_open()
    }

    /// Says what applications may do.
    pub fn set_writing(&self, writing: Writing) {
        self.writing.store(writing as u8, Ordering::SeqCst);
        self.fence.set_leads(writing != Writing::Refused);
    }

    /// Goes over from one state of a primary to the other; whether it was in the first.
    pub fn change_writing(&self, from: Writing, to: Writing) -> bool {
        let (from, to) = (from as u8, to as u8);
        self.writing.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Whether the primary that the node follows has everything that is here.
    pub fn is_same_line(&self) -> bool {
        self.same_line.load(Ordering::SeqCst)
    }

    /// Says whether the primary that the node follows has everything that is here.
    pub fn set_same_line(&self, same: bool) {
        self.same_line.store(same, Ordering::SeqCst);
    }

    /// The primary's clock is not known yet.
    pub fn forget_clock(&self) {
        self.clock_ahead_ms.store(UNKNOWN, Ordering::SeqCst);
    }

    /// The primary's clock said so when it sent what has just come.
    pub fn note_clock(&self, timestamp_ms: i64) {
        let ahead = (self.clock)().saturating_sub(timestamp_ms);
        self.clock_ahead_ms.fetch_min(ahead, Ordering::SeqCst);
    }

    /// Milliseconds since a moment of the primary's clock, as far as that is known.
    pub fn since(&self, timestamp_ms: i64) -> i64 {
        let ahead = Some(self.clock_ahead_ms.load(Ordering::SeqCst));
        let ahead = ahead.filter(|ahead| *ahead != UNKNOWN).unwrap_or(0);
        (self.clock)().saturating_sub(timestamp_ms).saturating_sub(ahead)
    }

    /// Whether clients share the pages of `-wal` and `-shm` with us.
    pub fn is_passthrough(&self) -> bool {
        self.passthrough.load(Ordering::Relaxed)
    }

    /// The file system is mounted.
    pub fn mounted(&self, page_cache: Arc<dyn PageCache>, passthrough: bool) {
        self.passthrough.store(passthrough, Ordering::Relaxed);
        // A second mount of one engine is not a thing.
        let _ = self.page_cache.set(page_cache);
    }

    /// The kernel, if something is mounted.
    pub fn page_cache(&self) -> Option<&dyn PageCache> {
        self.page_cache.get().map(|cache| &**cache)
    }

    /// The database `name` and its files appeared or went.
    pub fn names_changed(&self, name: &str) {
        let Some(cache) = self.page_cache() else { return };
        for kind in FileKind::ALL {
            cache.name_changed(&format!("{name}{}", kind.suffix()));
        }
    }

    /// Remembers the way to the primary.
    pub fn set_forward(&self, forward: Arc<dyn Forward>) {
        // Said once, at start-up.
        let _ = self.forward.set(forward);
    }

    /// The way to the primary, where the node has one.
    pub fn forward(&self) -> Option<Arc<dyn Forward>> {
        self.forward.get().cloned()
    }

    /// Remembers whom to ask for the stream to be opened again.
    pub fn on_reconnect(&self, request: Box<dyn Fn() + Send + Sync>) {
        // Asked for once, at start-up.
        let _ = self.reconnect.set(request);
    }

    /// Asks for the stream to be opened again.
    pub fn request_reconnect(&self) {
        if let Some(request) = self.reconnect.get() {
            request();
        }
    }

    /// Where writes should go, for the log.
    pub fn primary_hint(&self) -> String {
        self.primary_hint.lock().unwrap().clone()
    }

    /// Says where writes should go.
    pub fn set_primary_hint(&self, hint: String) {
        *self.primary_hint.lock().unwrap() = hint;
    }

    /// Whether the disk has too little room to begin a transaction.
    pub fn is_full(&self) -> bool {
        if let Some(known) = self.space.known() {
            return known;
        }
        let _looking = self.space.looking.lock().unwrap();
        if let Some(known) = self.space.known() {
            return known;
        }
        let was_full = self.space.is_full.load(Ordering::SeqCst);
        let free = os::free_space(&self.data_dir);
        let full = free < limits::FREE_SPACE_MIN;
        self.space.note(full);
        if full && !was_full {
            tracing::error!(free, path = %self.data_dir.display(), "disk full, writers are refused");
        }
        full
    }
}
