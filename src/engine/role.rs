//! What a node is, and how it becomes something else without losing or mixing up a transaction.
//!
//! ```text
//! Allowed --- stop_writes ---> Finishing --- set_role ---> Refused --- set_role ---> Allowed
//! ```
//!
//! A primary that is to be none first grants no write lock any more, and waits for those who have one:
//! what they commit still is a transaction of this primary. Then everything is refused, and only then
//! the role changes. Who holds a write lock even then gets an error when it commits, or, where that
//! cannot be (a WAL that clients write past us), what it commits is set aside ([`super::capture`]).
//!
//! A replica that becomes primary has received transactions that it may not have applied yet: each
//! database takes writers as soon as its own are ([`super::apply`]).

use std::time::{Duration, Instant};

use ltx::Pos;

use super::feed::Event;
use super::files::FileKind;
use super::name::DbName;
use super::shared::Writing;
use super::{Engine, limits};

use std::sync::atomic::Ordering;

/// Where the primary is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrimaryInfo {
    /// Its host name.
    pub hostname: String,
    /// The URL of its HTTP API.
    pub advertise_url: String,
}

/// What this node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It may write.
    Primary,
    /// Another node is the primary.
    Replica(PrimaryInfo),
    /// Nobody is known to be the primary.
    Unknown,
}

/// What is left when no write lock is granted any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drained {
    /// Where each database stands.
    pub positions: Vec<(DbName, Pos)>,
    /// The databases that may still move: an application holds a write lock, or what one has committed
    /// could not be captured.
    pub unfinished: Vec<DbName>,
}

impl Engine {
    /// What this node is.
    pub fn role(&self) -> Role {
        self.role.lock().unwrap().clone()
    }

    /// Grants no write lock from here on, and waits, `limit` long at most, until nobody holds one.
    /// Meanwhile and afterwards the node is what it was, and sends what was committed; writers get
    /// SQLITE_BUSY. [`Engine::set_role`] or [`Engine::resume_writes`] ends that.
    ///
    /// With nothing `unfinished`, the positions stay what they are.
    pub fn stop_writes(&self, limit: Duration) -> Drained {
        let end = Instant::now() + limit;
        self.shared.change_writing(Writing::Allowed, Writing::Finishing);
        let databases = self.databases();
        for db in &databases {
            db.take_back(None, "this node stops being primary");
        }
        let left = || end.saturating_duration_since(Instant::now());
        let unfinished = databases.iter().filter(|db| !db.drain(left()));
        let unfinished = unfinished.map(|db| db.name().clone()).collect();
        let positions = databases.iter().map(|db| (db.name().clone(), db.pos())).collect();
        Drained { positions, unfinished }
    }

    /// Takes [`Engine::stop_writes`] back: the node stays primary.
    pub fn resume_writes(&self) {
        if self.shared.change_writing(Writing::Finishing, Writing::Allowed) {
            self.shared.feed.emit(&Event::WritesResumed);
        }
    }

    /// Whether this node, still primary, grants no write lock: another one is about to be primary.
    pub fn has_stopped_writes(&self) -> bool {
        self.shared.writing() == Writing::Finishing
    }

    /// Changes what this node is. One task alone does that.
    ///
    /// A primary that becomes something else waits [`limits::DEMOTION_WAIT`] at most for those who are
    /// writing; who wants to give them more time calls [`Engine::stop_writes`] before.
    pub fn set_role(&self, role: Role) {
        if self.role() == role {
            return;
        }
        let primary = role == Role::Primary;
        self.end_writes();
        self.shared.set_primary_hint(match &role {
            Role::Replica(info) => format!("{} {}", info.hostname, info.advertise_url),
            _ => String::new(),
        });
        if primary {
            self.lag_timestamp_ms.store(0, Ordering::SeqCst);
        } else {
            // A former primary has had no news yet; on a replica the last news only grow older.
            let (news, mut demoted) = (&self.lag_timestamp_ms, self.demoted.lock().unwrap());
            if news.compare_exchange(0, -1, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                *demoted = Some(Instant::now());
            }
        }
        if primary {
            self.shared.set_writing(Writing::Allowed);
        }
        *self.role.lock().unwrap() = role.clone();
        for db in self.databases() {
            if db.end_borrow(None) {
                tracing::warn!(db = %db.name(), "halt lock ended: this node has another primary now");
            }
            db.role_changed();
        }
        self.attributes_changed();
        self.shared.feed.emit(&Event::PrimaryChange {
            is_primary: primary,
            hostname: match role {
                Role::Replica(info) => Some(info.hostname),
                _ => None,
            },
        });
        if let Some(cache) = self.shared.page_cache() {
            cache.name_changed(".primary");
        }
    }

    /// From here on nothing that an application does counts.
    fn end_writes(&self) {
        let limit = match self.shared.writing() {
            // Without a lease nobody can finish, and who stopped the writes before has waited.
            Writing::Allowed if self.shared.fence.is_open() => limits::DEMOTION_WAIT,
            Writing::Allowed | Writing::Finishing => Duration::ZERO,
            Writing::Refused => return,
        };
        for name in self.stop_writes(limit).unfinished {
            tracing::warn!(db = %name, "an application holds its write lock while this node stops being primary: what it commits now is refused or set aside");
        }
        self.shared.set_writing(Writing::Refused);
        // What is being captured in this very moment still counts.
        self.databases().iter().for_each(|db| db.finish_capture());
    }

    /// The permission bits of the databases depend on the role.
    fn attributes_changed(&self) {
        let Some(cache) = self.shared.page_cache() else { return };
        for db in self.databases() {
            if let Some(database) = db.files().get(FileKind::Database) {
                cache.attr_changed(database.ino);
            }
        }
    }
}
