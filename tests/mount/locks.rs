//! POSIX locks as fcntl(2) has them, from processes of their own: who owns a lock, when it ends, what a
//! question is answered (but for the process that has a lock, which is always 0). On the database file
//! and on the wal-index, in each way of the mount; and what chance asks for, beside a bare file system.

use nix::libc;
use test_case::test_matrix;

use super::{DB, Node, check_chain, sqlite, strict_over};
use crate::support::chance::Chance;
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

/// What a process has locked stays locked while it becomes another program, unless that closes the file.
#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn locks_outlive_execve(passthrough: &'static str, transport: &'static str) {
    let (node, _db) = scene(passthrough, transport);
    pairs(&node, |a, b, byte| {
        a.expect(&format!("lock(f, 'w', {byte})"), "None");
        a.expect("again(f)", "None");
        b.expect(&format!("lock(f, 'r', {byte})"), "EAGAIN");
        // It is still the owner.
        a.expect(&format!("lock(f, 'r', {byte})"), "None");
        b.expect(&format!("lock(f, 'r', {byte})"), "None");
        b.expect(&format!("lock(f, 'u', {byte})"), "None");
        // A descriptor that closes then takes them with it, as any close does, but none of an open file.
        a.expect(&format!("lock(f, 'w', {byte})"), "None");
        a.expect(&format!("ofd(f, 'w', {})", byte - 1), "None");
        a.expect("os.set_inheritable(os.dup(f), False)", "None");
        a.expect("again(f)", "None");
        b.expect(&format!("lock(f, 'w', {byte})"), "None");
        b.expect(&format!("lock(f, 'w', {})", byte - 1), "EAGAIN");
    });
}

/// Of processes that would wait for each other the last one to ask is told, and the others go on.
#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn a_circle_of_waits_is_refused(passthrough: &'static str, transport: &'static str) {
    let (node, _db) = scene(passthrough, transport);
    pairs(&node, |a, b, byte| {
        a.expect(&format!("lock(f, 'w', {byte})"), "None");
        b.expect(&format!("lock(f, 'w', {})", byte - 1), "None");
        b.begin(&format!("wait(f, 'w', {byte})"));
        wait::until_true("b to wait", || b.is_waiting_in(libc::SYS_fcntl));
        a.expect(&format!("wait(f, 'r', {})", byte - 1), "EDEADLK");
        a.expect(&format!("lock(f, 'u', {byte})"), "None");
        assert_eq!(b.end(), "None");
        // There is no circle any more.
        a.begin(&format!("wait(f, 'r', {})", byte - 1));
        wait::until_true("a to wait", || a.is_waiting_in(libc::SYS_fcntl));
        b.expect(&format!("lock(f, 'u', {})", byte - 1), "None");
        assert_eq!(a.end(), "None");
        a.expect(&format!("lock(f, 'u', {})", byte - 1), "None");
        b.expect(&format!("lock(f, 'u', {byte})"), "None");
        // Where only open files have the locks a bare file system lets them wait for ever.
        a.expect(&format!("ofd(f, 'w', {byte})"), "None");
        b.expect(&format!("ofd(f, 'w', {})", byte - 1), "None");
        b.begin(&format!("ofd_wait(f, 'w', {byte})"));
        wait::until_true("b to wait", || b.is_waiting_in(libc::SYS_fcntl));
        a.expect(&format!("ofd_wait(f, 'r', {})", byte - 1), "EDEADLK");
        a.expect(&format!("ofd(f, 'u', {byte})"), "None");
        assert_eq!(b.end(), "None");
    });
}

/// Each database knows its own locks only.
#[test]
fn a_circle_over_two_databases_is_not_noticed() {
    let node = strict_over("auto", "auto");
    let names = [DB, "other.db"];
    for name in names {
        sqlite::open(&node.file(name)).execute_batch("create table t(a)").unwrap();
    }
    let [mut a, mut b] = names.map(|name| Process::open(&node.file(name)));
    for (process, other) in [(&mut a, names[1]), (&mut b, names[0])] {
        process.expect("lock(f, 'w', 0x40000001)", "None");
        let open = format!("(g := os.open({:?}, os.O_RDWR)) and None", node.file(other));
        process.expect(&open, "None");
    }
    for process in [&mut a, &mut b] {
        process.begin("wait(g, 'w', 0x40000001)");
        wait::until_true("one to wait", || process.is_waiting_in(libc::SYS_fcntl));
    }
    a.interrupt();
    assert_eq!(a.end(), "EINTR");
    a.expect("lock(f, 'u', 0x40000001)", "None");
    assert_eq!(b.end(), "None");
}

/// Who is killed while it waits for a lock leaves nothing behind: the next one gets it.
#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn a_waiter_that_is_killed_is_passed_over(passthrough: &'static str, transport: &'static str) {
    let (node, _db) = scene(passthrough, transport);
    for (file, byte) in BYTES {
        let [mut a, mut b, mut c] = [0, 1, 2].map(|_| Process::open(&node.file(file)));
        a.expect(&format!("lock(f, 'w', {byte})"), "None");
        for waiter in [&mut b, &mut c] {
            waiter.begin(&format!("wait(f, 'w', {byte})"));
            wait::until_true("a waiter", || waiter.is_waiting_in(libc::SYS_fcntl));
        }
        b.kill();
        a.expect(&format!("lock(f, 'u', {byte})"), "None");
        assert_eq!(c.end(), "None");
        a.expect(&format!("lock(f, 'r', {byte})"), "EAGAIN");
        // And who is killed with the lock that somebody waits for.
        a.begin(&format!("wait(f, 'w', {byte})"));
        wait::until_true("a to wait", || a.is_waiting_in(libc::SYS_fcntl));
        c.kill();
        assert_eq!(a.end(), "None");
    }
}

