//! Lock calls on `NAME-lock`: the HALT lock.
//!
//! Byte 72 alone, by F_SETLKW or F_OFD_SETLKW with a write lock; other ranges are EINVAL, other calls
//! ENOSYS, a second lock through one open file ENOLCK. The lock belongs to the open file, through
//! however many descriptors: it ends when it is unlocked through one of them, or when the last one is
//! closed. On the primary it is nothing.

use std::sync::{Arc, Mutex};

use fuse::{Conflict, Errno, LockCall, LockKind, Range, Reply, Wait, WaitId};

use super::{EngineVolume, OpenFile, Waiting, refused};
use crate::engine::db::Db;
use crate::engine::halt::HaltId;

/// The byte that is locked.
const HALT: Range = Range { start: 72, end: 72 };

/// The lock that was taken through an open file.
#[derive(Default)]
pub struct Held(Mutex<State>);

#[derive(Default, Clone, Copy)]
enum State {
    #[default]
    Nothing,
    /// It was asked for, or is held.
    Lock(HaltId),
    /// It is on its way back.
    Releasing,
}

impl Held {
    fn set(&self, state: State) {
        *self.0.lock().unwrap() = state;
    }

    /// Takes a lock out, to give it back.
    fn take(&self) -> Option<HaltId> {
        let mut state = self.0.lock().unwrap();
        let State::Lock(id) = *state else { return None };
        *state = State::Releasing;
        Some(id)
    }
}

/// Who stands in the way: the node, whoever holds its lock.
pub fn query(db: &Db, range: Range) -> Result<Option<Conflict>, Errno> {
    if range != HALT {
        return Err(Errno::EINVAL);
    }
    Ok(db.is_borrowed().then_some(Conflict { range: HALT, kind: LockKind::Exclusive }))
}

impl EngineVolume {
    /// The lock file is opened: from here on a WAL is opened so that its writer can be held back.
    pub(super) fn expect_halt(&self, db: &Db) -> Result<(), Errno> {
        db.expect_borrow().map_err(|error| refused(error.into()))
    }

    /// A lock call on a lock file.
    pub(super) fn halt_call(
        &self,
        file: &Arc<OpenFile>,
        db: &Arc<Db>,
        call: LockCall,
        wait: Wait,
        reply: Reply<()>,
    ) {
        if call.range != HALT {
            return reply.send(Err(Errno::EINVAL));
        }
        match (call.kind, wait) {
            (LockKind::Unlock, _) => self.unhalt(file, db, move || reply.send(Ok(()))),
            (LockKind::Exclusive, Wait::Yes(wait)) => self.halt(file, db, wait, reply),
            _ => reply.send(Err(Errno::ENOSYS)),
        }
    }

    fn halt(&self, file: &Arc<OpenFile>, db: &Arc<Db>, wait: WaitId, reply: Reply<()>) {
        let mut state = file.halt.0.lock().unwrap();
        if !matches!(*state, State::Nothing) {
            drop(state);
            return reply.send(Err(Errno::ENOLCK));
        }
        if db.is_local() {
            drop(state);
            return reply.send(Ok(()));
        }
        let (Some(forward), Ok(id)) = (self.engine.shared().forward(), draw()) else {
            drop(state);
            return reply.send(Err(Errno::EIO));
        };
        *state = State::Lock(id);
        drop(state);
        self.waiting.lock().unwrap().insert(wait.0, Waiting::Halt(id));
        let (file, waiting) = (file.clone(), self.waiting.clone());
        let answer = move |result: Result<(), _>| {
            waiting.lock().unwrap().remove(&wait.0);
            if result.is_err() {
                file.halt.set(State::Nothing);
            }
            reply.send(result.map_err(refused));
        };
        forward.acquire(db.clone(), id, Box::new(answer));
    }

    /// Gives the lock back, or no longer waits for it.
    fn unhalt(&self, file: &Arc<OpenFile>, db: &Arc<Db>, done: impl FnOnce() + Send + 'static) {
        let (Some(id), Some(forward)) = (file.halt.take(), self.engine.shared().forward()) else {
            return done();
        };
        // One that still waits is told so, and what it gets in this moment is given back.
        forward.cancel(id);
        let file = file.clone();
        let answer = move |_| {
            file.halt.set(State::Nothing);
            done();
        };
        forward.release(db.clone(), id, Box::new(answer));
    }

    /// The lock file is closed for good.
    pub(super) fn close_halt(&self, file: &Arc<OpenFile>, db: &Arc<Db>) {
        self.unhalt(file, db, || {});
    }
}

/// A number that names the lock: positive.
fn draw() -> Result<HaltId, getrandom::Error> {
    let drawn = getrandom::u64()? >> 1;
    Ok(HaltId(drawn.max(1).cast_signed()))
}
