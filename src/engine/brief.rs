//! The ends of waits for the engine itself: a lock call that does not wait for other clients is kept for
//! [`limits::ENGINE_LOCK_WAIT`] at the most.
//!
//! A thread of its own ends them, and is there only while there are such calls.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Instant;

use super::db::Db;
use crate::{limits, threads};

/// The calls that wait, the oldest first.
#[derive(Default)]
pub struct Brief {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waits: VecDeque<Wait>,
    /// Whether the thread is there.
    runs: bool,
}

/// A call that waits, or was answered already.
struct Wait {
    end: Instant,
    db: Weak<Db>,
    id: u64,
}

impl Brief {
    /// From now on the call `id` of a database has [`limits::ENGINE_LOCK_WAIT`].
    ///
    /// # Errors
    /// There is no thread to be had: the call must be ended at once.
    pub fn add(self: &Arc<Brief>, db: &Weak<Db>, id: u64) -> std::io::Result<()> {
        let mut state = self.state.lock().unwrap();
        if !state.runs {
            let me = self.clone();
            threads::spawn("litefs-brief", move || me.run())?;
            state.runs = true;
        }
        let end = Instant::now() + limits::ENGINE_LOCK_WAIT;
        state.waits.push_back(Wait { end, db: db.clone(), id });
        Ok(())
    }

    fn run(&self) {
        while let Some(end) = self.next_end() {
            thread::sleep(end.saturating_duration_since(Instant::now()));
            let wait = self.state.lock().unwrap().waits.pop_front();
            if let Some(Wait { db, id, .. }) = wait
                && let Some(db) = db.upgrade()
            {
                db.end_wait(id);
            }
        }
    }

    /// When the next one ends; with none the thread does.
    fn next_end(&self) -> Option<Instant> {
        let mut state = self.state.lock().unwrap();
        let next = state.waits.front().map(|wait| wait.end);
        state.runs = next.is_some();
        next
    }
}
