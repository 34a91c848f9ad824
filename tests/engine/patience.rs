//! Who asks for a lock without waiting, while the engine itself is in the way.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;

use litefs::limits;

use super::*;

/// An output that says when something is written to it, and takes it when it is told to.
struct Gate {
    reached: Sender<()>,
    open: Receiver<()>,
}

impl io::Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.reached.send(());
        // Open for good once its other side is gone.
        let _ = self.open.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A database with a rollback journal, on which a client has RESERVED and asks for the whole while a
/// snapshot is read; `play` gets the client's answers, and what lets the snapshot go on.
fn while_a_snapshot_is_read(
    patience: Patience,
    play: impl FnOnce(&Receiver<Result<(), Refusal>>, Sender<()>),
) {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "app.db");
    let source = dir.path().join("source");
    fs::write(&source, image(300)).unwrap();
    db.import(&source).unwrap();
    let (reached, is_reached) = mpsc::channel();
    let (opener, open) = mpsc::channel();
    thread::scope(|scope| {
        let snapshot = scope.spawn(|| db.snapshot(&mut Gate { reached, open }));
        is_reached.recv_timeout(Duration::from_secs(20)).expect("pages of the snapshot");
        lock(&db, LockSet::one(Lock::Reserved), LockKind::Exclusive).unwrap();
        let (sender, answers) = mpsc::channel();
        let set = LockSet::one(Lock::Shared);
        let request =
            Request { owner: Owner::client(CLIENT), via: VIA, set, kind: LockKind::Exclusive };
        db.lock(request, patience, Box::new(move |result| sender.send(result).unwrap()));
        play(&answers, opener);
        snapshot.join().unwrap().expect("a snapshot");
    });
    unlock_all(&db);
}

#[test]
fn who_writes_waits_for_a_snapshot_that_is_read() {
    while_a_snapshot_is_read(Patience::WithEngine, |answers, opener| {
        assert!(answers.try_recv().is_err(), "answered while the snapshot is read");
        drop(opener);
        let answer = answers.recv_timeout(Duration::from_secs(20));
        assert_eq!(answer.expect("an answer"), Ok(()));
    });
    while_a_snapshot_is_read(Patience::None, |answers, opener| {
        assert_eq!(answers.try_recv(), Ok(Err(Refusal::WouldBlock)));
        drop(opener);
    });
}

/// A disk that does not come to an end must not hold a client for as long.
#[test]
fn who_writes_does_not_wait_for_ever() {
    while_a_snapshot_is_read(Patience::WithEngine, |answers, opener| {
        let soon = answers.recv_timeout(limits::ENGINE_LOCK_WAIT / 2);
        assert_eq!(soon, Err(RecvTimeoutError::Timeout));
        let answer = answers.recv_timeout(Duration::from_secs(60));
        assert_eq!(answer, Ok(Err(Refusal::WouldBlock)));
        drop(opener);
    });
}