/// Locks of the database file and of the wal-index with their bytes, next to each other in each file.
const LOCKS: [&[(u64, u64)]; 2] = [
    &[(0x4000_0000, 1), (0x4000_0001, 1), (0x4000_0002, 510)],
    &[(120, 1), (121, 1), (122, 1), (123, 1), (124, 1), (125, 1), (126, 1), (127, 1), (128, 1)],
];

/// Calls of a sequence.
const CALLS: usize = 250;

/// One call of a process, about a place: its files are those of a mount or of a bare file system.
fn call(chance: &mut Chance, files: u64) -> String {
    let slot = chance.below(3 * files);
    let other = slot / 3 * 3 + chance.below(3);
    let locks = LOCKS[slot as usize / 3];
    let first = chance.below(locks.len() as u64) as usize;
    let more = chance.of(&[1, 1, 1, 2, 9]).min(locks.len() - first);
    let (start, len) =
        (locks[first].0, locks[first..first + more].iter().map(|l| l.1).sum::<u64>());
    let kind = chance.of(&["r", "w"]);
    let set = |name: &str, kind: &str| format!("{name}(p.fds[{slot}], '{kind}', {start}, {len})");
    match chance.below(100) {
        0..30 => set("lock", kind),
        30..40 => set("lock", "u"),
        40..55 => set("ofd", kind),
        55..60 => set("ofd", "u"),
        60..75 => {
            let command = chance.of(&["fcntl.F_GETLK", "OFD_GETLK"]);
            let asked = format!("p.in_the_way({slot}, '{kind}', {start}, {len}, {command})");
            // Of several locks in the way either place names any.
            if more == 1 { asked } else { format!("{asked} == 'free'") }
        }
        75..80 => format!("os.close(os.dup(p.fds[{slot}]))"),
        80..83 => format!("os.close(os.open(p.paths[{}], os.O_RDONLY))", slot / 3),
        83..88 => format!("p.open({slot})"),
        88..90 => format!("p.open({slot}, os.O_RDONLY)"),
        90..95 => format!("p.dup({slot}, {other})"),
        95..97 => format!("child(\"{}\")", set("lock", kind)),
        97 => "child('[os.close(fd) for fd in p.fds.values()] and None')".to_owned(),
        _ => format!("thread(\"{}\")", set("lock", kind)),
    }
}

/// Three processes that make random calls, each on files of the mount and on bare ones.
fn compare(node: &Node, files: [&str; 2], count: u64, seed: u64) {
    let bare = [0, 1].map(|n| node.scratch(&format!("bare-{n}")));
    let names = |paths: [std::path::PathBuf; 2]| {
        let names = paths[..count as usize].iter().map(|path| format!("{path:?}"));
        names.collect::<Vec<_>>().join(", ")
    };
    let places = format!(
        "(places := [Place({}), Place({})]) and None",
        names(files.map(|file| node.file(file))),
        names(bare.clone())
    );
    let mut three = [0, 1, 2].map(|_| Process::open(&bare[0]));
    three.iter_mut().for_each(|process| process.expect(&places, "None"));
    let mut chance = Chance(seed);
    let (mut made, mut refused) = (Vec::new(), 0);
    for _ in 0..CALLS {
        let (process, call) = (chance.below(3) as usize, call(&mut chance, count));
        let answers = three[process].tell(&format!("both({call:?})"));
        let (ours, theirs) = answers.split_once(" | ").unwrap_or((&answers, ""));
        made.push(format!("{process}: {call}: {answers}"));
        refused += usize::from(ours == "EAGAIN");
        assert_eq!(ours, theirs, "LITEFS_TEST_SEED={seed}:\n{}", made.join("\n"));
    }
    assert!(refused > 0, "LITEFS_TEST_SEED={seed}: no call met a lock");
}

/// Whatever three processes ask for, on SQLite's lock bytes a mount answers what a bare file system does.
#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn random_calls_are_answered_as_on_a_bare_file(passthrough: &'static str, transport: &'static str) {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let given = std::env::var("LITEFS_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or(clock.as_millis() as u64 % 1_000_000_000);
    println!("LITEFS_TEST_SEED={seed}");
    let node = strict_over(transport, passthrough);
    let db = sqlite::open(&node.file(DB));
    db.execute_batch("create table t(a); insert into t values (1)").unwrap();
    for n in 0..2 {
        std::fs::write(node.scratch(&format!("bare-{n}")), "").unwrap();
    }
    let files = [DB, "app.db-shm"];
    compare(&node, files, 1, seed);
    db.execute_batch("pragma journal_mode=wal; insert into t values (2)").unwrap();
    // A connection in WAL mode has locks on both files.
    let mut connection = Process::open(&node.scratch("bare-0"));
    connection.expect("lock(f, 'r', 0x40000002, 510)", "None");
    let shm = node.scratch("bare-1");
    connection.expect(&format!("(g := os.open({shm:?}, os.O_RDWR)) and None"), "None");
    connection.expect("lock(g, 'r', 128)", "None");
    compare(&node, files, 2, seed);
    db.execute_batch("insert into t values (3)").unwrap();
    assert_eq!(node.pos(DB).txid.0, 5);
    drop(db);
    check_chain(&node.db_dir(DB), node.pos(DB));
}
