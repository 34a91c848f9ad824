//! Who has a WAL open whose bytes go past us.
//!
//! A replica that writes under a HALT lock holds back the last bytes of each commit until the primary
//! has it; so its writer must have the WAL open without passthrough. How a file is open cannot be
//! changed later: where HALT locks are used, replicas open the WAL directly, and a process that has
//! it open with passthrough from before does not get the WRITE lock. It is known by the process that
//! opened the file; the connection that it belongs to must not be used by another one (SQLite, "How
//! To Corrupt An SQLite Database File", 2.6). Where the process is not known, nobody gets WRITE.

use std::sync::Mutex;

use fuse::Caller;

use crate::engine::db::Db;
use crate::engine::locks::{Handle, LockKind, Request};
use crate::sqlite::lock_byte::Lock;

/// The open files of all databases that are written past us.
#[derive(Default)]
pub struct Past {
    handles: Mutex<Vec<Open>>,
}

struct Open {
    handle: Handle,
    /// The name of the database.
    db: String,
    /// Who opened it, if that is known.
    process: Option<Caller>,
}

impl Past {
    /// Whether a thread may open the WAL with passthrough, which is noted.
    pub fn admit(&self, db: &Db, handle: Handle, thread: Caller) -> bool {
        let process = process_of(thread);
        // Under the lock: who asks for WRITE later finds either the handle or none.
        let mut handles = self.handles.lock().unwrap();
        if db.opens_wal_directly() {
            return false;
        }
        handles.push(Open { handle, db: db.name().to_string(), process });
        true
    }

    /// An open file was closed.
    pub fn forget(&self, handle: Handle) {
        self.handles.lock().unwrap().retain(|open| open.handle != handle);
    }

    /// Whether a call asks for a WRITE lock under which frames might be written past us.
    pub fn writes_past(&self, db: &Db, request: &Request, process: Caller) -> bool {
        let writes = request.kind == LockKind::Exclusive && request.set.contains(Lock::Write);
        if !writes || db.is_local() || !db.is_borrowed() {
            return false;
        }
        let handles = self.handles.lock().unwrap();
        let name = db.name().as_str();
        let mut of_db = handles.iter().filter(|open| open.db == name);
        let found = of_db.find(|open| open.process.is_none_or(|opener| opener == process));
        let Some(open) = found else { return false };
        db.note_write_past(open.process.map(|process| process.0));
        true
    }
}

/// The process of a thread.
fn process_of(thread: Caller) -> Option<Caller> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", thread.0)).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    line.trim().parse().ok().map(Caller)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_belong_to_their_process() {
        let process = Some(Caller(std::process::id()));
        assert_eq!(process_of(Caller(std::process::id())), process);
        let thread = std::thread::spawn(|| nix::unistd::gettid().as_raw().cast_unsigned());
        // Its number is not given to another thread so soon; a thread that is gone has no process.
        let id = thread.join().unwrap();
        assert!(process_of(Caller(id)).is_none_or(|found| Some(found) == process));
        assert_eq!(process_of(Caller(0)), None);
    }
}
