//! The backup: a second copy of the databases elsewhere, kept by the primary.
//!
//! ```text
//! positions -> each database: what it needs (engine) -> send, or restore -> wait for changes -.
//!     ^  `-------------------------------<----------------------------------------------------+
//!     `--- every full-sync-interval, and after whatever failed --------------------------------'
//! ```
//!
//! Invariants: only a node whose lease counts at that moment sends anything; what is sent follows on the
//! position that the backup was last seen at, which it checks; a database that cannot be backed up does not
//! hold up the others.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ltx::{Pos, Txid};
use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::pace::{Backoff, Reports};
use crate::engine::backup::{Need, Upload};
use crate::engine::{self, DbName, DbState, Engine, Subscription, chain_text};
use crate::http::{Stop, stopped};
use crate::limits;

pub mod begun;
pub mod cloud;
pub mod directory;

use begun::Begun;
use cloud::Cloud;
use directory::Directory;

/// Why a server is sent nothing more of a database: it merges files, which have one page size, and no call
/// of its protocol begins a database anew.
const OTHER_PAGE_SIZE: &str = "the page size has changed, and a server cannot merge the two: \
     remove the database there or set another backup.cluster, and it is sent as a whole";

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the directory.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The directory itself.
    #[error("backup directory {} is missing: mount its disk, or create it to begin a new backup", path.display())]
    Missing {
        /// It.
        path: PathBuf,
    },
    /// A file of the directory that is no LTX file, or does not go on from the one before.
    #[error("read {}", path.display())]
    Ltx {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: ltx::Error,
    },
    /// A call to the server.
    #[error(transparent)]
    Cloud(#[from] cloud::Error),
    /// A thread died.
    #[error("backup thread failed")]
    Thread(#[from] tokio::task::JoinError),
    /// What concerns one database of this node only.
    #[error(transparent)]
    Database(#[from] engine::Error),
    /// A database of the backup of which nobody knows where it stands: in words, why.
    #[error("its backup cannot be read, and is left as it is: {0}")]
    Unreadable(String),
    /// The backup is elsewhere each time that it is written to.
    #[error("the backup moved to {0} while it was written to: is another node writing to it?")]
    Moved(Pos),
}

impl Error {
    /// Whether it concerns one database only, so that the others go on.
    fn is_of_one_database(&self) -> bool {
        match self {
            Error::Database(_) | Error::Unreadable(_) | Error::Ltx { .. } | Error::Moved(_) => true,
            Error::Missing { .. } | Error::Io { .. } | Error::Cloud(_) | Error::Thread(_) => false,
        }
    }

    fn io<'a>(
        what: &'static str,
        path: &'a std::path::Path,
    ) -> impl FnOnce(std::io::Error) -> Error + 'a {
        move |source| Error::Io { what, path: path.to_owned(), source }
    }
}

/// Where the backup is.
pub enum Store {
    /// A directory of LTX files.
    Directory(Arc<Directory>),
    /// A server.
    Cloud(Box<Cloud>),
}

/// What came of a file that was sent.
pub enum Written {
    /// It was taken.
    Taken {
        /// Everything before this transaction is durable.
        hwm: Txid,
    },
    /// The backup stands elsewhere.
    Mismatch(Pos),
    /// It was not to be sent any more.
    NotNow,
}

/// Whether something may be sent at this moment.
type MaySend = Box<dyn Fn() -> bool + Send>;

/// Where the backup of each database stands; or, in words, why nobody knows.
type Positions = BTreeMap<String, Result<Pos, String>>;

impl Store {
    /// A directory of LTX files.
    pub fn directory(path: PathBuf) -> Store {
        Store::Directory(Arc::new(Directory::new(path)))
    }

    /// A server.
    pub fn cloud(cloud: Cloud) -> Store {
        Store::Cloud(Box::new(cloud))
    }

    async fn positions(&self) -> Result<Positions, Error> {
        match self {
            Store::Directory(directory) => {
                let directory = directory.clone();
                let found = spawn_blocking(move || directory.positions()).await??;
                let in_words = |pos: Result<Pos, Error>| pos.map_err(|error| chain_text(&error));
                Ok(found.into_iter().map(|(name, pos)| (name, in_words(pos))).collect())
            }
            Store::Cloud(cloud) => {
                let found = cloud.positions().await?;
                Ok(found.into_iter().map(|(name, pos)| (name, Ok(pos))).collect())
            }
        }
    }

    /// Sends a file. A call to a server ends when nobody waits for it; a thread goes on, and asks.
    async fn write(
        &self,
        name: &DbName,
        upload: Upload,
        may_send: MaySend,
    ) -> Result<Written, Error> {
        match self {
            Store::Directory(directory) => {
                let (directory, name) = (directory.clone(), name.clone());
                spawn_blocking(move || directory.write(&name, &upload, &may_send)).await?
            }
            Store::Cloud(cloud) => Ok(cloud.write(name, upload).await?),
        }
    }

