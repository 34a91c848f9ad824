//! The databases of one node.
//!
//! A kernel request reaches one [`db::Db`]: its lock table ([`locks`]), the capture of what it
//! committed ([`capture`]), the checksum of each page ([`checksum`]), the LTX files ([`chain`]), and
//! who wants to know ([`feed`]). What comes from a primary goes the other way ([`apply`]). Everything
//! here is synchronous; a database that fails does so alone.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ltx::{Compression, NodeId, Pos, Txid};

use self::layout::{DataDir, DbDir};
use self::shared::{Shared, Writing};
use crate::{limits, os};

pub mod error;
pub mod layout;
pub mod name;
#[cfg(any(test, fuzzing))]
pub(crate) mod properties;

pub mod apply;
pub mod backup;
pub mod brief;
pub mod capture;
pub mod chain;
pub mod checksum;
pub mod db;
pub mod feed;
pub mod fence;
pub mod files;
pub mod follow_on;
pub mod halt;
pub mod locks;
pub mod lost_found;
pub mod recover;
pub mod role;
pub mod shared;
pub mod snapshot;
mod sync;
pub mod times;
pub mod transaction;
pub mod unsynced;

pub use apply::Receiver;
pub use db::{Db, DbState};
pub use error::{Error, Result, chain_text};
pub use feed::{Event, EventWatch, Subscription};
pub use follow_on::{LtxBytes, Next, Overlap};
pub use name::{DbName, InvalidName};
pub use role::{Drained, PrimaryInfo, Role};
pub use shared::PageCache;

/// How many of its own ids a node remembers: as many starts as a year of weekly deployments.
const OWN_IDS_MAX: usize = 64;

/// What an engine is opened with.
pub struct Options {
    /// The data directory; made if it is missing.
    pub dir: PathBuf,
    /// Whether LTX files are compressed.
    pub compression: Compression,
    /// How long LTX files are kept; zero for ever.
    pub retention: Duration,
    /// How often old ones are looked for; zero never.
    pub retention_interval: Duration,
    /// Whether there is a backup, without which no file is removed.
    pub retain: Retain,
    /// Whether each commit is followed by a check of the whole database.
    pub strict_verify: bool,
    /// The id of this process.
    pub node_id: NodeId,
    /// The wall clock, in milliseconds since the Unix epoch.
    pub clock: Box<dyn Fn() -> i64 + Send + Sync>,
}

/// Which old LTX files may be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retain {
    /// All.
    Free,
    /// Those that end before the backup's high-water mark.
    BackedUp,
}

/// The id of a cluster: `LFSC` and 16 upper-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterId(String);

