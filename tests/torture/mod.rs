//! Every file call of a node fails, ends early, or is the last one before a crash or a power loss; and
//! what was acknowledged is looked for.
//!
//! The client is SQLite itself, on a VFS that calls the engine as a mount would; the disk is what the
//! calls made of it. `make test` tries a sample, the same each time; `LITEFS_TEST_SEED` another one;
//! `LITEFS_TEST_ALL` (`make torture`) every call, and many images. `LITEFS_TEST_SCRIPT` and
//! `LITEFS_TEST_LABEL` choose scripts and calls by their names.

// What a node does beside the transactions of one database.
mod acts;
// SQLite on an engine without a mount.
mod client;
// What a disk holds after a crash or a power loss.
mod disk;
// One call fails.
mod faults;
// Which calls the scripts come to.
mod labels;
// A database that is lent to another node.
mod lent;
// The power is lost.
mod power;
// What the client does, and what it may find afterwards.
mod script;
// The start after that is hit too.
mod start;

use std::time::UNIX_EPOCH;

/// The seed of this run; it is printed.
pub fn seed() -> u64 {
    let seed = match std::env::var("LITEFS_TEST_SEED") {
        Ok(text) => text.parse().expect("LITEFS_TEST_SEED is a number"),
        Err(_) if is_whole() => UNIX_EPOCH.elapsed().map_or(1, |age| age.as_secs()),
        Err(_) => 1,
    };
    println!("LITEFS_TEST_SEED={seed}");
    seed
}

/// Whether everything is tried instead of a sample.
pub fn is_whole() -> bool {
    std::env::var_os("LITEFS_TEST_ALL").is_some()
}

/// A directory in memory, where the machine has one: a sync costs nothing there.
pub fn ram_dir() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

/// Calls `each` with every item, several at a time; the messages of those that panicked.
pub fn each<T: Sync>(items: &[T], each: impl Fn(&T) -> Result<(), String> + Sync) -> Vec<String> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let failures = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(item) =
                    items.get(next.fetch_add(1, std::sync::atomic::Ordering::SeqCst))
                {
                    let begin = std::time::Instant::now();
                    let run = std::panic::AssertUnwindSafe(|| each(item));
                    let result = std::panic::catch_unwind(run);
                    if begin.elapsed() > SLOW {
                        println!("{:?} for the next", begin.elapsed());
                    }
                    let failed = match result {
                        Ok(Ok(())) => continue,
                        Ok(Err(message)) => message,
                        Err(panic) => message_of(&*panic),
                    };
                    println!("{failed}");
                    failures.lock().unwrap().push(failed);
                }
            });
        }
    });
    failures.into_inner().unwrap()
}

/// What takes longer is worth a line.
const SLOW: std::time::Duration = std::time::Duration::from_secs(10);

/// Most of the time is spent waiting.
const WORKERS: usize = 6;

fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "panic".to_owned())
}