    /// Writes the backup's snapshot of a database to `receiver`.
    async fn fetch(
        &self,
        name: &DbName,
        mut receiver: engine::Receiver,
    ) -> Result<engine::Receiver, Error> {
        match self {
            Store::Directory(directory) => {
                let (directory, name) = (directory.clone(), name.clone());
                let fetch = move || directory.snapshot(&name, &mut receiver).map(|()| receiver);
                spawn_blocking(fetch).await?
            }
            Store::Cloud(cloud) => Ok(cloud.snapshot(name, receiver).await?),
        }
    }

    /// Whether a database may change its page size there.
    fn takes_other_page_sizes(&self) -> bool {
        matches!(self, Store::Directory(_))
    }
}

impl std::fmt::Display for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Store::Directory(directory) => write!(f, "file://{}", directory.path().display()),
            Store::Cloud(cloud) => cloud.url().fmt(f),
        }
    }
}

/// How often something is done.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How long changes are gathered before they are sent.
    pub delay: Duration,
    /// How often the backup is asked where it stands.
    pub full_sync: Duration,
}

/// The task that keeps a backup.
pub struct Backup {
    engine: Arc<Engine>,
    store: Store,
    timing: Timing,
    /// Whether this node is the primary.
    leads: watch::Receiver<bool>,
    /// The backup was reached, and what this node lacked of it was restored.
    settled: watch::Sender<bool>,
    begun: Begun,
    /// Databases that had failed at the start: nothing is restored over them and nobody can begin them
    /// anew, so they are not waited for.
    failed: BTreeSet<DbName>,
    backoff: Backoff,
    reports: Reports,
    failing: bool,
}

/// One primaryship.
struct Session {
    subscription: Subscription,
    woken: Arc<Notify>,
    positions: Positions,
    /// What is to be compared with it.
    dirty: BTreeSet<String>,
    full_sync: Instant,
    /// Goes with it: what was begun in it is not finished in another one.
    lives: Arc<()>,
}

impl Backup {
    /// A task that works whenever `leads` says so, and whether it was through once.
    pub fn new(
        engine: Arc<Engine>,
        store: Store,
        timing: Timing,
        leads: watch::Receiver<bool>,
    ) -> (Backup, watch::Receiver<bool>) {
        let (settled, is_settled) = watch::channel(false);
        let databases = engine.databases();
        let failed = databases.iter().filter(|db| matches!(db.state(), DbState::Failed(_)));
        let backup = Backup {
            begun: Begun::new(engine.layout()),
            failed: failed.map(|db| db.name().clone()).collect(),
            engine,
            store,
            timing,
            leads,
            settled,
            backoff: Backoff::new(limits::BACKUP_PAUSE_MAX),
            reports: Reports::default(),
            failing: false,
        };
        (backup, is_settled)
    }

    /// Keeps the backup until `stop`; then everything that was committed is sent, if this node is still
    /// the primary and the backup can be reached soon.
    pub async fn run(mut self, mut stop: Stop) {
        loop {
            let mut leads = self.leads.clone();
            tokio::select! {
                known = is_now(&mut leads, true) => if !known { return },
                () = stopped(&mut stop) => return,
            }
            let mut session = Session::new(&self.engine);
            let worked = tokio::select! {
                worked = self.work(&mut session) => Some(worked),
                _ = is_now(&mut leads, false) => None,
                () = stopped(&mut stop) => return self.finish(session).await,
            };
            let Some(Err(error)) = worked else { continue };
            self.failed(&error);
            tokio::select! {
                () = sleep(self.backoff.next()) => {}
                () = stopped(&mut stop) => return self.finish(session).await,
            }
        }
    }

    fn failed(&mut self, error: &Error) {
        self.failing = true;
        self.engine.shared().backup.errors.fetch_add(1, Ordering::Relaxed);
        let text = chain_text(error);
        self.reports.warn(&text, format_args!("backup to {} failed, retrying: {text}", self.store));
    }

    /// Sends what was committed before the end.
    async fn finish(mut self, mut session: Session) {
        if !*self.leads.borrow() {
            return;
        }
        session.dirty.clear();
        let sync = async {
            self.refresh(&mut session).await?;
            self.round(&mut session).await
        };
        match timeout(limits::BACKUP_END_WAIT, sync).await {
            Ok(Ok(())) if session.dirty.is_empty() => {}
            Ok(Ok(())) => tracing::warn!("the last changes are not in the backup"),
            Ok(Err(error)) => {
                let text = chain_text(&error);
                tracing::warn!("the last changes are not in the backup: {text}");
            }
            Err(_) => tracing::warn!("the last changes are not in the backup: it took too long"),
        }
    }