impl ClusterId {
    /// `text` as a cluster id; none unless it has 20 characters and the prefix.
    pub fn new(text: &str) -> Option<ClusterId> {
        (text.len() == 20 && text.starts_with("LFSC")).then(|| ClusterId(text.to_owned()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The databases of one node.
pub struct Engine {
    dir: DataDir,
    shared: Arc<Shared>,
    /// The databases by name.
    databases: RwLock<BTreeMap<DbName, Arc<Db>>>,
    /// What this node is.
    role: Mutex<Role>,
    /// The id of the cluster, once known.
    cluster_id: Mutex<Option<ClusterId>>,
    /// 0: primary. -1: never synced. Else when the last news came, in milliseconds since the epoch.
    lag_timestamp_ms: AtomicI64,
    /// When this node last stopped being primary.
    demoted: Mutex<Option<Instant>>,
    /// Ends the retention thread.
    stop: Arc<(Mutex<bool>, Condvar)>,
    retention: Mutex<Option<JoinHandle<()>>>,
    /// The thread outlives everything that queues work for it.
    writer: Mutex<Option<chain::Writer>>,
    /// Last: as long as this is open, no other process uses the data directory.
    lock: Mutex<Option<DirLock>>,
}

/// The lock of a data directory. It is given up, and not only closed, since a program that is just being
/// started has a copy of the descriptor for a moment, which would keep it.
struct DirLock(File);

impl Drop for DirLock {
    fn drop(&mut self) {
        // Where that fails, closing it does.
        let _ = self.0.unlock();
    }
}

impl Engine {
    /// Opens a data directory: every database in it is brought to one state. One that cannot be is
    /// left as it is and logged; the others work.
    pub fn open(options: Options) -> Result<Arc<Engine>> {
        let dir = DataDir::new(&options.dir);
        let lock = lock_directory(&dir)?;
        for path in [dir.databases(), dir.super_journals()] {
            os::create_dirs("engine:dir", &path)
                .map_err(Error::io("create data directory", &path))?;
        }
        os::sync_dir("engine:dir", dir.path())
            .map_err(Error::io("sync data directory", dir.path()))?;
        let writer = chain::Writer::start();
        let shared = Arc::new(Shared::new(shared::Settings {
            compression: options.compression,
            node_id: options.node_id,
            own_nodes: remember_own_id(&dir, options.node_id)?,
            clock: options.clock,
            strict_verify: options.strict_verify,
            data_dir: dir.path().to_owned(),
            writer: writer.waker(),
        }));
        let cluster_id = read_cluster_id(&dir)?;
        let databases = open_databases(&dir, &shared)?;
        let engine = Arc::new(Engine {
            dir,
            shared,
            databases: RwLock::new(databases),
            role: Mutex::new(Role::Unknown),
            cluster_id: Mutex::new(cluster_id),
            lag_timestamp_ms: AtomicI64::new(-1),
            demoted: Mutex::default(),
            stop: Arc::default(),
            retention: Mutex::default(),
            writer: Mutex::new(Some(writer)),
            lock: Mutex::new(Some(lock)),
        });
        engine.start_retention(options.retention, options.retention_interval, options.retain);
        Ok(engine)
    }

    /// The id of this process.
    pub fn node_id(&self) -> NodeId {
        self.shared.node_id
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        self.dir.path()
    }

    /// What all databases have in common.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The layout of the data directory.
    pub fn layout(&self) -> &DataDir {
        &self.dir
    }

    /// The id of the cluster, once known.
    pub fn cluster_id(&self) -> Option<ClusterId> {
        self.cluster_id.lock().unwrap().clone()
    }

    /// Makes `id` the id of the cluster, for good. Another one than before is an error.
    pub fn set_cluster_id(&self, id: &ClusterId) -> Result<()> {
        let mut known = self.cluster_id.lock().unwrap();
        match &*known {
            Some(have) if have == id => return Ok(()),
            Some(have) => {
                return Err(Error::ClusterId { have: have.to_string(), want: id.to_string() });
            }
            None => {}
        }
        let path = self.dir.cluster_id();
        os::write_atomic("engine:clusterid", &path, format!("{id}\n").as_bytes())
            .map_err(Error::io("write cluster id", &path))?;
        *known = Some(id.clone());
        Ok(())
    }

    /// The file system is mounted: how to tell the kernel of changes, and whether clients share the
    /// pages of `-wal` and `-shm` with us.
    pub fn mounted(&self, page_cache: Arc<dyn PageCache>, passthrough: bool) {
        self.shared.mounted(page_cache, passthrough);
        self.databases().iter().for_each(|db| db.role_changed());
    }

    /// The database of that name.
    pub fn database(&self, name: &str) -> Option<Arc<Db>> {
        self.databases.read().unwrap().get(name).cloned()
    }

    /// All databases, in the order of their names.
    pub fn databases(&self) -> Vec<Arc<Db>> {
        self.databases.read().unwrap().values().cloned().collect()
    }

    /// The database of that name, made (empty, and not in the mount yet) if there is none.
    pub fn database_or_new(&self, name: &DbName) -> Result<Arc<Db>> {
        if let Some(db) = self.database(name.as_str()) {
            return Ok(db);
        }
        let mut databases = self.databases.write().unwrap();
        if let Some(db) = databases.get(name) {
            return Ok(db.clone());
        }
        let db = open_database(&self.dir, &self.shared, name)?;
        databases.insert(name.clone(), db.clone());
        Ok(db)
    }

    /// Makes the names of all files durable that were made or removed.
    pub fn sync_names(&self) -> Result<()> {
        self.databases.read().unwrap().values().try_for_each(|db| db.files().sync_names())
    }

    /// Where each database stands, as a replica tells its primary.
    pub fn positions(&self) -> Vec<(DbName, Pos)> {
        self.databases().iter().map(|db| (db.name().clone(), db.received_pos())).collect()
    }

    /// A subscription to moving positions; `wake` is called when its dirty set becomes non-empty.
    pub fn subscribe(&self, wake: Box<dyn Fn() + Send + Sync>) -> Subscription {
        self.shared.feed.subscribe(wake)
    }

    /// How many subscriptions there are.
    pub fn subscriber_count(&self) -> usize {
        self.shared.feed.subscriber_count()
    }

    /// Calls `sink` for each event from now on.
    pub fn watch_events(&self, sink: Box<dyn Fn(&Event) + Send + Sync>) -> EventWatch {
        self.shared.feed.watch(sink)
    }

    /// A sink for one LTX file off the wire, for the database `name`, made if there is none.
    pub fn receive(&self, name: &DbName) -> Result<Receiver> {
        Ok(Receiver::new(self.database_or_new(name)?))
    }

    /// Called when a database needs the stream to be opened again, to get a snapshot.
    pub fn on_reconnect(&self, request: Box<dyn Fn() + Send + Sync>) {
        self.shared.on_reconnect(request);
    }

    /// Replaces the content of `name`, made if there is none, by that of a healthy SQLite file.
    pub fn import(&self, name: &DbName, file: &Path) -> Result<Pos> {
        if !self.shared.may_begin() {
            return Err(Error::NotPrimary);
        }
        self.database_or_new(name)?.import(file)
    }

    /// A stream to a primary begins, whose clock is not known yet.
    pub fn stream_began(&self) {
        self.shared.forget_clock();
    }

    /// A heartbeat, with the time of the primary's clock at which it was sent.
    pub fn heartbeat(&self, timestamp_ms: i64) {
        self.news(timestamp_ms);
        self.shared.note_clock(timestamp_ms);
    }

    /// Other news of the primary: a transaction's time.
    pub fn news(&self, timestamp_ms: i64) {
        self.lag_timestamp_ms.store(timestamp_ms.max(1), Ordering::SeqCst);
    }

    /// When the last news came: 0 on a primary, none before the first news.
    pub fn lag_timestamp_ms(&self) -> Option<i64> {
        Some(self.lag_timestamp_ms.load(Ordering::SeqCst)).filter(|timestamp| *timestamp >= 0)
    }

    /// Milliseconds since the last news, by the primary's clock as far as it is known; none before the
    /// first.
    pub fn lag_ms(&self) -> Option<i64> {
        match self.lag_timestamp_ms()? {
            0 => Some(0),
            timestamp => Some(self.shared.since(timestamp)),
        }
    }

    /// Milliseconds for which nothing was heard of a primary: the lag, and on a former primary that has
    /// heard of no other one the time since it was one.
    pub fn silence_ms(&self) -> Option<i64> {
        let alone = || self.demoted.lock().unwrap().map(|since| since.elapsed().as_millis());
        self.lag_ms().or_else(|| alone().map(|ms| i64::try_from(ms).unwrap_or(i64::MAX)))
    }

    /// Sets the backup's high-water mark of a database.
    pub fn set_hwm(&self, name: &DbName, txid: Txid) {
        if let Some(db) = self.database(name.as_str()) {
            db.set_hwm(txid);
        }
    }

    /// The backup's high-water mark of a database; zero without a backup.
    pub fn hwm(&self, name: &str) -> Txid {
        self.database(name).map_or(Txid(0), |db| db.hwm())
    }

    /// Stops: no write is granted any more, everything captured is written and durable, and the page
    /// checksums are saved for the next start. The mount must be gone.
    pub fn close(&self) -> Result<()> {
        // What is not captured yet was committed while it counted.
        self.shared.change_writing(Writing::Allowed, Writing::Finishing);
        *self.stop.0.lock().unwrap() = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.retention.lock().unwrap().take() {
            let _ = thread.join();
        }
        let mut result = Ok(());
        for db in self.databases() {
            if let Err(error) = db.close() {
                tracing::error!(db = %db.name(), error = chain_text(&error), "close database");
                result = Err(error);
            }
        }
        drop(self.writer.lock().unwrap().take());
        drop(self.lock.lock().unwrap().take());
        result
    }

    fn start_retention(
        self: &Arc<Engine>,
        retention: Duration,
        interval: Duration,
        retain: Retain,
    ) {
        if retention.is_zero() || interval.is_zero() {
            return;
        }
        let engine = Arc::downgrade(self);
        let stop = self.stop.clone();
        let thread = std::thread::Builder::new()
            .name("litefs-retain".into())
            .spawn(move || {
                while !wait_for_stop(&stop, interval) {
                    let Some(engine) = engine.upgrade() else { return };
                    for db in engine.databases() {
                        let keep_from = match retain {
                            Retain::Free => None,
                            Retain::BackedUp => Some(db.hwm()),
                        };
                        if let Err(error) = db.retain(retention, keep_from) {
                            tracing::warn!(db = %db.name(), error = chain_text(&error), "remove old ltx files");
                        }
                    }
                }
            })
            .expect("a thread can be started at start-up");
        *self.retention.lock().unwrap() = Some(thread);
    }
}

/// Waits for the interval; whether the end came.
fn wait_for_stop(stop: &(Mutex<bool>, Condvar), interval: Duration) -> bool {
    let end = Instant::now() + interval;
    let mut stopped = stop.0.lock().unwrap();
    while !*stopped {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        stopped = stop.1.wait_timeout(stopped, left).unwrap().0;
    }
    true
}

/// Makes the directory, if it is missing, and keeps other processes from using it as long as the file
/// is open: two that write one database would each destroy what the other has.
fn lock_directory(dir: &DataDir) -> Result<DirLock> {
    make_data_directory(dir.path())?;
    let path = dir.lock();
    let file = os::open_or_create("engine:lock", &path).map_err(Error::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(DirLock(file)),
        Err(TryLockError::WouldBlock) => Err(Error::InUse { dir: dir.path().to_owned() }),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", &path)(error)),
    }
}

/// Makes the data directory, for good: what is synced in it must be found again.
fn make_data_directory(path: &Path) -> Result<()> {
    let is_missing = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
    let made: Vec<&Path> = path.ancestors().take_while(is_missing).collect();
    os::create_dirs("engine:dir", path).map_err(Error::io("create data directory", path))?;
    for made in &made {
        os::sync_dir("engine:dir", parent(made))
            .map_err(Error::io("sync the parent of the data directory", made))?;
    }
    if made.is_empty()
        && let Err(error) = os::sync_dir("engine:dir", parent(path))
    {
        // A start that died may have made it; else it is not ours to make durable.
        tracing::debug!(path = %path.display(), %error, "sync the parent of the data directory");
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn open_databases(dir: &DataDir, shared: &Arc<Shared>) -> Result<BTreeMap<DbName, Arc<Db>>> {
    let path = dir.databases();
    let mut databases = BTreeMap::new();
    for entry in fs::read_dir(&path).map_err(Error::io("list databases", &path))? {
        let entry = entry.map_err(Error::io("list databases", &path))?;
        let name = entry.file_name();
        let Some(name) = name.to_str().and_then(|name| DbName::new(name).ok()) else {
            tracing::warn!(path = %entry.path().display(), "not a database: left alone");
            continue;
        };
        if !entry.path().is_dir() {
            tracing::warn!(path = %entry.path().display(), "not a directory: left alone");
            continue;
        }
        let db = open_database(dir, shared, &name).unwrap_or_else(|error| {
            let db_dir = dir.database(name.as_str());
            let db = Db::unopened(name.clone(), db_dir, shared.clone());
            db.fail_for_good(&error);
            db
        });
        databases.insert(name, db);
    }
    Ok(databases)
}

/// Opens one database. One that cannot be recovered is in the failed state from the start, its files
/// untouched.
fn open_database(dir: &DataDir, shared: &Arc<Shared>, name: &DbName) -> Result<Arc<Db>> {
    let db_dir = dir.database(name.as_str());
    make_directory(dir, &db_dir)?;
    let options = recover::Options {
        compression: shared.compression,
        node_id: shared.node_id,
        now_ms: (shared.clock)(),
    };
    let (recovered, failure) = match recover::recover(&db_dir, &dir.super_journals(), &options) {
        Ok(recovered) => (recovered, None),
        Err(source) => {
            (recover::Recovered::nothing(), Some(Error::Recover { db: name.clone(), source }))
        }
    };
    for path in &recovered.set_aside {
        tracing::warn!(db = %name, path = %path.display(), "set aside at start");
    }
    if !recovered.rebuilt.is_empty() {
        tracing::info!(db = %name, count = recovered.rebuilt.len(), pos = %recovered.pos, "rebuilt ltx files from the wal");
    }
    let db = Db::new(name.clone(), db_dir, shared.clone(), recovered)?;
    if let Some(error) = failure {
        db.fail_for_good(&error);
    }
    Ok(db)
}

/// Makes the directories of a database, for good: what is synced in them must be found again. As long
/// as there is no LTX file, they may be those of a start that died before they were durable.
fn make_directory(dir: &DataDir, db_dir: &DbDir) -> Result<()> {
    let path = db_dir.ltx();
    if fs::read_dir(&path).is_ok_and(|mut files| files.next().is_some()) {
        return Ok(());
    }
    os::create_dirs("engine:dir", &path)
        .and_then(|()| os::sync_dir("engine:dir", db_dir.path()))
        .and_then(|()| os::sync_dir("engine:dir", &dir.databases()))
        .map_err(Error::io("create database directory", &path))
}

fn read_cluster_id(dir: &DataDir) -> Result<Option<ClusterId>> {
    let path = dir.cluster_id();
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "invalid cluster id");
    match os::read_to_string("read:cluster-id", &path) {
        Ok(text) => match ClusterId::new(text.trim()) {
            Some(id) => Ok(Some(id)),
            None => Err(Error::io("read cluster id", &path)(invalid())),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read cluster id", &path)(error)),
    }
}

/// The ids that this data directory's node has had, this process's included: LTX files by one of
/// them may hold what no other node has.
fn remember_own_id(dir: &DataDir, id: NodeId) -> Result<HashSet<NodeId>> {
    let path = dir.node_ids();
    let text = match os::read_to_string("read:node-ids", &path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(Error::io("read node ids", &path)(error)),
    };
    let mut ids: Vec<NodeId> = text.lines().filter_map(|line| line.parse().ok()).collect();
    ids.push(id);
    let skip = ids.len().saturating_sub(OWN_IDS_MAX);
    let new: String = ids[skip..].iter().map(|id| format!("{id}\n")).collect();
    os::write_atomic("engine:node-ids", &path, new.as_bytes())
        .or_else(|error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded if !text.is_empty() => {
                write_own_id_in_place(&path, &text, skip > 0, id)
            }
            _ => Err(error),
        })
        .map_err(Error::io("write node ids", &path))?;
    Ok(ids.into_iter().collect())
}

/// Puts an id where the file of ids, which holds `text`, has room already: behind the others, or, if
/// there are enough, over the first one. A start on a full disk must not fail.
fn write_own_id_in_place(path: &Path, text: &str, enough: bool, id: NodeId) -> io::Result<()> {
    let line = match text.ends_with('\n') {
        true => format!("{id}\n"),
        false => format!("\n{id}\n"),
    };
    let offset = if enough { 0 } else { text.len() as u64 };
    let file = os::open("engine:node-ids", path)?;
    os::write_at("engine:node-ids", &file, line.as_bytes(), offset)?;
    os::sync("engine:node-ids", &file)
}

#[cfg(test)]
mod tests {
    use super::properties::open;

    /// As a program has one that is just being started.
    #[test]
    fn a_copy_of_the_lock_keeps_nobody_out_after_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path()).unwrap();
        let copy = engine.lock.lock().unwrap().as_ref().unwrap().0.try_clone().unwrap();
        engine.close().unwrap();
        open(dir.path()).unwrap();
        drop(copy);
    }
}
