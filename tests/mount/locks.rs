//! POSIX locks as fcntl(2) has them, from processes of their own: who owns a lock, when it ends, what a
//! question is answered (but for the process that has a lock, which is always 0). On the database file and on the wal-index, in each way of the mount.

use nix::libc;
use test_case::test_matrix;

use super::{DB, Node, sqlite, strict_over};
use crate::support::process::Process;
use crate::support::wait;

/// The lock bytes that these tests use, with their file: nobody else takes them meanwhile.
const BYTES: [(&str, u64); 2] = [(DB, 0x4000_0001), ("app.db-shm", 122)];

/// A database in WAL mode that a connection has open, so that all its files are there.
fn scene(passthrough: &'static str, transport: &'static str) -> (Node, super::Connection) {
    let node = strict_over(transport, passthrough);
    let db = sqlite::open(&node.file(DB));
    db.execute_batch("pragma journal_mode=wal; create table t(a); insert into t values (1)")
        .unwrap();
    (node, db)
}

/// For each lock byte: two processes that have its file open.
fn pairs(node: &Node, mut check: impl FnMut(&mut Process, &mut Process, u64)) {
    for (file, byte) in BYTES {
        let mut two = [0, 1].map(|_| Process::open(&node.file(file)));
        let [a, b] = &mut two;
        check(a, b, byte);
    }
}

#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn a_child_has_none_of_its_parents_locks(passthrough: &'static str, transport: &'static str) {
    let (node, db) = scene(passthrough, transport);
    pairs(&node, |parent, other, byte| {
        parent.expect(&format!("lock(f, 'w', {byte})"), "None");
        // Neither through the descriptor that it inherited, nor through one of its own.
        parent.expect(&format!("child(\"lock(f, 'r', {byte})\")"), "EAGAIN");
        let again = format!("child(\"lock(os.open(f'/proc/self/fd/{{f}}', 2), 'r', {byte})\")");
        parent.expect(&again, "EAGAIN");
        // Its close is not its parent's, nor is its end.
        parent.expect("child('os.close(f)')", "None");
        other.expect(&format!("lock(f, 'r', {byte})"), "EAGAIN");
        // What it takes itself goes with it.
        parent.expect(&format!("lock(f, 'u', {byte})"), "None");
        parent.expect(&format!("child(\"lock(f, 'w', {byte})\")"), "None");
        wait::until_true("end of the child's lock", || {
            other.tell(&format!("lock(f, 'w', {byte})")) == "None"
        });
    });
    db.execute_batch("insert into t values (2)").unwrap();
}

#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn any_close_gives_up_all_locks_of_the_process(passthrough: &'static str, transport: &'static str) {
    let (node, _db) = scene(passthrough, transport);
    pairs(&node, |a, b, byte| {
        let closes =
            ["os.close(os.dup(f))", "os.close(os.open(f'/proc/self/fd/{f}', os.O_RDONLY))"];
        for close in closes {
            a.expect(&format!("lock(f, 'w', {byte})"), "None");
            b.expect(&format!("lock(f, 'w', {byte})"), "EAGAIN");
            a.expect(close, "None");
            b.expect(&format!("lock(f, 'w', {byte})"), "None");
            b.expect(&format!("lock(f, 'u', {byte})"), "None");
        }
    });
}

#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn threads_of_a_process_are_one_owner(passthrough: &'static str, transport: &'static str) {
    let (node, _db) = scene(passthrough, transport);
    pairs(&node, |a, b, byte| {
        a.expect(&format!("thread(\"lock(f, 'w', {byte})\")"), "None");
        // The thread has ended, its lock has not.
        b.expect(&format!("lock(f, 'r', {byte})"), "EAGAIN");
        a.expect(&format!("thread(\"query(f, 'w', {byte})\")"), "free");
        a.expect(&format!("thread(\"lock(f, 'r', {byte})\")"), "None");
        b.expect(&format!("lock(f, 'r', {byte})"), "None");
        a.expect(&format!("lock(f, 'w', {byte})"), "EAGAIN");
        a.expect(&format!("thread(\"lock(f, 'u', {byte})\")"), "None");
        b.expect(&format!("lock(f, 'w', {byte})"), "None");
    });
}