    /// Keeps the backup up to date until something fails.
    async fn work(&mut self, session: &mut Session) -> Result<(), Error> {
        self.refresh(session).await?;
        loop {
            self.round(session).await?;
            self.note_success(session);
            self.note_restored(session).await?;
            if self.wait(session).await == Due::FullSync {
                self.refresh(session).await?;
            }
        }
    }

    /// Asks where the backup stands; everything is to be compared with it.
    async fn refresh(&mut self, session: &mut Session) -> Result<(), Error> {
        session.positions = self.store.positions().await?;
        let local = self.engine.databases();
        let local = local.iter().map(|db| db.name().to_string());
        session.dirty.extend(session.positions.keys().cloned().chain(local));
        session.full_sync = Instant::now() + self.timing.full_sync;
        Ok(())
    }

    fn note_success(&mut self, session: &Session) {
        if std::mem::take(&mut self.failing) {
            tracing::info!("backup to {} works again", self.store);
        }
        self.backoff.reset();
        let databases = self.engine.databases();
        let is_stalled = databases.iter().any(|db| db.backup_problem().is_some());
        if session.dirty.is_empty() && !is_stalled {
            let now = (self.engine.shared().clock)();
            self.engine.shared().backup.complete_ms.store(now, Ordering::Relaxed);
        }
    }

    /// Says that this node has what its backup has, once that is so: an application could begin another
    /// history of what is missing.
    async fn note_restored(&self, session: &Session) -> Result<(), Error> {
        let mut has_any = session.positions.iter().filter(|(_, pos)| **pos != Ok(Pos::ZERO));
        if has_any.any(|(name, _)| self.lacks(name)) {
            return Ok(());
        }
        let begun = self.begun.clone();
        spawn_blocking(move || begun.forget()).await??;
        self.settled.send_replace(true);
        Ok(())
    }

    /// Whether a database of the backup is still to be restored here.
    fn lacks(&self, name: &str) -> bool {
        let Ok(name) = DbName::new(name) else { return false };
        let db = self.engine.database(name.as_str());
        !self.failed.contains(&name) && db.is_none_or(|db| db.pos().is_zero())
    }

    /// Waits for changes, and lets them gather; or until the backup is to be asked where it stands.
    async fn wait(&self, session: &mut Session) -> Due {
        let retry =
            if session.dirty.is_empty() { self.timing.full_sync } else { limits::BACKUP_RETRY };
        let due = tokio::select! {
            () = session.woken.notified() => Due::Changes,
            () = sleep(retry.min(self.timing.full_sync)) => Due::Changes,
            () = sleep_until(session.full_sync) => return Due::FullSync,
        };
        sleep(self.timing.delay).await;
        let changed = session.subscription.take();
        session.dirty.extend(changed.iter().map(|name| name.to_string()));
        // Constant writes must not keep it from being looked at.
        if Instant::now() >= session.full_sync { Due::FullSync } else { due }
    }

