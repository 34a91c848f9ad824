//! The hand-over from commits to the writer's thread, in many orders of the threads that take part.
//!
//! `LITEFS_TEST_ORDERS` (`make torture`) plays so many, `LITEFS_TEST_SEED` others.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::tests::{open, transaction};
use super::*;
use crate::engine::sync::model::{self, Clock};
use crate::engine::sync::{Condvar, JoinHandle, spawn};

/// So many commits.
const COMMITS: u64 = 3;

/// Plays it in many orders.
fn check(run: impl Fn() + Send + Sync + 'static) {
    check_under(Clock::Goes, run);
}

fn check_under(clock: Clock, run: impl Fn() + Send + Sync + 'static) {
    let orders = model::given("LITEFS_TEST_ORDERS", 150) as usize;
    let played = Arc::new(AtomicUsize::new(0));
    let count = played.clone();
    model::check(clock, orders, move || {
        count.fetch_add(1, Ordering::Relaxed);
        run();
    });
    assert_eq!(played.load(Ordering::Relaxed), orders);
}

/// A thread that commits, and does more `after` each transaction.
fn commits(
    chain: &Arc<Chain>,
    waker: Waker,
    after: impl Fn(&Arc<Chain>, u64) + Send + 'static,
) -> JoinHandle<()> {
    let chain = chain.clone();
    let run = move || {
        for txid in 2..2 + COMMITS {
            chain.push(transaction(txid, 1));
            waker.queued(&chain);
            after(&chain, txid);
        }
    };
    spawn("commits", run).unwrap()
}

/// Who waits until a transaction is durable.
#[derive(Default)]
struct Answer {
    given: Mutex<Option<Result<(), String>>>,
    wake: OnceWake,
}

struct OnceWake(Condvar);

impl Default for OnceWake {
    fn default() -> OnceWake {
        OnceWake(Condvar::new())
    }
}

impl Answer {
    fn give(&self, result: Result<(), String>) {
        let before = self.given.lock().unwrap().replace(result);
        assert!(before.is_none(), "one answer");
        self.wake.0.notify_all();
    }

    fn wait(&self) -> Result<(), String> {
        let mut given = self.given.lock().unwrap();
        loop {
            if let Some(result) = given.take() {
                return result;
            }
            given = self.wake.0.wait(given).unwrap();
        }
    }
}

fn wait_durable(chain: &Arc<Chain>, waker: &Waker, txid: Txid) {
    let answer = Arc::new(Answer::default());
    let of_callback = answer.clone();
    let done: Durable = Box::new(move |result| of_callback.give(result));
    if chain.when_durable(txid, done) == Waiting::Waits {
        waker.urgent(chain);
    }
    answer.wait().unwrap();
    assert!(chain.is_durable(txid) && chain.contains(txid), "{txid} is durable");
}

/// The transactions up to the last one are in files that follow on one another.
fn check_files(chain: &Chain, last: u64) {
    let files = chain.files_after(Txid(1), usize::MAX, u64::MAX);
    assert_eq!(files.last().map(|file| file.max), Some(Txid(last)), "{files:?}");
    for file in &files {
        let path = chain.dir.ltx_file(file.min, file.max);
        ltx::verify(&fs::read(&path).unwrap()[..]).unwrap();
    }
}

/// Whoever asks for durability is answered, once, when it is true; and nothing stays in the queue.
#[test]
fn whoever_waits_for_a_commit_is_answered_in_every_order() {
    check(|| {
        let temp = tempfile::tempdir_in(memory()).unwrap();
        let chain = Arc::new(open(temp.path()));
        let writer = Writer::start();
        let committer = commits(&chain, writer.waker(), |_, _| ());
        // A checkpoint waits for what is there by then; somebody else syncs in between.
        let waiter = {
            let (chain, waker) = (chain.clone(), writer.waker());
            spawn("waits", move || {
                while chain.stats().backlog == 0 && !chain.contains(Txid(2)) {
                    shuttle::thread::yield_now();
                }
                wait_durable(&chain, &waker, Txid(2));
            })
        };
        let other = {
            let chain = chain.clone();
            spawn("syncs", move || chain.sync().unwrap())
        };
        committer.join().unwrap();
        waiter.unwrap().join().unwrap();
        other.unwrap().join().unwrap();
        wait_durable(&chain, &writer.waker(), Txid(1 + COMMITS));
        drop(writer);
        assert_eq!(chain.stats().backlog, 0);
        check_files(&chain, 1 + COMMITS);
    });
}