#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn a_wait_ends_with_the_lock_or_with_a_signal(passthrough: &'static str, transport: &'static str) {
    let (node, _db) = scene(passthrough, transport);
    pairs(&node, |a, b, byte| {
        a.expect(&format!("lock(f, 'w', {byte})"), "None");
        b.begin(&format!("wait(f, 'w', {byte})"));
        wait::until_true("b to wait", || b.is_waiting_in(libc::SYS_fcntl));
        b.interrupt();
        assert_eq!(b.end(), "EINTR");
        b.begin(&format!("wait(f, 'w', {byte})"));
        wait::until_true("b to wait again", || b.is_waiting_in(libc::SYS_fcntl));
        a.expect(&format!("lock(f, 'u', {byte})"), "None");
        assert_eq!(b.end(), "None");
        a.expect(&format!("lock(f, 'r', {byte})"), "EAGAIN");
    });
}

#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn a_question_names_kind_and_range(passthrough: &'static str, transport: &'static str) {
    let (node, _db) = scene(passthrough, transport);
    pairs(&node, |a, b, byte| {
        b.expect(&format!("query(f, 'w', {byte})"), "free");
        a.expect(&format!("lock(f, 'r', {byte})"), "None");
        b.expect(&format!("query(f, 'r', {byte})"), "free");
        b.expect(&format!("query(f, 'w', {byte})"), &format!("r {byte} 1 0"));
        a.expect(&format!("lock(f, 'w', {byte})"), "None");
        b.expect(&format!("query(f, 'r', {byte})"), &format!("w {byte} 1 0"));
        a.expect(&format!("query(f, 'w', {byte})"), "free");
    });
}

/// A lock of an open file belongs to it, however many descriptors or processes have it.
#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn a_lock_of_an_open_file_belongs_to_it(passthrough: &'static str, transport: &'static str) {
    let (node, _db) = scene(passthrough, transport);
    pairs(&node, |a, b, byte| {
        a.expect("(g := os.open(f'/proc/self/fd/{f}', os.O_RDWR)) and None", "None");
        a.expect(&format!("ofd(f, 'w', {byte})"), "None");
        // Its own process, through another open file or as a POSIX lock, is a stranger.
        a.expect(&format!("ofd(g, 'r', {byte})"), "EAGAIN");
        a.expect(&format!("lock(f, 'r', {byte})"), "EAGAIN");
        b.expect(&format!("lock(f, 'r', {byte})"), "EAGAIN");
        b.expect(&format!("query(f, 'r', {byte}, 1, OFD_GETLK)"), &format!("w {byte} 1 -1"));
        // A child has the same open file.
        a.expect(&format!("child(\"ofd(f, 'w', {byte})\")"), "None");
        a.expect("os.close(os.dup(f))", "None");
        a.expect("os.close(g)", "None");
        b.expect(&format!("lock(f, 'r', {byte})"), "EAGAIN");
        a.expect("os.close(f)", "None");
        wait::until_true("end of the open file's lock", || {
            b.tell(&format!("lock(f, 'w', {byte})")) == "None"
        });
    });
}

/// flock(2) works among the processes of the machine, and is another lock than those of SQLite.
#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn flock_is_a_lock_of_its_own(passthrough: &'static str, transport: &'static str) {
    let (node, db) = scene(passthrough, transport);
    pairs(&node, |a, b, byte| {
        a.expect("fcntl.flock(f, fcntl.LOCK_EX)", "None");
        b.expect("fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)", "EAGAIN");
        b.expect(&format!("lock(f, 'w', {byte})"), "None");
        a.expect("fcntl.flock(f, fcntl.LOCK_UN)", "None");
        b.expect("fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)", "None");
        b.expect(&format!("lock(f, 'u', {byte})"), "None");
    });
    db.execute_batch("insert into t values (2)").unwrap();
}