    /// Brings the backup of each dirty database up to date. What could not be done stays dirty.
    async fn round(&mut self, session: &mut Session) -> Result<(), Error> {
        for name in std::mem::take(&mut session.dirty) {
            let synced = match DbName::new(&name) {
                Ok(name) => self.sync(session, &name).await,
                Err(error) => {
                    self.reports.warn(&name, format_args!("left out what the backup has: {error}"));
                    continue;
                }
            };
            match synced {
                Ok(Synced::Yes) => {}
                Ok(Synced::NotNow) => _ = session.dirty.insert(name),
                Err(error) if error.is_of_one_database() => {
                    self.engine.shared().backup.errors.fetch_add(1, Ordering::Relaxed);
                    let text = format!("{name}: not backed up for now: {}", chain_text(&error));
                    self.reports.warn(&text, format_args!("{text}"));
                    session.dirty.insert(name);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Brings the backup of one database to where the database stands now.
    async fn sync(&mut self, session: &mut Session, name: &DbName) -> Result<Synced, Error> {
        let target = self.engine.database(name.as_str()).map_or(Txid(0), |db| db.pos().txid);
        let mut was_elsewhere = false;
        loop {
            // A node that does not know whether it is still the primary must not move the backup.
            if !self.engine.shared().may_begin() {
                return Ok(Synced::NotNow);
            }
            let remote = session.positions.get(name.as_str()).cloned();
            let remote = remote.unwrap_or(Ok(Pos::ZERO)).map_err(Error::Unreadable)?;
            match self.need(name, remote).await? {
                Need::Nothing => return Ok(self.settle(name, None)),
                Need::Diverged(why) => return Ok(self.settle(name, Some(why))),
                Need::Restore(local) => {
                    let pos = self.restore(name, local).await?;
                    session.positions.insert(name.to_string(), Ok(pos));
                }
                Need::Upload(upload) if upload.resized && !self.store.takes_other_page_sizes() => {
                    return Ok(self.settle(name, Some(OTHER_PAGE_SIZE.to_owned())));
                }
                Need::Upload(upload) => {
                    let (pos, page_size) = (upload.pos, upload.header.page_size);
                    let page_size = (upload.header.commit > 0).then_some(page_size);
                    match self.store.write(name, upload, self.may_send(session)).await? {
                        Written::NotNow => return Ok(Synced::NotNow),
                        Written::Taken { hwm } => {
                            session.positions.insert(name.to_string(), Ok(pos));
                            self.note_backed(name, pos, hwm, page_size).await?;
                            self.settle(name, None);
                            if pos.txid >= target {
                                return Ok(Synced::Yes);
                            }
                        }
                        Written::Mismatch(at) if was_elsewhere => return Err(Error::Moved(at)),
                        Written::Mismatch(at) => {
                            was_elsewhere = true;
                            session.positions.insert(name.to_string(), Ok(at));
                        }
                    }
                }
            }
        }
    }

    /// Whether what is sent in this session may be sent still, for as long as that takes.
    fn may_send(&self, session: &Session) -> MaySend {
        let (engine, lives) = (self.engine.clone(), Arc::downgrade(&session.lives));
        Box::new(move || lives.strong_count() > 0 && engine.shared().may_begin())
    }

    async fn need(&self, name: &DbName, remote: Pos) -> Result<Need, Error> {
        match self.engine.database(name.as_str()) {
            Some(db) => Ok(spawn_blocking(move || db.backup_need(remote)).await??),
            None if remote.is_zero() => Ok(Need::Nothing),
            None => Ok(Need::Restore(Pos::ZERO)),
        }
    }

    /// Notes that a backup stands still, and why, or that it does not.
    fn settle(&self, name: &DbName, problem: Option<String>) -> Synced {
        let Some(db) = self.engine.database(name.as_str()) else { return Synced::Yes };
        let text = problem.clone();
        match (db.set_backup_problem(problem), text) {
            (true, Some(why)) => tracing::error!(
                db = %name,
                why,
                "backup stands still: nothing is sent and nothing is overwritten until somebody decides which one counts; see \"Backup\" in docs/operations.md"
            ),
            (true, None) => tracing::info!(db = %name, "backup goes on"),
            (false, _) => {}
        }
        Synced::Yes
    }

    async fn note_backed(
        &self,
        name: &DbName,
        pos: Pos,
        hwm: Txid,
        page_size: Option<ltx::PageSize>,
    ) -> Result<(), Error> {
        let Some(db) = self.engine.database(name.as_str()) else { return Ok(()) };
        tracing::debug!(db = %name, %pos, "backed up");
        Ok(spawn_blocking(move || db.set_backed(pos, hwm, page_size)).await??)
    }

    /// Takes over what the backup has; where that stands.
    async fn restore(&self, name: &DbName, local: Pos) -> Result<Pos, Error> {
        if has_no_data(&self.engine) {
            let begun = self.begun.clone();
            spawn_blocking(move || begun.note()).await??;
        }
        let (engine, db) = (self.engine.clone(), name.clone());
        let receiver = spawn_blocking(move || engine.receive(&db)).await??;
        let receiver = self.store.fetch(name, receiver).await?;
        let pos = spawn_blocking(move || receiver.finish_restore(local)).await??;
        tracing::info!(db = %name, from = %local, to = %pos, "restored from the backup");
        Ok(pos)
    }
}

/// Whether nothing was ever committed in any database of this node.
pub fn has_no_data(engine: &Engine) -> bool {
    engine.databases().iter().all(|db| db.pos().is_zero())
}

/// Waits until `value` is `wanted`; false if it cannot be any more.
async fn is_now(value: &mut watch::Receiver<bool>, wanted: bool) -> bool {
    value.wait_for(|value| *value == wanted).await.is_ok()
}

/// What is to be done after a wait.
#[derive(Debug, PartialEq, Eq)]
enum Due {
    Changes,
    FullSync,
}

/// Whether a database was looked at.
enum Synced {
    Yes,
    NotNow,
}

impl Session {
    fn new(engine: &Engine) -> Session {
        let woken = Arc::new(Notify::new());
        let wake = woken.clone();
        Session {
            subscription: engine.subscribe(Box::new(move || wake.notify_one())),
            woken,
            positions: BTreeMap::new(),
            dirty: BTreeSet::new(),
            full_sync: Instant::now(),
            lives: Arc::new(()),
        }
    }
}