/// Whoever waits wakes a writer that rests after others have committed: no time has to go by for that.
#[test]
fn who_is_urgent_waits_for_no_clock_in_any_order() {
    check_under(Clock::Stands, || {
        let temp = tempfile::tempdir_in(memory()).unwrap();
        let chain = Arc::new(open(temp.path()));
        let writer = Writer::start();
        let pushed = Arc::new(AtomicUsize::new(1));
        let waiter = {
            let (chain, waker, pushed) = (chain.clone(), writer.waker(), pushed.clone());
            spawn("waits", move || {
                for txid in 2..2 + COMMITS {
                    while (pushed.load(Ordering::SeqCst) as u64) < txid {
                        shuttle::thread::yield_now();
                    }
                    wait_durable(&chain, &waker, Txid(txid));
                }
            })
        };
        let committer = commits(&chain, writer.waker(), {
            let waker = writer.waker();
            move |chain, txid| {
                pushed.store(txid as usize, Ordering::SeqCst);
                if txid == 3 {
                    wait_durable(chain, &waker, Txid(txid));
                }
            }
        });
        committer.join().unwrap();
        waiter.unwrap().join().unwrap();
        drop(writer);
        check_files(&chain, 1 + COMMITS);
    });
}

/// A node that stops writes what was handed over before.
#[test]
fn a_writer_that_ends_leaves_nothing_behind_in_every_order() {
    check(|| {
        let temp = tempfile::tempdir_in(memory()).unwrap();
        let chain = Arc::new(open(temp.path()));
        let writer = Writer::start();
        let waker = writer.waker();
        for txid in 2..2 + COMMITS {
            chain.push(transaction(txid, 1));
            waker.queued(&chain);
        }
        drop(writer);
        assert_eq!(chain.stats().backlog, 0);
        check_files(&chain, 1 + COMMITS);
    });
}

/// What a stream looks for is in memory, in the queue or in a file at each moment.
#[test]
fn a_stream_finds_each_commit_in_every_order() {
    check(|| {
        let temp = tempfile::tempdir_in(memory()).unwrap();
        let chain = Arc::new(open(temp.path()));
        let writer = Writer::start();
        let pushed = Arc::new(AtomicUsize::new(1));
        let committer = commits(&chain, writer.waker(), {
            let pushed = pushed.clone();
            move |chain, txid| {
                pushed.store(txid as usize, Ordering::SeqCst);
                if txid == 3 {
                    chain.forget_recent();
                }
            }
        });
        let stream = {
            let chain = chain.clone();
            spawn("streams", move || {
                let mut at = 1;
                while at < 1 + COMMITS {
                    let pos = Pos { txid: Txid(at), checksum: Checksum::flagged(at + 1) };
                    let last = pushed.load(Ordering::SeqCst) as u64;
                    match chain.successor(pos).unwrap() {
                        Successor::Recent(found) => at = found.max.0,
                        Successor::File(_, file) => at = file.max.0,
                        Successor::Queued => chain.flush().unwrap(),
                        Successor::Gone => assert!(last <= at, "{at} of {last}"),
                    }
                    shuttle::thread::yield_now();
                }
            })
        };
        committer.join().unwrap();
        stream.unwrap().join().unwrap();
    });
}

/// A sync costs nothing there.
fn memory() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}
