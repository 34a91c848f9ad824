//! Uploads to a directory that outlive who began them: a thread that writes cannot be stopped. They are made
//! in this process, so that a test can hold one where it likes.

use std::fs::{self, File};
use std::io::BufReader;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use litefs::cluster::backup::directory::Directory;
use litefs::cluster::backup::{Backup, Store, Timing, Written};
use litefs::engine::DbName;
use litefs::engine::backup::{Need, Upload};
use litefs::os::fault::{self, Call, Verdict, Watch};
use ltx::Pos;
use nix::unistd::{Pid, gettid};
use tokio::sync::watch;

use crate::support::local::Local;
use crate::support::vault::Vault;
use crate::support::{sqlite, wait};

const DB: &str = "app.db";

/// A directory in which the first upload is held before it is synced.
struct Slow {
    vault: Vault,
    is_held: AtomicBool,
    /// The first one goes on.
    goes_on: AtomicBool,
    /// Another one writes although the first one is held.
    is_joined: AtomicBool,
    /// A file got its name.
    is_named: AtomicBool,
    /// A file was there under its name that is not whole.
    is_torn: AtomicBool,
}

impl Slow {
    fn new(vault: &Vault) -> Arc<Slow> {
        let no = || AtomicBool::new(false);
        let (is_held, goes_on, is_joined, is_named, is_torn) = (no(), no(), no(), no(), no());
        Arc::new(Slow { vault: vault.clone(), is_held, goes_on, is_joined, is_named, is_torn })
    }

    #[track_caller]
    fn wait_for(&self, what: &str, flag: &AtomicBool) {
        wait::until_true(what, || flag.load(Ordering::SeqCst));
    }

    fn let_go(&self) {
        self.goes_on.store(true, Ordering::SeqCst);
    }

    /// How many files are there that have not got their name.
    fn unfinished(&self) -> usize {
        let names = fs::read_dir(self.vault.dir(DB)).into_iter().flatten();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".tmp")).count()
    }
}

impl Watch for Slow {
    fn before(&self, label: &str, call: &Call<'_>) -> Verdict {
        let is_held = self.is_held.load(Ordering::SeqCst);
        match call {
            Call::Sync(_) if label == "backup:file" && !is_held => {
                self.is_held.store(true, Ordering::SeqCst);
                self.wait_for("the test", &self.goes_on);
            }
            Call::Write(..) if is_held && !self.goes_on.load(Ordering::SeqCst) => {
                self.is_joined.store(true, Ordering::SeqCst);
                self.wait_for("the first upload", &self.is_named);
            }
            _ => {}
        }
        Verdict::Go
    }

    fn after(&self, _label: &str, call: &Call<'_>) {
        let is_whole = |path| ltx::verify(BufReader::new(File::open(path).unwrap())).is_ok();
        if !self.vault.files(DB).into_iter().all(|(_, _, path)| is_whole(path)) {
            self.is_torn.store(true, Ordering::SeqCst);
        }
        if let Call::Rename(..) = call {
            self.is_named.store(true, Ordering::SeqCst);
        }
    }
}

/// A primary with a database, and where that stands.
fn node() -> (Local, Pos) {
    let local = Local::primary("off", 1, None);
    let source = local.data().join("source");
    sqlite::run(&source, "create table t (x); insert into t values (randomblob(50000))");
    let pos = local.engine.import(&DbName::new(DB).unwrap(), &source).unwrap();
    (local, pos)
}

fn upload(local: &Local) -> Upload {
    match local.db(DB).backup_need(Pos::ZERO).unwrap() {
        Need::Upload(upload) => upload,
        _ => panic!("nothing to send"),
    }
}

/// Whether a thread of this process waits for something.
fn is_waiting(thread: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('S'))
}

/// At a stop, what was being sent is sent once more, beside the thread that still sends it.
#[test]
fn an_upload_waits_for_the_one_before() {
    let (local, pos) = node();
    let (vault, name) = (Vault::new(), DbName::new(DB).unwrap());
    let directory = Directory::new(vault.path().to_owned());
    let slow = Slow::new(&vault);
    let _watching = fault::watch(vault.path(), slow.clone());
    let write = |upload: Upload| directory.write(&name, &upload, &|| true).unwrap();
    thread::scope(|scope| {
        let first = scope.spawn(|| write(upload(&local)));
        slow.wait_for("an upload that is held", &slow.is_held);
        let (sender, threads) = mpsc::channel();
        let again = upload(&local);
        let second = scope.spawn(move || {
            sender.send(gettid()).unwrap();
            write(again)
        });
        let thread = threads.recv().unwrap();
        let is_joined = || slow.is_joined.load(Ordering::SeqCst);
        wait::until_true("another upload", || is_joined() || is_waiting(thread));
        slow.let_go();
        assert!(matches!(first.join().unwrap(), Written::Taken { .. }));
        assert!(!slow.is_torn.load(Ordering::SeqCst), "a half-written file has its name");
        assert!(matches!(second.join().unwrap(), Written::Mismatch(at) if at == pos));
    });
    assert_eq!((vault.pos(DB), slow.unfinished()), (pos, 0));
}

/// A node that is not the primary any more must not move the backup.
#[test]
fn an_upload_that_outlives_the_lease_gets_no_name() {
    let (local, pos) = node();
    let vault = Vault::new();
    let slow = Slow::new(&vault);
    let _watching = fault::watch(vault.path(), slow.clone());
    let timing = Timing { delay: Duration::ZERO, full_sync: Duration::from_millis(50) };
    let store = Store::directory(vault.path().to_owned());
    let (leads, is_primary) = watch::channel(true);
    let (backup, _) = Backup::new(local.engine.clone(), store, timing, is_primary);
    let (stop, stopped) = watch::channel(());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| runtime.block_on(backup.run(stopped)));
        slow.wait_for("an upload that is held", &slow.is_held);
        leads.send_replace(false);
        wait::until_true("the end of the task's work", || local.engine.subscriber_count() == 0);
        slow.let_go();
        wait::until_true("the end of the upload", || slow.unfinished() == 0);
        let sent = vault.files(DB);
        leads.send_replace(true);
        vault.wait_for_pos(DB, pos);
        drop(stop);
        assert_eq!(sent, [], "sent without a lease");
    });
    assert_eq!(slow.unfinished(), 0);
}
