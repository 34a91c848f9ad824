//! The note that a restore has begun (`src/cluster/backup/begun.rs`), which can fail to be written or to go. In
//! this process, so that a test can let it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use litefs::cluster::backup::{Backup, Store, Timing};
use litefs::os::fault::{self, Call, Verdict, Watch};
use nix::libc;
use test_case::test_case;
use tokio::sync::watch;

use crate::support::local::Local;
use crate::support::vault::Vault;
use crate::support::{sqlite, wait};

const DB: &str = "app.db";

/// A disk that refuses to write the note, or to remove it.
struct Refusing {
    call: fn(&Call<'_>) -> bool,
    count: AtomicUsize,
}

impl Watch for Refusing {
    fn before(&self, label: &str, call: &Call<'_>) -> Verdict {
        if label != "backup:restoring" || !(self.call)(call) {
            return Verdict::Go;
        }
        self.count.fetch_add(1, Ordering::SeqCst);
        Verdict::Fail(libc::EIO)
    }

    fn after(&self, _label: &str, _call: &Call<'_>) {}
}

/// Nothing is restored without the note, and the node does not have its backup as long as it is there: a
/// start that finds it waits, and one that does not find it lets applications begin.
#[test_case(|call| matches!(call, Call::Sync(_)), false; "that is not written")]
#[test_case(|call| matches!(call, Call::SyncDir(_)), false; "that is not durable")]
#[test_case(is_note, true; "that does not go")]
fn a_note_that_fails_is_tried_again(call: fn(&Call<'_>) -> bool, is_restored: bool) {
    let (vault, local) = (Vault::new(), Local::primary("off", 1, None));
    let source = vault.path().join("source");
    sqlite::run(&source, "create table t (x)");
    let pos = vault.set(DB, &std::fs::read(&source).unwrap(), 1);
    let refusing = Arc::new(Refusing { call, count: AtomicUsize::new(0) });
    let watching = fault::watch(&local.data(), refusing.clone());
    let timing = Timing { delay: Duration::ZERO, full_sync: Duration::from_millis(50) };
    let store = Store::directory(vault.path().to_owned());
    let (_leads, is_primary) = watch::channel(true);
    let (backup, restored) = Backup::new(local.engine.clone(), store, timing, is_primary);
    let (stop, stopped) = watch::channel(());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| runtime.block_on(backup.run(stopped)));
        wait::until_true("a second try", || refusing.count.load(Ordering::SeqCst) >= 2);
        let has = local.engine.database(DB).is_some_and(|db| db.pos() == pos);
        let says = *restored.borrow();
        drop(watching);
        wait::until_true("what the backup has", || *restored.borrow());
        drop(stop);
        assert_eq!((has, says), (is_restored, false));
    });
    assert_eq!(local.db(DB).pos(), pos);
    assert!(!local.data().join("restoring").exists());
}

/// Whether it removes the note itself, and not the file that becomes it.
fn is_note(call: &Call<'_>) -> bool {
    matches!(call, Call::Remove(path) if path.file_name() == Some("restoring".as_ref()))
}
